"""Architectures as plain data: what a checkpoint carries, and the only classes it can name.

A class under `@register` remembers the arguments it was built with as `module.spec`, a JSON-able dictionary with the
class name under `"class"` and nested modules as nested specs. `build(spec)` makes the module again. Names are looked up
in this registry alone: an import path written in a file is never followed.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlabs.errors import UserError

_CLASSES: dict[str, type[nn.Module]] = {}
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def register(cls: type[ModuleT]) -> type[ModuleT]:
    """Class decorator: make `cls` buildable from a spec, and its instances remember theirs."""
    signature = inspect.signature(cls.__init__)
    original_init = cls.__init__

    @functools.wraps(original_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        arguments = dict(list(bound.arguments.items())[1:])
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(name))
            elif parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                del arguments[name]  # of nn.Module's own __init__, which takes none
        self.spec = {"class": cls.__name__} | {name: _to_plain(value) for name, value in arguments.items()}

    cls.__init__ = init  # type: ignore[method-assign]
    _CLASSES[cls.__name__] = cls
    return cls


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
        UserError: the spec names a class or an argument that vlabs does not have.
    """
    if not isinstance(spec, dict) or "class" not in spec:
        raise UserError("the checkpoint's architecture is not a vlabs spec (no 'class' in it)")
    name = spec["class"]
    if name not in _CLASSES:
        raise UserError(f"the checkpoint names the class '{name}'; vlabs has: {', '.join(sorted(_CLASSES))}")
    arguments = {
        key: build(value) if isinstance(value, dict) and "class" in value else value
        for key, value in spec.items()
        if key != "class"
    }
    try:
        return _CLASSES[name](**arguments)
    except TypeError as error:
        raise UserError(f"the checkpoint's {name} cannot be built: {error}") from None


def restore(spec: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """Build the module that a spec describes and fill it with weights.

    Raises:
        UserError: the spec names what vlabs does not have.
        RuntimeError: weights are missing, left over or of another shape.
    """
    with torch.device("meta"):
        # Shapes alone: a spec that asks for more memory than there are weights for gets none.
        _check_shapes(build(spec), weights)
    module = build(spec)
    module.load_state_dict(weights)
    return module


def _check_shapes(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise a RuntimeError that names the first weights that are missing, left over or of another shape."""
    wanted = {name: value.shape for name, value in model.state_dict().items()}
    wrong = [name for name in wanted if name not in weights or weights[name].shape != wanted[name]]
    wrong += [name for name in weights if name not in wanted]
    if wrong:
        raise RuntimeError(f"{len(wrong)} weights are missing, left over or of another shape: {', '.join(wrong[:5])}")
