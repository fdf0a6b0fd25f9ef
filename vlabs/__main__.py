"""`python -m vlabs train task=vqa` is `vlabs train task=vqa`."""

from vlabs.cli import main

if __name__ == "__main__":
    main()
