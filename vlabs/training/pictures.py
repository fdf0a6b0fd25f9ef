"""How a training reads images: by its options, else as the checkpoint or encoder that it starts from was trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import timm

from vlabs.data.module import PreparedDataModule
from vlabs.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, PICTURE_OPTIONS, Preprocessing
from vlabs.errors import UserError
from vlabs.models import backbones
from vlabs.models.hub import CONFIG
from vlabs.utils.plain import check_files, parse_json, read_text

_PROCESSOR = "preprocessor_config.json"
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which are used in transformers' files
_TIMM = {name: name for name in ("mean", "std", "interpolation", "crop_mode")} | {"crop": "crop_pct"}


class Shown(NamedTuple):
    """How the checkpoint or encoder that a training starts from read images.

    Attributes:
        source: where this is written.
        values: values by their names in `Preprocessing`, unchecked; only those that the source has.
    """

    source: str
    values: dict[str, Any]


def shown_to_checkpoint(source: str, header: Mapping[str, Any]) -> Shown:
    """Read it from a checkpoint.

    Args:
        source: name of the checkpoint.
        header: its `"vlabs"` entry.
    """
    before = {"interpolation": "bicubic", "crop": 1.0, "crop_mode": "center"}  # for checkpoints without these values
    plain = before | header["preprocessing"]
    return Shown(source, {name: plain[name] for name in PICTURE_OPTIONS if name in plain})


def shown_to_encoder(vision: Mapping[str, Any]) -> Shown | None:
    """Read it from the configuration of a pre-trained image encoder, without weights or network.

    Args:
        vision: `model.vision` of a config. Its `weights` are a tag of timm, or a file or folder. Beside the latter may
            lie timm's `config.json` or transformers' `preprocessor_config.json`; otherwise timm's values for the
            architecture are used.

    Returns:
        None if the encoder is not pre-trained, or nothing is known.

    Raises:
        UserError: such a file cannot be read.
    """
    weights, architecture = vision.get("weights"), vision.get("architecture")
    if not weights:
        return None
    path, tag = Path(weights), str(weights)
    if path.exists():
        folder = path if path.is_dir() else path.parent
        own = _read(folder / CONFIG)
        tag = str(own.get("architecture") if path.is_dir() and own.get("architecture") else architecture)
        of_this = own if own.get("architecture") in (tag, None) else {}  # config.json may belong to another file
        said = of_this.get("pretrained_cfg", of_this)
        if values := _values(said if isinstance(said, dict) else {}, _TIMM):
            return Shown(str(folder / CONFIG), values)
        if values := _of_processor(_read(folder / _PROCESSOR)):
            return Shown(str(folder / _PROCESSOR), values)
    if tag in backbones.OWN:  # RVT and FAN, trained on ImageNet
        return Shown(tag, {"mean": IMAGENET_MEAN, "std": IMAGENET_STD})
    try:
        known = timm.get_pretrained_cfg(tag)
    except RuntimeError:  # an unknown tag; reading the weights reports it
        return None
    return None if known is None else Shown(f"timm's {tag}", _values(known.to_dict(), _TIMM))


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    check_files(path.parent, (path.name,))
    content = parse_json(read_text(path), str(path))
    return content if isinstance(content, dict) else {}


def _values(said: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {name: said[there] for name, there in names.items() if said.get(there) is not None}


def _of_processor(said: Mapping[str, Any]) -> dict[str, Any]:
    values = _values(said, {"mean": "image_mean", "std": "image_std"})
    if "resample" in said:
        values["interpolation"] = _RESAMPLE.get(said["resample"], f"Pillow's {said['resample']}")
    try:
        seen, resized = said["crop_size"]["height"], said["size"]["shortest_edge"]
        return values | {"crop": seen / resized}
    except (KeyError, TypeError, ZeroDivisionError):  # this processor does not crop
        size = said.get("size")
        return values | ({"crop_mode": "squash"} if isinstance(size, dict) and {"height", "width"} <= {*size} else {})


def choose(data: PreparedDataModule, shown: Shown | None) -> str:
    """Fill in the values of the preprocessing that no option sets (`left_open`).

    Args:
        data: its `preprocessing` is replaced.
        shown: values of the checkpoint or encoder; None if the encoder is not pre-trained.

    Returns:
        A line that says how images are read, and where each value is from.

    Raises:
        UserError: a value is invalid, or only one of mean and deviation is known.
    """
    source, values = shown or Shown("", {})
    taken = {name: _plain(values[name]) for name in data.left_open if name in values}
    if {"mean", "std"} <= {*data.left_open} and len({"mean", "std"} & {*taken}) == 1:
        raise UserError(
            f"{source} has only one of mean and deviation: pass data.image_mean=[R,G,B] and data.image_std=[R,G,B]"
        )
    try:
        data.preprocessing = dataclasses.replace(data.preprocessing, **taken)
    except UserError as error:
        raise UserError(f"{source} says {error}: pass it") from None
    given = [name for name in data.by_default if name not in data.left_open]
    parts = {
        source: list(taken),
        "the config": given,
        "the default" if shown else "the default: no pre-trained encoder": [
            name for name in data.left_open if name not in taken
        ],
    }
    words = {whose: _words(data.preprocessing, names) for whose, names in parts.items()}
    said = [f"{how} ({whose})" for whose, how in words.items() if how]
    others = [name for name in given if name in values and _plain(values[name]) != getattr(data.preprocessing, name)]
    if others:
        nulls = " ".join(f"data.{PICTURE_OPTIONS[name]}=null" for name in others)
        said.append(f"{source} had other values, which {nulls} takes")
    if data.blind:
        return "images: none; the mean color is shown instead of each (data.blind=true)"
    return f"images: {'; '.join(said)}"


def as_before(data: PreparedDataModule) -> str:
    """The line of a resumed run."""
    return f"images: {_words(data.preprocessing, list(data.by_default))} (as before)"


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _words(preprocessing: Preprocessing, names: list[str]) -> str:
    def word(name: str) -> str:
        value = getattr(preprocessing, name)
        if isinstance(value, str):
            return value
        return f"{name} {' '.join(f'{one:.3g}' for one in value) if isinstance(value, tuple) else f'{value:.3g}'}"

    return ", ".join(word(name) for name in names if getattr(preprocessing, name) != "center")  # the usual value
