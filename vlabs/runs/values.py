"""Options of a config against what the class or function that gets them says of itself."""

from __future__ import annotations

import math
import pkgutil
from typing import Any, Literal, TypedDict

from vlabs.errors import UserError
from vlabs.utils.options import Count, Part, Positive, Seed, Size, annotations_of, as_given, check_type, options_of

_FILLED_IN = ("vocab_size", "num_answers", "num_labels", "num_classes")
"""Sizes that are null until the data are known."""


class Checkpoints(TypedDict):
    """How often `last.ckpt` is saved beside before and after every validation.

    Attributes:
        every_minutes: minutes from one to the next; null for none in between.
        every_n_steps: optimizer steps from one to the next, instead of minutes.
    """

    every_minutes: Positive | None
    every_n_steps: Size | None


class Ranker(TypedDict, total=False):
    """How `task=retrieval` ranks.

    Attributes:
        name: `exact` scores every pair, `shortlist` the k best by ξ of every image and every caption.
        batch_size: pairs that are scored at a time; on a CPU about 8 is faster.
        captions_in_memory: encoded captions held at a time; every image is encoded again for each such part.
        scores: folder of the scores, where a stopped run is resumed; null for outputs/scores/KEY, with a KEY of
            checkpoint, data, split and precision.
        k: length of a shortlist.
    """

    name: Literal["exact", "shortlist"]
    batch_size: Size
    captions_in_memory: Size
    scores: str | None
    k: Size


_OWNERS = {"ranker": Ranker}


class ProgramOptions(TypedDict):
    """The options of `vlabs train` and `vlabs evaluate` that are of no group.

    Attributes:
        seed: seed of the weights, the shuffling and all else that is drawn.
        init: the checkpoint or run folder whose weights a training starts from.
        init_by: overrides of the training that makes the run folder of `init`, where it is not there yet.
        plan: only say what the run will cost, from a few measured steps.
        resume: the run folder to go on with, in its own config.
        max_bad_steps: steps whose gradient is not finite that may be left out before a run stops.
        checkpoints: how often `last.ckpt` is saved.
        ckpt: the run folder, checkpoint, export or released METER file that is evaluated.
        split: `val`, `minival`, `test`, `test-dev`, or any other split of the data.
        keep: share of the patches that are looked at twice, those most like ξ; null for the checkpoint's own.
        overwrite: whether an evaluation that is in `hydra.run.dir` already is made again.
        tokenizer: RoBERTa of a released file, a hub name or a local folder.
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
"""What is no value, but has options."""
_KNOWN = ("vlabs.", "pytorch_lightning.")


def check_values(config: Any, path: str = "") -> None:
    """Check a config, as plain data with interpolations unresolved.

    Raises:
        UserError: a number is not finite, or an option is not as the annotations of the class or function that gets it
            say (`vlabs.utils.options`).
    """
    if isinstance(config, float) and not math.isfinite(config):
        raise UserError(f"{path}={config} must be a finite number")
    if isinstance(config, list):
        for item in config:
            check_values(item, path)
    if isinstance(config, dict):
        hints = hints_of(config.get("_target_")) if path else annotations_of(ProgramOptions)
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


def hints_of(target: Any) -> dict[str, Any]:
    """The annotations of a class's or a function's arguments, by name, and those of what it hands them on to.

    Args:
        target: `_target_` of a config; what is not vlabs' or Lightning's says nothing here.
    """
    if not isinstance(target, str) or not target.startswith(_KNOWN) or target == "pytorch_lightning.Trainer":
        return {}
    try:
        found = pkgutil.resolve_name(target)
    except Exception:  # said where it is made
        return {}
    return options_of(found)
