"""Check the config of a run folder: it may come from someone else, and Hydra calls whatever `_target_` names.

A run that is resumed (`resume=RUN`) or repeated (`--config-dir=RUN --config-name=config`) reads its whole config from
its folder. There `_target_` may name what vlabs' own configs name, registered parts of models, and Lightning's trainer,
callbacks and similar classes. Other names must be allowed on the command line, by `import=MODULE` or by the option.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser

from vlabs.errors import UserError
from vlabs.utils.plain import is_inside, parse_config, read_text
from vlabs.utils.plugins import plugins

_EARLIER = {"vlabs.checkpoints.pretrained.roberta_from_pretrained"}  # in configs of earlier runs
_OVERRIDE = re.compile(r"[+~]*[\w./@]+=.*", re.S)


def check_config(arguments: Sequence[str], program: str, own: Path) -> list[str]:
    """Check the config file of a Hydra program, if it is not one of vlabs' own.

    Args:
        arguments: arguments of the command line.
        program: the program's default config.
        own: folder of vlabs' configs.

    Returns:
        The arguments, with `import=` in a form that Hydra reads.

    Raises:
        UserError: it names something that is not allowed, or is not plain data; the message says how to allow it.
    """
    arguments = [_as_option(item) for item in arguments]
    given = get_args_parser().parse_known_args(arguments)[0]
    if given.experimental_rerun is not None:
        raise UserError(
            "--experimental-rerun reads a pickle, which may run any code: name the config, --config-dir=RUN"
        )
    if given.config_name is None and given.config_path is None:
        return arguments
    name = (given.config_name or program).removesuffix(".yaml")
    trusted = _trusted(arguments)
    for folder in (given.config_path or own, given.config_dir):
        if folder is not None and (file := Path(folder) / f"{name}.yaml").exists():
            if is_inside(file, own):
                return arguments  # Hydra searches in the same order
            _check_file(file, own, trusted)
    return arguments


def _as_option(argument: str) -> str:
    """Turn `import=MODULE` (formerly `trust=MODULE`) into an option that any config accepts."""
    if not (found := re.match(r"\+*(?:import|trust)=", argument)):
        return argument
    return f"++import=[{','.join(re.findall(_NAME, argument[found.end() :]))}]"


_NAME = r"[\w.]+"


def _trusted(arguments: Sequence[str]) -> set[str]:
    """Names that the command line allows (modules, and classes in options with `_target_`), and those of plugins."""
    names = {plugin.module for plugin in plugins()}
    for item in arguments:
        if item.startswith("++import="):
            names |= set(re.findall(_NAME, item.removeprefix("++import=")))
        elif "_target_" in item:
            names |= set(re.findall(_NAME, item.split("_target_", 1)[1]))
    return names


def _check_file(path: Path, own: Path, trusted: set[str]) -> None:
    text = read_text(path)
    if re.search(r"^\s*#\s*@", text, re.M):
        raise UserError(f"{path} has a package directive (# @package), which a run's config must not have")
    content = parse_config(text, str(path))
    for key in ("hydra", "defaults", "import"):
        if key in content:
            raise UserError(f"{path} has '{key}', which decides what is read and run: a run's config must not have it")
    for key in _GROUPS:
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{path} is damaged: its {key} is {content[key]!r:.40}, not a group of options")
    for where, value in _texts(content):
        if where.rpartition(".")[2] == "_target_":
            if value is not None and not _is_allowed(str(value), own, trusted):
                module = str(value).rpartition(".")[0]
                raise UserError(
                    f"{path} names {value} ({where}), which is not part of vlabs or Lightning: if it is yours, pass "
                    f"import={module or value}"
                )
        elif isinstance(value, str) and _LOOKED_UP.search(value):
            raise UserError(f"{path} has {where}={value}, an interpolation: a run's config must be plain data")
    for item in content.get("init_by") or []:
        # These are arguments of another training that will be run.
        if not isinstance(item, str) or not _OVERRIDE.fullmatch(item) or re.search(_UNSAFE, item):
            raise UserError(f"{path} has init_by={item}, which is not a plain option: pass init_by=null, or your own")


_GROUPS = ("task", "model", "data", "trainer", "callbacks", "logger", "checkpoints")
_LOOKED_UP = re.compile(r"(?<!\\)(?:\\\\)*\$\{")
_UNSAFE = r"^[+~]*(hydra|import|trust|resume)\b|_target_"


def _texts(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all values that are not dictionaries or lists, and all `_target_`s, with their places."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            place = f"{where}.{key}" if where else str(key)
            if key == "_target_":
                yield place, inner
            else:
                yield from _texts(inner, place)
    else:
        yield where, value


def _is_allowed(name: str, own: Path, trusted: set[str]) -> bool:
    if name in _own_targets(own) or name in _EARLIER or _is_registered(name):
        return True
    return any(name == one or name.startswith(f"{one}.") for one in trusted) or _is_lightning(name)


def _is_registered(name: str) -> bool:
    from vlabs.models.registry import registered_names

    return name.startswith("vlabs.") and name in registered_names()


@functools.cache
def _own_targets(own: Path) -> set[str]:
    """The names that vlabs' own configs have as `_target_`."""
    files = own.rglob("*.yaml")
    return {name for file in files for name in re.findall(r"_target_: *([\w.]+)", file.read_text(encoding="utf-8"))}


def _is_lightning(name: str) -> bool:
    """Whether a name is one of Lightning's parts. Only Lightning's own modules are imported for this."""
    from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment
    from pytorch_lightning import Callback, Trainer
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.plugins import Precision
    from pytorch_lightning.profilers import Profiler
    from pytorch_lightning.strategies import Strategy

    parts = (Callback, Trainer, Logger, Profiler, Strategy, Precision, CheckpointIO, ClusterEnvironment)
    module, _, last = name.rpartition(".")
    if not re.fullmatch(r"pytorch_lightning(\.[a-z]\w*)*", module):
        return False
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ImportError:
        return False
    return isinstance(found, type) and issubclass(found, parts)
