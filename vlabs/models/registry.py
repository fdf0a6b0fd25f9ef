"""Architectures as plain data: what a checkpoint stores, and the only classes and arguments that it can name.

A class under `@register` remembers the arguments it was built with as `module.spec`, a JSON-able dictionary with the
class name under `"class"` and nested modules as nested specs. `build(spec)` builds the module again. Names are looked
up in this registry only: an import path in a file is never followed. An argument must be one that the class
declares, of the type that it declares; a class that takes others (`**options`) checks them against a list of its own.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from vlabs.errors import UserError, one_line
from vlabs.utils.options import checked, fits
from vlabs.utils.plugins import load_plugins

_CLASSES: dict[str, type[nn.Module]] = {}
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_LARGEST = 2**20  # of a number in an architecture
_LARGEST_VOCABULARY = 2**24
_COUNTS = re.compile(r"num_|depth|heads|size|dim|width|pictures")  # in the names of numbers that are not below 0


def register(cls: type[ModuleT]) -> type[ModuleT]:
    """Class decorator: make `cls` buildable from a spec, and its instances remember theirs."""
    signature = inspect.signature(cls.__init__)
    original_init = checked(cls.__name__)(cls).__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])  # without self
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name))
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                del arguments[name]  # of nn.Module's own __init__, which takes none
        self.spec = {"class": cls.__name__} | {name: _to_plain(value) for name, value in arguments.items()}

    cls.__init__ = init  # type: ignore[method-assign]
    _CLASSES[cls.__name__] = cls
    return cls


def registered_names() -> set[str]:
    """The registered classes by their import paths."""
    return {f"{cls.__module__}.{cls.__qualname__}" for cls in _CLASSES.values()}


def _to_plain(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return value.spec
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"an architecture is plain data: {type(value).__name__} cannot be written to a checkpoint")


def build(spec: dict[str, Any]) -> nn.Module:
    """Build the module that a spec describes, with fresh weights.

    Raises:
        UserError: the spec names a class or an argument that vlabs does not have, or an argument is of another type.
    """
    cls = class_of(spec)
    _check_arguments(cls, spec)
    arguments = {key: build(value) if _is_spec(value) else value for key, value in spec.items() if key != "class"}
    try:
        return cls(**arguments)
    except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"the checkpoint's {cls.__name__} cannot be built: {one_line(str(error))}") from None


def _is_spec(value: Any) -> bool:
    return isinstance(value, dict) and "class" in value


def class_of(spec: Any) -> type[nn.Module]:
    """The registered class that a spec names.

    Raises:
        UserError: it names none.
    """
    if not _is_spec(spec):
        raise UserError("the checkpoint's architecture is not a vlabs spec (no 'class' in it)")
    name = spec["class"]
    if not isinstance(name, str):
        raise UserError("the checkpoint's architecture is not a vlabs spec (its 'class' is no name)")
    if name not in _CLASSES:
        load_plugins()
    if name not in _CLASSES:
        raise UserError(
            f"the checkpoint names the class '{name}'; vlabs has: {', '.join(sorted(_CLASSES))}; if it is yours, pass "
            "import=MODULE"
        )
    return _CLASSES[name]


def _check_arguments(cls: type[nn.Module], spec: dict[str, Any]) -> None:
    """Raise a UserError that names the first argument of a spec that the class does not declare with this type."""
    parameters = inspect.signature(cls.__init__).parameters
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    hints: dict[str, Any] = {}
    with suppress(NameError):  # a class of the user's own may be annotated with what is not imported
        hints = get_type_hints(inspect.unwrap(cls.__init__), include_extras=True)
    for name, value in spec.items():
        if name == "class":
            continue
        declared = name in parameters and parameters[name].kind is not inspect.Parameter.VAR_KEYWORD and name != "self"
        if not declared and not open_ended:
            raise UserError(f"the checkpoint's {cls.__name__} has '{name}', which is no option of that class")
        if not _fits(value, hints.get(name, Any) if declared else Any):
            raise UserError(f"the checkpoint's {cls.__name__}.{name} cannot be {_short(value)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a spec has the declared type; numbers must be within the limits of known architectures."""
    if hint is Any:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, one) for one in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, nn.Module):
        return _is_spec(value) and issubclass(class_of(value), hint)
    if hint is str or isinstance(value, str):
        return isinstance(value, str) and (hint is str or value in get_args(hint))
    return fits(value, hint)


def _short(value: Any) -> str:
    text = f"a {value['class']}" if _is_spec(value) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def restore(spec: Any, weights: dict[str, Tensor], left_over: bool = False) -> nn.Module:
    """Build the module that a spec describes and fill it with weights.

    A spec that asks for more memory or time than its weights justify gets none: only shapes are built first.

    Args:
        left_over: allow weights that the module has no place for.

    Raises:
        UserError: the spec names something that vlabs does not have, or weights do not fit it or are not finite.
    """
    try:
        weights = check_spec(spec, weights, left_over)
        wrong = [name for name, value in weights.items() if value.is_floating_point() and not is_finite(value)]
        if wrong:
            raise UserError(f"the weights {wrong[0]} are not finite: they are of a training that failed, or damaged")
        module = build(spec)
        module.load_state_dict(weights)
    except UserError:
        raise
    except Exception as error:  # a spec that was tampered with makes the parts fail in every way there is
        raise UserError(one_line(str(error)) or type(error).__name__) from None
    return module


def check_spec(spec: Any, weights: dict[str, Tensor], left_over: bool = False) -> dict[str, Tensor]:
    """Check weights against the module that a spec describes, of which only shapes are built.

    Args:
        weights: may be on the device `meta`.
        left_over: as in `restore`.

    Raises:
        UserError: as in `restore`.
    """
    model = build_shapes(spec, len(weights))
    if left_over:
        weights = {name: weights[name] for name in model.state_dict() if name in weights}
    _check_shapes(model, weights)
    return weights


def build_shapes(spec: Any, weights: int) -> nn.Module:
    """Build the module that a spec describes on the device `meta`: a file may ask for any architecture.

    Args:
        weights: how many weights the file has, which bounds the parameters.

    Raises:
        UserError: as in `restore`.
    """
    class_of(spec)
    _check_numbers(spec)
    with torch.device("meta"), no_more_parameters_than(4 * weights + 100):
        return build(spec)


def is_finite(value: Tensor) -> bool:
    """Whether all values of a float tensor are finite."""
    # The sum is cheaper and nearly always enough, but it may overflow where every value is finite.
    return math.isfinite(value.float().sum()) or bool(value.float().isfinite().all())


def _check_numbers(value: Any, name: str = "") -> None:
    """Raise a UserError for a number that no architecture has."""
    items = value.items() if isinstance(value, dict) else [(name, one) for one in value]
    for key, one in items:
        if isinstance(one, dict | list | tuple):
            _check_numbers(one, key)
        elif isinstance(one, int | float):
            most = _LARGEST_VOCABULARY if "vocab" in key else _LARGEST
            if not math.isfinite(one) or abs(one) > most or (one < 0 and _COUNTS.search(key)):
                raise UserError(f"the checkpoint's {key}={_short(one)} is out of range")


@contextmanager
def no_more_parameters_than(most: int) -> Iterator[None]:
    """Context manager: raise a UserError as soon as more parameters are created."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise UserError("its architecture has many more parameters than the file has weights")

    hook = register_module_parameter_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def _check_shapes(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise a UserError for weights that are missing, left over or of another shape, and for huge buffers."""
    wanted = model.state_dict()
    wrong = [name for name in wanted if name not in weights or weights[name].shape != wanted[name].shape]
    wrong += [name for name in weights if name not in wanted]
    if wrong:
        raise UserError(f"{len(wrong)} weights are missing, left over or of another shape: {', '.join(wrong[:5])}")
    wrong = [name for name, value in wanted.items() if value.is_floating_point() != weights[name].is_floating_point()]
    if wrong:
        raise UserError(f"the weights {wrong[0]} are of the type {weights[wrong[0]].dtype}")
    held = sum(value.nbytes for value in weights.values())
    if sum(buffer.nbytes for buffer in model.buffers()) > 4 * held + 2**28:
        raise UserError("its architecture asks for many times the memory of its weights")
