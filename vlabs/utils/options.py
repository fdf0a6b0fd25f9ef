"""Options: the arguments of constructors that a config names, declared once and checked in one place.

`dropout: Share = 0.1` in a signature is an option's type, range and default; the docstring's `Args` is its sentence. A
class with `@checked("model.fusion")` refuses other values, whoever makes it. `vlabs.runs.values` checks a whole config
against the same annotations before anything is made, and `vlabs.runs.reference` prints them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen

from vlabs.errors import UserError

Count = Annotated[int, Ge(0)]
Size = Annotated[int, Ge(1)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
"""The seeds that numpy and torch accept."""
Workers = Annotated[int, Ge(0), Le(16 * (os.cpu_count() or 4))]
"""Processes: at most 16 per CPU of this machine; more would only cost memory."""
Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Le(1)]
ShareBelowOne = Annotated[float, Ge(0), Lt(1)]
Percent = Annotated[float, Ge(0), Le(100)]
MOST_ALPHA = 1e6
Strength = Annotated[float, Ge(0), Le(MOST_ALPHA)]
"""α of the top-down signal; with larger values the signal drowns the tokens."""
Severity = Annotated[int, Ge(1), Le(5)]
Pairs = Annotated[int, Ge(2)]
"""A number of images or pairs, at least two."""
Crop = Annotated[float, Ge(0.05), Le(1)]
"""The share of the shorter side of an image that is seen."""
OpenShare = Annotated[float, Gt(0), Lt(1)]
Part = Annotated[float, Gt(0), Le(1)]


@dataclasses.dataclass(frozen=True)
class NoneTwice:
    """A limit of lists, for `Annotated`: no two items are equal."""


_Item = TypeVar("_Item")
Distinct = Annotated[Sequence[_Item], NoneTwice()]
"""A list in which an item twice would only be measured twice."""
Some = Annotated[Sequence[_Item], MinLen(1), NoneTwice()]
"""The same, of at least one item."""
HYDRAS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
"""Names in a config that are not arguments, but Hydra's."""

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
_Maker = TypeVar("_Maker")


def checked(section: str) -> Callable[[_Maker], _Maker]:
    """Decorator: a class or function refuses arguments that do not fit its annotations.

    Args:
        section: the part of a config with these options, such as `task.recipe`, for messages.
    """

    def of(maker: Any) -> Any:
        call = maker.__init__ if inspect.isclass(maker) else maker
        signature = inspect.signature(call)

        @functools.wraps(call)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind_partial(*args, **kwargs)
            hints = annotations_of(call)
            for name, value in bound.arguments.items():
                if value is not signature.parameters[name].default:
                    check_type(f"{section}.{name}", value, hints.get(name, Any))
                    bound.arguments[name] = _with_text(value, hints.get(name, Any))
            return call(*bound.args, **bound.kwargs)

        if not inspect.isclass(maker):
            return guarded
        maker.__init__ = guarded  # type: ignore[method-assign]
        return maker

    return of


@functools.cache
def annotations_of(call: Any) -> dict[str, Any]:
    """The types of a function's arguments, or of a record's fields, with their ranges; empty if a type is only imported
    for type checking.
    """
    try:
        hints = typing.get_type_hints(call, include_extras=True)
    except NameError:
        return {}
    if dataclasses.is_dataclass(call):  # may be in another module than the fields of its bases
        return {one.name: hints[one.name] for one in dataclasses.fields(call) if one.init}
    return hints


def options_of(kind: Any) -> dict[str, Any]:
    """The annotations of all arguments of a class, by name: its own, those of its bases, and those of the classes in
    `hands_on`, to which it passes other arguments.

    Args:
        kind: a class, or a function that makes one and passes other arguments to it.
    """
    return {name: hint for maker in _makers(kind) for name, hint in annotations_of(maker).items()}


def defaults_of(kind: Any) -> dict[str, Any]:
    """The defaults of the arguments in `options_of`, by name, those that have one."""
    given: dict[str, Any] = {}
    for maker in _makers(kind):
        if dataclasses.is_dataclass(maker):
            given |= {one.name: one.default for one in dataclasses.fields(maker)}
        elif not typing.is_typeddict(maker):
            given |= {name: one.default for name, one in inspect.signature(maker).parameters.items()}
    none = inspect.Parameter.empty, dataclasses.MISSING
    return {name: default for name, default in given.items() if default not in none}


def _makers(kind: Any) -> Iterator[Any]:
    """What declares the arguments of a class or function; later ones replace earlier ones of the same name."""
    made = kind if inspect.isclass(kind) else annotations_of(kind).get("return", kind)
    for one in reversed(made.__mro__) if inspect.isclass(made) else ():
        if one.__module__.startswith(("vlabs.", "pytorch_lightning.")) or "__dataclass_fields__" in vars(one):
            for other in vars(one).get("hands_on", ()):
                yield from _makers(other)
            is_record = hasattr(one, "_fields") or typing.is_typeddict(one) or "__dataclass_fields__" in vars(one)
            maker = one if is_record else vars(one).get("__init__")
            yield from [maker] if maker else []
    yield from [] if inspect.isclass(kind) else [kind]


def check_names(path: str, names: Collection[str], maker: Any) -> None:
    """Check the names of arguments; nothing is checked where a class or function takes any.

    Args:
        path: the section of a config that has them.
        names: of the arguments, and Hydra's own such as `_target_`.
        maker: the class or function that gets them.

    Raises:
        UserError: it has no such argument.
    """
    known = _accepted(maker)
    if known is None:
        return
    for name in names:
        if name not in known and name not in HYDRAS:
            # Without a default, an argument that the config does not have is not an option: vlabs passes it.
            choices = [one for one in known if one in names or known[one].default is not inspect.Parameter.empty]
            if (plain := _without_decorator(maker, name)) is not None:
                raise UserError(
                    f"{path}.{name} is declared in {plain.__name__}, which is no dataclass: write "
                    "@dataclass(eq=False, repr=False, kw_only=True) above it"
                )
            near = difflib.get_close_matches(name, choices, 1, 0.7)
            meant = f" (did you mean {path}.{near[0]}?)" if near else ""
            has = f"choose from {', '.join(choices)}" if choices else f"{path} has none"
            raise UserError(f"there is no option {path}.{name}{meant}: {has}")


def _without_decorator(maker: Any, name: str) -> type | None:
    """The subclass of a dataclass that declares a field but is no dataclass itself."""
    for one in getattr(maker, "__mro__", ()) if dataclasses.is_dataclass(maker) else ():
        if "__dataclass_fields__" in vars(one):
            return None
        if name in inspect.get_annotations(one):
            return one
    return None


def _accepted(maker: Any) -> dict[str, inspect.Parameter] | None:
    """The arguments of a class or function, with those that a constructor passes on to its base; None if any may be
    passed.
    """
    makers = [maker]
    if inspect.isclass(maker):
        makers = [vars(one)["__init__"] for one in maker.__mro__[:-1] if "__init__" in vars(one)]
    known: dict[str, inspect.Parameter] = {}
    for one in makers:
        parameters = dict(inspect.signature(one).parameters)
        parameters.pop("self", None)
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        known = {name: one for name, one in parameters.items() if one.kind in named} | known
        if all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
            return known
    return None if makers else known


def check_type(path: str, value: Any, hint: Any) -> None:
    """Raise a UserError unless the value of an option fits its annotation. Values that are not plain data always fit.

    Args:
        path: the option's name.
        value: the value in a config: a list may stand for a tuple, and a dictionary for an object.
        hint: the annotation: `Literal`, the annotated types above, and unions, lists and dictionaries of them.
    """
    if not fits(value, hint):
        raise UserError(f"{path}={as_given(value)} must be {in_words(hint)}")
    if not isinstance(value, Mapping) or "_target_" in value:
        return
    for kind in (hint, *get_args(hint)) if get_origin(hint) in (None, typing.Union, types.UnionType) else (hint,):
        if get_origin(kind) in (dict, Mapping):
            known, rest = {}, get_args(kind)[1]
        elif _is_ours(kind):
            known, rest = {name: one for name, one in options_of(kind).items() if name != "return"}, None
        else:
            continue
        for name, item in value.items():
            if rest is None and name not in known:
                raise UserError(f"there is no option {path}.{name}: choose from {', '.join(known)}")
            check_type(f"{path}.{name}", item, known.get(name, rest))
        return


def fits(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation. Annotations that are not plain data fit any value."""
    if is_open(value):
        return True
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return fits(value, inner[0]) and all(_is_within(value, limit) for limit in inner[1:])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple and inner[-1] is not ...:
        return isinstance(value, list | tuple) and len(value) == len(inner) and all(map(fits, value, inner))
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping)
    if _is_ours(hint):  # an object, or the options to make it
        return isinstance(value, Mapping | hint) if inspect.isclass(hint) else True
    if hint is str:  # a name may look like a number
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    return True


def _with_text(value: Any, hint: Any) -> Any:
    """A value that fits an annotation, with its numbers as text where this has text: a name may look like a number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _with_text(value, inner[0])
    if origin in (typing.Union, types.UnionType):
        fitting = [one for one in inner if fits(value, one)]
        return _with_text(value, min(fitting, key=lambda one: one is str, default=Any))
    if origin in (list, Sequence) and isinstance(value, list):
        return [_with_text(item, inner[0]) for item in value]
    return str(value) if hint is str and isinstance(value, int | float) else value


def in_words(hint: Any) -> str:
    """The values that an annotation allows, in words: `a whole number, at least 1, or null`."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return in_words(inner[0]) + _limits(inner[0], inner[1:])
    if origin in (typing.Union, types.UnionType):
        first, *others = dict.fromkeys(in_words(one) for one in inner)
        # "a list, each item a word, or null": after a comma, "or" alone would belong to the item.
        return functools.reduce(lambda said, one: f"{said}{',' * (',' in said)} or {one}", others, first)
    if origin is Literal:
        return f"one of {', '.join(map(as_given, inner))}"
    if origin is tuple and inner[-1] is not ...:
        return f"a list of {len(inner)}, each {in_words(inner[0])}"
    if origin in (dict, Mapping) or _is_ours(hint):
        return "a group of options"
    if origin is not None and inner:
        return f"a list, each item {in_words(inner[0])}"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def as_given(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def is_open(value: Any) -> bool:
    """Whether a value is an interpolation or missing."""
    return isinstance(value, str) and ("${" in value or value == "???")


def _is_ours(hint: Any) -> bool:
    return str(getattr(hint, "__module__", "")).startswith("vlabs.")


def _is_within(value: Any, limit: Any) -> bool:
    match limit:
        case Ge(least):
            return bool(value >= least)
        case Gt(least):
            return bool(value > least)
        case Le(most):
            return bool(value <= most)
        case Lt(most):
            return bool(value < most)
        case MinLen(least):
            return len(value) >= least
        case NoneTwice():
            return all(item not in value[:n] for n, item in enumerate(value))
    return True


def _limits(kind: type, limits: Sequence[Any]) -> str:
    of_list = [f"at least {one.min_length} of them" for one in limits if isinstance(one, MinLen)]
    of_list += ["none twice" for one in limits if isinstance(one, NoneTwice)]
    if of_list:
        return f"; {', '.join(of_list)}"
    least = next((one for one in limits if isinstance(one, Ge | Gt)), None)
    most = next((one for one in limits if isinstance(one, Le | Lt)), None)
    if most is not None and isinstance(least, Ge) and kind is int:
        return f" from {least.ge} to {most.le if isinstance(most, Le) else most.lt - 1}"  # type: ignore[operator]
    if most is not None:
        opening = f"({least.gt}" if isinstance(least, Gt) else f"[{least.ge if least else '-inf'}"  # type: ignore[union-attr]
        return f" in {opening}, {f'{most.le}]' if isinstance(most, Le) else f'{most.lt})'}"
    if isinstance(least, Gt):
        return f" above {least.gt}"
    return f", at least {least.ge}" if isinstance(least, Ge) else ""
