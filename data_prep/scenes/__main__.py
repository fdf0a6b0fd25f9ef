"""`python -m data_prep.scenes`: render the embedded corpus."""

from data_prep.scenes.corpus import main
from vlabs.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
