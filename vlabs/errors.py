"""How vlabs tells a user that something they gave is wrong: one line, exit status 1, no traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


class UserError(Exception):
    """Bad input. The message is one sentence that names the file or option and says what to do."""


def printable(text: str) -> str:
    """A text as a terminal may have it: what steers a terminal, or is no character at all, is written out."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def show(text: object, **options: Any) -> None:
    """Print what has names, answers or texts of data and checkpoints in it, line by line `printable`.

    Args:
        options: of `print`.
    """
    print("\n".join(printable(line) for line in str(text).split("\n")), **options)


def one_line(message: str) -> str:
    """A message without line breaks; of an error that a loader process passed on, only what it says."""
    message = message.rsplit("vlabs.errors.UserError: ", 1)[-1]
    return printable(" ".join(message.split()))


def exit_with(message: str) -> None:
    """Print `error: message` on one line of standard error and leave with status 1."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


def run_cli(main: Callable[[], None]) -> None:
    """Run a command line program; a `UserError` becomes one line and status 1, Ctrl-C status 130."""
    try:
        main()
    except UserError as error:
        exit_with(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
