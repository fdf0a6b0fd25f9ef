"""Imports of large libraries, for commands that take seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(*unused: str) -> Iterator[None]:
    """Context manager: import without what only takes time.

    Nothing that is imported becomes garbage, so no garbage is searched for, now or when the process ends.

    Args:
        unused: packages that other libraries import if they are there, but that nothing here uses; within the context
            they count as not installed.
    """
    left_out = [name for name in unused if name not in sys.modules]
    was_enabled = gc.isenabled()
    gc.disable()
    for name in left_out:
        sys.modules[name] = None  # type: ignore[assignment]  # Python's own way to refuse an import
    try:
        yield
    finally:
        for name in left_out:
            del sys.modules[name]
        gc.freeze()
        if was_enabled:
            gc.enable()
