"""What configs look up: the default folders of runs and evaluations, each new and named by what it is of; rates."""

from __future__ import annotations

import contextlib
import itertools
import re
import unicodedata
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlabs.utils.ranks import is_rank_zero

_LONGEST = 80  # characters of a part of a name


def new_run(base: str, root: DictConfig) -> str:
    """`BASE/TASK/DATA_TIME`, as `${new_run:BASE}` of a config of `vlabs train`."""
    return _new_folder(Path(base, plain_name(_choice(root, "task"))), _data_name(root))


def new_sweep(base: str, root: DictConfig) -> str:
    """`BASE/TASK-DATA_TIME` without what the sweep is over, as `${new_sweep:BASE}`."""
    swept = {item.partition("=")[0] for item in _option(root, "hydra.overrides.task") or () if "," in item}
    task = "" if "task" in swept else _choice(root, "task")
    return _new_folder(Path(base), task, "" if "data" in swept else _data_name(root))


def new_evaluation(base: str, root: DictConfig) -> str:
    """`BASE/CHECKPOINT-TASK-SPLIT_TIME`, as `${new_evaluation:BASE}` of a config of `vlabs evaluate`."""
    of = _checkpoint_name(str(_option(root, "ckpt") or ""))
    return _new_folder(Path(base), of, _choice(root, "evaluation@task"), str(_option(root, "split") or ""))


def plain_name(text: str) -> str:
    """A text in letters, digits, `.`, `_` and `-`, which need no quotes on any command line."""
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_only).strip(".-")[:_LONGEST]


def _new_folder(base: Path, *parts: str) -> str:
    """Make a folder that was not there; processes that begin in the same second get one each."""
    name = "-".join(part for part in map(plain_name, parts) if part)
    name = f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}".lstrip("_")
    folder = base / name
    if not is_rank_zero():
        return str(folder)  # of no use: a run's folder is the first process's
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            folder = base / f"{name}_{number}"
        except OSError:
            break  # Hydra makes it as well, and what it says is made a sentence
        else:
            break
    return str(folder)


def _option(root: DictConfig, key: str) -> Any:
    """An option's value; None where it has none yet, or a wrong one, which others say."""
    with contextlib.suppress(OmegaConfBaseException):
        return OmegaConf.select(root, key, throw_on_missing=False)
    return None


def _choice(root: DictConfig, group: str) -> str:
    return str((_option(root, "hydra.runtime.choices") or {}).get(group) or "")


def _data_name(root: DictConfig) -> str:
    """The choice of the group `data`, and the folder where it is not called so."""
    chosen, folder = _choice(root, "data"), Path(str(_option(root, "data.dir") or "")).name
    return folder if folder.startswith(chosen) else f"{chosen}-{folder}".strip("-")


def _checkpoint_name(ckpt: str) -> str:
    """The run that a checkpoint is of, or what its file or folder is called."""
    if not ckpt:
        return ""
    path = Path(ckpt)
    if path.parent.name == "checkpoints":
        return path.parent.absolute().parent.name
    return path.stem if path.suffix in (".ckpt", ".safetensors", ".pth", ".pt") else path.absolute().name


def _register(find: Callable[[str, DictConfig], str]) -> None:
    """Make a function a resolver of a config, which keeps its value; Hydra hands that on to the runs of a sweep."""

    def resolver(base: str, *, _root_: DictConfig) -> str:
        known: dict[Any, str] = OmegaConf.get_cache(_root_)[find.__name__]
        if base not in known:
            known[base] = find(base, _root_)
        return known[base]

    OmegaConf.register_new_resolver(find.__name__, resolver, replace=True)


def rate_of(part: str, new: float, trained: float, *, _root_: DictConfig) -> float:
    """A learning rate for a part of the model, as `${rate_of:PART,NEW,TRAINED}`: is it pre-trained, which its config
    says by naming weights?"""
    chosen = _option(_root_, f"model.{part}") or {}
    return trained if chosen.get("weights") or chosen.get("name_or_path") else new


OmegaConf.register_new_resolver("rate_of", rate_of, replace=True)
for _find in (new_run, new_sweep, new_evaluation):
    _register(_find)
