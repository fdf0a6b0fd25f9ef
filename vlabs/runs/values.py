"""Options of a config against what the class or function that gets them says of itself."""

from __future__ import annotations

import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from vlabs.errors import UserError

_FILLED_IN = ("vocab_size", "num_answers", "num_labels", "num_classes")
"""Sizes that are null until the data are known."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def check_values(config: Any, path: str = "") -> None:
    """Check numbers and simple types of a config, as plain data with interpolations unresolved.

    Raises:
        UserError: a number is not finite, or an option of a class or function of vlabs' is of another type than it says.
    """
    if isinstance(config, float) and not math.isfinite(config):
        raise UserError(f"{path}={config} must be a finite number")
    if isinstance(config, list):
        for item in config:
            check_values(item, path)
    if isinstance(config, dict):
        hints = _hints(config.get("_target_"))
        for name, value in config.items():
            inner = f"{path}.{name}" if path else str(name)
            check_values(value, inner)
            if name in hints and not (value is None and name in _FILLED_IN):
                _check(value, hints[name], inner)


def as_given(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _hints(target: Any) -> dict[str, Any]:
    """What the arguments of a class or function of vlabs' are, by name."""
    if not isinstance(target, str) or not target.startswith("vlabs."):
        return {}
    try:
        found = pkgutil.resolve_name(target)
        # What a class does not name itself it hands on to those that it is made of.
        makers = [kind.__init__ for kind in reversed(found.__mro__)] if inspect.isclass(found) else [found]
        return {name: hint for maker in makers for name, hint in typing.get_type_hints(maker).items()}
    except Exception:  # whatever is wrong with it is said where it is made
        return {}


def _check(value: Any, hint: Any, path: str) -> None:
    if get_origin(hint) in (dict, Mapping) and isinstance(value, dict):
        for name, item in value.items():
            _check(item, get_args(hint)[1], f"{path}.{name}")
    elif not _fits(value, hint):
        raise UserError(f"{path}={as_given(value)} must be {_words(hint)}")


def _fits(value: Any, hint: Any) -> bool:
    if isinstance(value, str) and ("${" in value or value == "???"):
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin in (list, tuple, Sequence):
        return isinstance(value, list) and all(_fits(item, inner[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if hint is str:  # a name may look like a number
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    return True


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in inner))
    if origin is Literal:
        return f"one of {', '.join(map(as_given, inner))}"
    if origin is not None and inner and origin not in (dict, Mapping):
        return f"a list, of each {_words(inner[0])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def check_seed(name: str, value: Any) -> None:
    """Raise a UserError unless an option is a seed: numpy and torch take these."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise UserError(f"{name}={as_given(value)} must be a whole number from 0 to {2**32 - 1}")
