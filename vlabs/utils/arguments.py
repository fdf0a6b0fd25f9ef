"""Command lines: a parser for the commands without a config, and types with limits for numbers."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlabs.errors import UserError
from vlabs.utils.files import check_absent
from vlabs.utils.plugins import import_modules

MOST_SEED = 2**32 - 1
"""The largest seed of numpy and Lightning."""
SEARCH_INDEX = Path("~/.cache/vlabs/search")
"""The default folder of the search index."""


class Parser(argparse.ArgumentParser):
    """The options of a command: `--ckpt RUN`, or `ckpt=RUN` as in commands with a config.

    Args:
        name: name of the command, after `vlabs`.
        doc: its description.
        options: options of argparse.
    """

    def __init__(self, name: str, doc: str, **options: Any) -> None:
        super().__init__(prog=f"vlabs {name}", description=doc, **options)
        own = "a module of your own, with classes that a checkpoint uses; may be given several times"
        self.add_argument("--import", action="append", default=[], dest="modules", metavar="MODULE", help=own)

    def read(self) -> argparse.Namespace:
        """Parse the command line of this process, and import the modules that it names."""
        arguments = self.parse_args(self._with_dashes(sys.argv[1:]))
        import_modules(arguments.modules)
        return arguments

    def _with_dashes(self, given: Sequence[str]) -> list[str]:
        options = self._option_string_actions
        result = []
        for before, argument in zip(["", *given], given, strict=False):
            is_value = before in options and options[before].nargs != 0
            is_option = "=" in argument and f"--{argument.partition('=')[0]}" in options
            result.append(f"--{argument}" if is_option and not is_value else argument)
        return result


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--out` and `--overwrite` of a figure; `check_out` and `vlabs.attention.figures.save_out` read them."""
    told = f"file of the figure, .png or .svg (default: {default}, or {numbered(default, 2)} if that exists)"
    parser.add_argument("--out", help=told)
    parser.add_argument("--overwrite", action="store_true", help="overwrite the file of --out")
    parser.set_defaults(default_out=default)


def add_keep(parser: argparse.ArgumentParser) -> None:
    """Add `--keep`, the share of the patches in the second pass (see `AbSViT`)."""
    told = "share of the patches in the second pass, those most similar to ξ (default: the model's own)"
    parser.add_argument("--keep", type=_share, help=told)


def _share(text: str) -> float:
    """An argparse type: a share that is not nothing."""
    value = number(0, 1)(text)
    if value == 0:
        raise argparse.ArgumentTypeError("must be a number above 0, up to 1")
    return value


def check_out(arguments: argparse.Namespace) -> None:
    """Raise a UserError, before the work, if the figure of a command cannot be written to its path."""
    if arguments.out is None:
        return
    if Path(arguments.out).suffix not in (".png", ".svg"):
        raise UserError(f"--out {arguments.out}: name a .png or .svg file")
    check_absent(arguments.out, "--out", arguments.overwrite)


def numbered(name: str, number: int) -> str:
    """A file name with a number before its suffix, unless it is the first."""
    path = Path(name)
    return name if number == 1 else f"{path.stem}-{number}{path.suffix}"


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            limits = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number, {limits}, not '{text}'")
        return number

    return read


def number(least: float = -math.inf, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: finite numbers from `least` to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most:
            limits = (
                f", {least:g} to {most:g}" if most < math.inf else f", at least {least:g}" if least > -math.inf else ""
            )
            raise argparse.ArgumentTypeError(f"must be a number{limits}, not '{text}'")
        return value

    return read
