"""Check the options of a config against the annotations of the class or function that gets them."""

from __future__ import annotations

import math
import pkgutil
import re
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from vlabs.errors import UserError
from vlabs.utils.options import (
    HYDRAS,
    Count,
    Part,
    Positive,
    Seed,
    Size,
    annotations_of,
    as_given,
    check_names,
    check_type,
    defaults_of,
    options_of,
)

_FILLED_IN = ("vocab_size", "num_answers", "num_labels", "num_classes")
"""Sizes that may be null, because they are filled in from the data."""


class Checkpoints(TypedDict):
    """How often `last.ckpt` is saved, besides before and after each validation.

    Attributes:
        every_minutes: minutes between two saves; null for no saves between validations.
        every_n_steps: optimizer steps between two saves, instead of minutes.
    """

    every_minutes: Positive | None
    every_n_steps: Size | None


class Ranker(TypedDict, total=False):
    """How `task=retrieval` ranks.

    Attributes:
        name: `exact` scores all pairs, `shortlist` the k best pairs by ξ of each image and of each caption,
            `similarity` none: pairs are ranked by ξ.
        batch_size: number of pairs scored at a time; on a CPU about 8 is fastest.
        captions_in_memory: number of encoded captions held at a time; images are encoded again for each such part.
        scores: folder of the scores, from which a stopped ranking resumes; null for outputs/scores/KEY, where KEY
            depends on checkpoint, data, split and precision.
        k: length of a shortlist.
    """

    name: Literal["exact", "shortlist", "similarity"]
    batch_size: Size
    captions_in_memory: Size
    scores: str | None
    k: Size


_OWNERS = {"ranker": Ranker}


class ProgramOptions(TypedDict):
    """The options of `vlabs train` and `vlabs evaluate` that belong to no group.

    Attributes:
        seed: seed of the weights, the shuffling and all other random numbers.
        init: checkpoint or run folder whose weights a training starts from.
        init_by: overrides of the training that makes the run folder in `init`, if it is not there yet.
        plan: only print what the run will cost, from a few measured steps.
        resume: run folder of the run to resume, with its own config.
        max_bad_steps: largest number of steps to skip because their gradient is not finite; then the run stops.
        checkpoints: how often `last.ckpt` is saved.
        ckpt: run folder, checkpoint, export or released METER file to evaluate.
        split: `val`, `minival`, `test`, `test-dev`, or any other split of the data.
        keep: share of the patches in the second pass, those most similar to ξ; null for the checkpoint's own.
        overwrite: repeat an evaluation that is already in `hydra.run.dir`.
        tokenizer: hub name or local folder of the RoBERTa of a released file.
    """

    seed: Seed
    init: str | None
    init_by: list[str] | None
    plan: bool
    resume: str | None
    max_bad_steps: Count
    checkpoints: Checkpoints
    ckpt: str
    split: str
    keep: Part | None
    overwrite: bool
    tokenizer: str | None


_SECTIONS = ("checkpoints", "data", "logger", "model", "task", "trainer")
"""Names in a config that are not options, but have options."""
_KNOWN = ("vlabs.", "pytorch_lightning.")


def check_values(config: Any, path: str = "") -> None:
    """Check a config, as plain data with interpolations unresolved.

    Raises:
        UserError: a number is not finite, or an option does not fit the annotation of its argument
            (`vlabs.utils.options`).
    """
    if isinstance(config, float) and not math.isfinite(config):
        raise UserError(f"{path}={config} must be a finite number")
    if isinstance(config, list):
        for item in config:
            check_values(item, path)
    if isinstance(config, dict):
        target = config.get("_target_") if path else None
        hints = hints_of(target) if path else annotations_of(ProgramOptions)
        for name, value in config.items():
            inner = f"{path}.{name}" if path else str(name)
            if inner in _SECTIONS and not isinstance(value, dict):
                raise UserError(f"{inner}={as_given(value)}: {inner} has options, pass {inner}.NAME=VALUE")
            check_values(value, inner)
            if inner in _OWNERS and isinstance(value, dict):
                check_type(inner, value, _OWNERS[inner])
            hint = hints.get(name, Any)
            if hint is not Any and not (value is None and name in _FILLED_IN):
                check_type(inner, value, hint)
        if target is None and re.fullmatch(r"callbacks\.[^.]+", path):
            raise UserError(f"{path} names no class: pass +{path}._target_=..., or null for none")
        if target is None and "_target_" in config and len(config) > 1:
            raise UserError(f"there is no option {path}.{[*config][-1]}: {path} has none here")
        found = _found(target)
        if check_options := getattr(found, "check_options", None):  # of data
            check_options({name: value for name, value in config.items() if name not in (*HYDRAS, "dir")})
        elif found is not None:
            check_names(path, config, found)


def may_be_new(name: str, section: Mapping[str, Any]) -> bool:
    """Whether an option (`task.gamma`) that its section of a config does not have may be added to it: False if the
    class of the section is known not to take it.
    """
    try:
        if (found := _found(section.get("_target_"))) is not None:
            check_names("", [name.rpartition(".")[2]], found)
    except UserError:
        return False
    return True


def hints_of(target: Any) -> dict[str, Any]:
    """The annotations of the arguments of a class or function, by name, with those that it passes on.

    Args:
        target: `_target_` of a config; empty for classes that are not vlabs' or Lightning's.
    """
    found = _found(target)
    return {} if found is None else options_of(found)


def with_newer(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A config with those options of another that are newer than itself, at their defaults.

    Args:
        old, new: configs as plain data; options that only `new` has are taken as newer where the class is the same.
    """
    same = _found(new.get("_target_")) if new.get("_target_") == old.get("_target_") else None
    defaults = {} if same is None else defaults_of(same)
    filled = dict(old)
    for name, value in new.items():
        if name not in old and name in defaults:
            default = defaults[name]
            filled[name] = list(default) if isinstance(default, tuple) else default
        elif isinstance(value, Mapping) and isinstance(old.get(name), Mapping):
            filled[name] = with_newer(old[name], value)
    return filled


def is_newer(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a config lacks an option (`data.blind`) that the class in its section has."""
    *sections, last = name.split(".")
    part: Any = config
    for section in sections:
        part = part.get(section) if isinstance(part, Mapping) else None
    return isinstance(part, Mapping) and last not in part and last in hints_of(part.get("_target_"))


def _found(target: Any) -> Any:
    """The class or function that a config names; None if it is not vlabs' or Lightning's, or does not exist."""
    if not isinstance(target, str) or not target.startswith(_KNOWN) or target == "pytorch_lightning.Trainer":
        return None
    try:
        return pkgutil.resolve_name(target)
    except Exception:  # reported when it is made
        return None
