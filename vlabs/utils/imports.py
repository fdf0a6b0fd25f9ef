"""Imports of large libraries, for commands that take seconds."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

DYNAMO = {"torch._dynamo.utils": "is_compile_supported"}
"""torch's compiler, which torchvision imports: a second, for nothing where nothing is compiled."""


class _Later(ModuleType):
    """A module that is imported when its named function is called, or anything else of it is asked for."""

    def __init__(self, name: str, function: str) -> None:
        super().__init__(name)
        self.function = function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of all modules by inspect
            raise AttributeError(name)
        return self._call if name == self.function else getattr(self._module(), name)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._module(), self.function)(*args, **kwargs)

    def _module(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


@contextmanager
def quick_imports(*unused: str, later: Mapping[str, str] | None = None) -> Iterator[None]:
    """Context manager: import without what only takes time.

    Nothing that is imported becomes garbage, so no garbage is searched for, now or when the process ends.

    Args:
        unused: packages that other libraries import if they are there, but that nothing here uses; within the context
            they count as not installed.
        later: modules from which other libraries import one function that they hardly call, with its name.
    """
    instead: dict[str, Any] = dict.fromkeys(unused) | {name: _Later(name, one) for name, one in (later or {}).items()}
    instead = {name: module for name, module in instead.items() if name not in sys.modules}
    was_enabled = gc.isenabled()
    gc.disable()
    sys.modules.update(instead)  # None is Python's own way to refuse an import
    try:
        yield
    finally:
        for name, module in instead.items():
            if sys.modules.get(name, module) is module:
                del sys.modules[name]
        gc.freeze()
        if was_enabled:
            gc.enable()
