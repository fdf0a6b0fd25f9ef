"""Folders of runs and evaluations: names after their content, as resolvers for configs, and no empty ones left behind.

Also the resolver of learning rates.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import unicodedata
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlabs.utils.ranks import is_rank_zero

_LONGEST = 80  # largest number of characters in a part of a name


def new_run(base: str, root: DictConfig) -> str:
    """`BASE/TASK/DATA_TIME`, as `${new_run:BASE}` of a config of `vlabs train`."""
    return _new_folder(Path(base, plain_name(_choice(root, "task"))), _data_name(root))


def new_sweep(base: str, root: DictConfig) -> str:
    """`BASE/TASK-DATA_TIME`, without the groups that are swept over, as `${new_sweep:BASE}`."""
    swept = {item.partition("=")[0] for item in _option(root, "hydra.overrides.task") or () if "," in item}
    task = "" if "task" in swept else _choice(root, "task")
    return _new_folder(Path(base), task, "" if "data" in swept else _data_name(root))


def new_evaluation(base: str, root: DictConfig) -> str:
    """`BASE/CHECKPOINT-TASK-SPLIT_TIME`, as `${new_evaluation:BASE}` of a config of `vlabs evaluate`."""
    of = _checkpoint_name(str(_option(root, "ckpt") or ""))
    return _new_folder(Path(base), of, _choice(root, "evaluation@task"), str(_option(root, "split") or ""))


def plain_name(text: str) -> str:
    """Reduce a string to letters, digits, `.`, `_` and `-`, which need no quotes in any shell."""
    ascii_only = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", ascii_only).strip(".-")[:_LONGEST]


def _new_folder(base: Path, *parts: str) -> str:
    """Make a new folder; processes that start in the same second get different ones."""
    name = "-".join(part for part in map(plain_name, parts) if part)
    name = f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}".lstrip("_")
    folder = base / name
    will_make(folder)
    if not is_rank_zero():
        return str(folder)  # not used: the folder of the run is that of the first process
    for number in itertools.count(2):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            folder = base / f"{name}_{number}"
            will_make(folder)
        except OSError:
            break  # Hydra will try again, and its error becomes the message
        else:
            break
    return str(folder)


def will_make(folder: str | Path) -> None:
    """Remember a folder that is made next, and the missing folders above it, for `remove_empty`."""
    folder = Path(os.path.abspath(folder))
    _made.update([folder, *(above for above in folder.parents if not above.exists())])


def remove_empty() -> None:
    """Remove the folders of `will_make` that hold no file, or only Hydra's own multirun.yaml, and forget all."""
    for folder in sorted(_made, key=lambda one: len(one.parts), reverse=True):
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            if [path.name for path in folder.iterdir()] == ["multirun.yaml"]:
                (folder / "multirun.yaml").unlink()
            folder.rmdir()
    _made.clear()


_made: set[Path] = set()  # folders that this command makes, with all above them


def _option(root: DictConfig, key: str) -> Any:
    """An option's value; None if it has none yet, or a wrong one, which is reported elsewhere."""
    with contextlib.suppress(OmegaConfBaseException):
        return OmegaConf.select(root, key, throw_on_missing=False)
    return None


def _choice(root: DictConfig, group: str) -> str:
    return str((_option(root, "hydra.runtime.choices") or {}).get(group) or "")


def _data_name(root: DictConfig) -> str:
    """The choice of the group `data`, and the folder's name if it does not start with it."""
    chosen, folder = _choice(root, "data"), Path(str(_option(root, "data.dir") or "")).name
    return folder if folder.startswith(chosen) else f"{chosen}-{folder}".strip("-")


def _checkpoint_name(ckpt: str) -> str:
    """The name of the run that a checkpoint belongs to, or of its file or folder."""
    if not ckpt:
        return ""
    path = Path(ckpt)
    if path.parent.name == "checkpoints":
        return path.parent.absolute().parent.name
    return path.stem if path.suffix in (".ckpt", ".safetensors", ".pth", ".pt") else path.absolute().name


def _register(find: Callable[[str, DictConfig], str]) -> None:
    """Register a function as a resolver of configs that keeps its value; Hydra passes it on to the runs of a sweep."""

    def resolver(base: str, *, _root_: DictConfig) -> str:
        known: dict[Any, str] = OmegaConf.get_cache(_root_)[find.__name__]
        if base not in known:
            known[base] = find(base, _root_)
        return known[base]

    OmegaConf.register_new_resolver(find.__name__, resolver, replace=True)


def rate_of(part: str, new: float, trained: float, *, _root_: DictConfig) -> float:
    """The learning rate of a part of the model, as `${rate_of:PART,NEW,TRAINED}`: `trained` if its config names
    pre-trained weights, else `new`."""
    chosen = _option(_root_, f"model.{part}") or {}
    return trained if chosen.get("weights") or chosen.get("name_or_path") else new


OmegaConf.register_new_resolver("rate_of", rate_of, replace=True)
for _find in (new_run, new_sweep, new_evaluation):
    _register(_find)
