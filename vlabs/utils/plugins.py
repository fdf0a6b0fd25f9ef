"""Plug-in modules: those that the command line names, and those that installed packages declare.

A package declares a module by an entry point of the group `vlabs.plugins`. No module named in a file is ever imported.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vlabs.errors import UserError

imported: list[str] = []
"""The modules that the command line named, for the processes that this one starts."""


def import_modules(names: Iterable[str]) -> None:
    """Import the modules of `import=NAME` or `--import NAME`.

    Raises:
        UserError: there is no such module, or it fails.
    """
    for name in names:
        _guarded(f"import={name}", lambda name=name: importlib.import_module(name))  # type: ignore[misc]
        if name not in imported:
            imported.append(name)


def plugins() -> list[EntryPoint]:
    """The entry points of installed packages."""
    return list(entry_points(group="vlabs.plugins"))


@functools.cache
def load_plugins() -> None:
    """Import the plug-ins of installed packages, once.

    Raises:
        UserError: one fails.
    """
    for plugin in plugins():
        _guarded(f"the plugin {plugin.name} ({plugin.value})", plugin.load)


def _guarded(what: str, load: Callable[[], Any]) -> None:
    try:
        load()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"{what} cannot be imported ({said}): VLABS_DEBUG=1 shows where it fails") from error
