"""Render the embedded corpus: scenes of several objects, with questions, captions and instance masks.

Download: nothing, the images are rendered.
"""

from data_prep.scenes.corpus import main
from vlabs.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
