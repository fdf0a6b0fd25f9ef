"""Imports of large libraries, for commands that take seconds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")
"""The compiler of torch, 0.8 s of imports: timm and torchvision take decorators from it, and one from it says whether a
device can compile."""


class _NoCompiler(ModuleType):
    """Stands for a compiler's module while nothing is compiled: every decorator in it returns the function.

    Modules below it are the real ones: the language models of transformers take a class from one.
    """

    def __getattr__(self, name: str) -> Callable[..., Any] | list[str]:
        if name == "__path__":
            import torch

            return [str(Path(torch.__path__[0]).joinpath(*self.__name__.split(".")[1:]))]
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda function=None, *args, **kwargs: function if callable(function) else lambda given: given


@contextmanager
def quick_imports(*unused: str) -> Iterator[None]:
    """Context manager: import libraries and load a model without what only takes time.

    timm and models on `meta` ask for the compiler of torch, which is not imported. Functions that libraries exclude
    from it meanwhile are not excluded, so this process must not compile. Nothing that is imported becomes garbage, so
    no garbage is searched for, now or when the process ends.

    Args:
        unused: packages that other libraries import if they are there, but that nothing here uses; within the context
            they count as not installed.
    """
    instead: dict[str, Any] = dict.fromkeys(unused)  # None is Python's own way to refuse an import
    instead |= {name: _NoCompiler(name) for name in _COMPILER}
    instead = {name: one for name, one in instead.items() if name not in sys.modules}
    was_enabled = gc.isenabled()
    gc.disable()
    sys.modules.update(instead)
    try:
        yield
    finally:
        for name in instead:
            del sys.modules[name]
        gc.freeze()
        if was_enabled:
            gc.enable()
