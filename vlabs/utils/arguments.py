"""Numbers on a command line: types for argparse that say what a number may be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

MOST_SEED = 2**32 - 1
"""What numpy takes as a seed, and Lightning."""


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Reads whole numbers from `least` to `most`."""

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
    """Reads finite numbers from `least` to `most`."""

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
