"""The format of prepared data, which `data_prep` writes and vlabs reads.

A prepared folder holds `manifest.json`; `answers.json`, `labels.json` or `classes.json`; `tokenizer/tokenizer.json` if
a tokenizer was trained; and one `datasets` folder per split. A row is an image with its texts, class or mask.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlabs.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

# Increased when older versions of vlabs would misread newer folders.
FORMAT_VERSION = 2


IGNORED = 65535  # class of pixels that do not count; 255 on disk if pixels have 8 bits

# The labels of known datasets of statements, in METER's order, so that its heads fit.
LABELS = {"snli_ve": ("contradiction", "neutral", "entailment"), "nlvr2": ("False", "True")}

# Label ids of the classes in Cityscapes' benchmark, in the order of its train ids.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip

# Each kind of data in words, and the commands that prepare it.
_KINDS = {
    "vqa": ("questions", "`vlabs prepare vqav2`, or `own` for a table of questions"),
    "captions": (
        "captions",
        "`vlabs prepare flickr30k`, `coco_captions` or `scenes_captions`, `webdataset` for shards, `own` for a table "
        "of captions",
    ),
    "statements": (
        "statements about images with a label",
        "`vlabs prepare snli_ve`, `nlvr2` or `pairs`",
    ),
    "masks": ("images with a class per pixel", "`vlabs prepare segmentation`"),
    "classes": ("images with a class", "`vlabs prepare classes`, `imagenet` or `objects`"),
}


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read `manifest.json` of a prepared folder.

    Raises:
        UserError: there is no such folder, or it is not prepared.
    """
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise UserError(
            f"{directory} holds no prepared data (no manifest.json): make it with `vlabs prepare vqav2 "
            f"--raw-dir RAW --out-dir {directory}` (captions: flickr30k or coco_captions; statements: nlvr2 or "
            "snli_ve; a table of your own: own), or name another folder"
        )
    manifest = _read_json(path)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("splits"), dict):
        raise UserError(f"{path} is not a manifest (it has no splits): prepare the data again")
    return manifest


def check_kind(directory: str | Path, kind: str) -> None:
    """Check that a prepared folder holds a kind of data, such as questions (`vqa`) or captions (`captions`).

    Raises:
        UserError: it holds another kind, or is not a prepared folder.
    """
    found = read_manifest(directory).get("kind")
    if found != kind:
        holds = _KINDS[found][0] if found in _KINDS else f"data of kind {found!r}"
        wanted, commands = _KINDS[kind]
        raise UserError(
            f"{directory} holds {holds}, not {wanted}: make a folder of {wanted} with {commands}, or name "
            "another folder"
        )


def read_answers(directory: str | Path) -> list[str]:
    """Read the answer vocabulary of a prepared folder; an answer's index is its id."""
    return _read_names(Path(directory) / "answers.json", "answers", "question answering")


def read_classes(directory: str | Path) -> list[str]:
    """Read the class names of a prepared folder; a class's index is its label."""
    return _read_names(Path(directory) / "classes.json", "classes", "classification")


def read_labels(directory: str | Path) -> list[str]:
    """Read the names of the labels of a prepared folder of statements; a name's index is its label."""
    return _read_names(Path(directory) / "labels.json", "labels", "statements")


def _read_names(path: Path, what: str, purpose: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} was not prepared for {purpose}")
    names = _read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is not a list of {what}: prepare the data again")
    return names


def count_regions(directory: str | Path, split: str, of: Literal["region", "phrases"] = "region") -> int:
    """Number of texts of a split with a region, or a region that tells its phrases apart; 0 without such a split."""
    counts = read_manifest(directory)["splits"].get(split, {})
    return sum(int(counts.get(f"{texts}_with_{of}", 0)) for texts in ("questions", "captions", "statements"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): prepare the data again") from None


def load_split(directory: str | Path, split: str) -> datasets.Dataset:
    """Open one split, memory-mapped.

    Raises:
        UserError: the folder has no such split; the message names those it has.
    """
    import datasets  # here, because it imports pandas, which reading a manifest does not need

    splits = sorted(read_manifest(directory)["splits"])
    if split not in splits:
        raise UserError(f"{directory} has no split '{split}': choose one of {', '.join(splits)}")
    try:
        return datasets.load_from_disk(str(Path(directory) / split))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{Path(directory) / split} is damaged ({one_line(str(error))}): prepare the data again"
        ) from None
