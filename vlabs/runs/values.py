"""Options of a config against what the class or function that gets them says of itself."""

from __future__ import annotations

import inspect
import math
import os
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from vlabs.errors import UserError

_FILLED_IN = ("vocab_size", "num_answers", "num_labels", "num_classes")
"""Sizes that are null until the data are known."""
_SIZES = (
    *("depth", "embed_dim", "num_heads", "patch_size", "img_size", "width", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "intermediate_size", "channels", "pictures", *_FILLED_IN),
)
"""Of models; at least 1."""
_TOP: dict[str, Any] = {
    **{"plan": bool, "init": str | None, "init_by": list[str] | None, "ckpt": str, "split": str},
    **{"max_bad_steps": int, "checkpoints.every_minutes": float | None, "checkpoints.every_n_steps": int | None},
}
"""What the options of no group are."""
_SECTIONS = ("checkpoints", "data", "logger", "model", "task", "trainer")
"""What is no value, but has options."""
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def check_values(config: Any, path: str = "") -> None:
    """Check numbers, seeds and simple types of a config, as plain data with interpolations unresolved.

    Raises:
        UserError: a number is not finite, a seed out of range, or an option of a class or function of vlabs' of another
            type than that says.
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
            if inner in _SECTIONS and not isinstance(value, dict):
                raise UserError(f"{inner}={as_given(value)}: {inner} has options, pass {inner}.NAME=VALUE")
            check_values(value, inner)
            least = 0 if name == "num_classes" else 1
            if name in _SIZES and path.startswith("model") and isinstance(value, int) and value < least:
                raise UserError(f"{inner}={as_given(value)} must be a whole number, at least {least}")
            is_count = str(name).startswith(("num_", "every_n_")) and isinstance(value, int) and path != "trainer"
            if (is_count or name == "patience") and isinstance(value, int) and value < 0:
                raise UserError(f"{inner}={value} must be a whole number, at least 0")
            if name == "update_every_n_steps" and isinstance(value, int) and value < 1:
                raise UserError(f"{inner}={value} must be a whole number, at least 1")
            if name == "num_workers" and isinstance(value, int) and value > _most_workers():
                raise UserError(f"{inner}={value} is more than {_most_workers()}, 16 for each CPU of this machine")
            if "dropout" in str(name) and isinstance(value, int | float) and not 0 <= value <= 1:
                raise UserError(f"{inner}={value} must be a share, in [0, 1]")
            if name == "seed" and not _is_open(value):
                check_seed(inner, value)
            hint = hints.get(name, _TOP.get(inner, Any))
            if hint is not Any and not (value is None and name in _FILLED_IN):
                check_type(inner, value, hint)


def _most_workers() -> int:
    return 16 * (os.cpu_count() or 4)


def as_given(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _hints(target: Any) -> dict[str, Any]:
    """What the arguments of a class or function of vlabs' are, by name, and those of what it hands them on to."""
    if not isinstance(target, str) or not target.startswith(_KNOWN) or target == "pytorch_lightning.Trainer":
        return {}
    try:
        found = pkgutil.resolve_name(target)
    except Exception:  # said where it is made
        return {}
    # What a class or a function does not name itself it hands on to what it is made of, or makes.
    own = {} if inspect.isclass(found) else typing.get_type_hints(found)
    made = own.get("return", found)
    kinds = reversed(made.__mro__) if inspect.isclass(made) else ()
    makers = [vars(kind).get("__init__", object) for kind in kinds if kind.__module__.startswith(_KNOWN)]
    return {name: hint for maker in makers for name, hint in _types(maker).items()} | own


def _types(maker: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(maker)
    except NameError:  # one of a library's is there for type checkers alone
        return {}


_KNOWN = ("vlabs.", "pytorch_lightning.")


def check_type(path: str, value: Any, hint: Any) -> None:
    """Raise a UserError if an option is not of a type, as far as that is of numbers, truth values, texts and lists."""
    if get_origin(hint) in (dict, Mapping) and isinstance(value, dict):
        for name, item in value.items():
            check_type(f"{path}.{name}", item, get_args(hint)[1])
    elif not _fits(value, hint):
        raise UserError(f"{path}={as_given(value)} must be {_words(hint)}")


def _is_open(value: Any) -> bool:
    """Whether it is an interpolation, or missing."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _fits(value: Any, hint: Any) -> bool:
    if _is_open(value):
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
    if origin in (dict, Mapping) or str(getattr(hint, "__module__", "")).startswith("vlabs."):
        return isinstance(value, dict)  # with options, or of what makes it
    if hint is str:  # a name may look like a number
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    return True


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(one) for one in inner))
    if origin is Literal:
        return f"one of {', '.join(map(as_given, inner))}"
    if origin in (dict, Mapping) or str(getattr(hint, "__module__", "")).startswith("vlabs."):
        return "a group of options"
    if origin is not None and inner:
        return f"a list, each item {_words(inner[0])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def check_seed(name: str, value: Any) -> None:
    """Raise a UserError unless an option is a seed: numpy and torch take these."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
        raise UserError(f"{name}={as_given(value)} must be a whole number from 0 to {2**32 - 1}")
