"""The prepared form of a dataset: what `data_prep` writes and everything else reads.

A folder holds `manifest.json`, `answers.json` (question answering), `tokenizer/tokenizer.json` where a tokenizer was
trained, and one `datasets` folder a split. A row is an image with the lists of what is asked or said about it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlabs.errors import UserError, one_line

if TYPE_CHECKING:
    import datasets

# Goes up when a reader of older folders would misread a newer one.
FORMAT_VERSION = 2


IGNORED = 65535  # as a class in memory, on disk too where a pixel has 16 bits

# The labels of statements of known datasets, in METER's order, so that its heads fit.
LABELS = {"snli_ve": ("contradiction", "neutral", "entailment"), "nlvr2": ("False", "True")}

# Cityscapes' label ids of the classes that its benchmark counts, in the order of its train ids.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip

# What a manifest's `kind` means, and which commands make such a folder.
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
    "masks": ("images with a class a pixel", "`vlabs prepare segmentation`"),
    "classes": ("images with a class", "`vlabs prepare classes`, `imagenet` or `objects`"),
}


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Return `manifest.json` of a prepared folder.

    Raises:
        UserError: there is no such folder, or it is not a prepared one.
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
        raise UserError(f"{path} is no manifest (it names no splits): prepare the data again")
    return manifest


def check_kind(directory: str | Path, kind: str) -> None:
    """Check that a prepared folder holds questions (`vqa`) or captions (`captions`), as wanted.

    Raises:
        UserError: it holds the other kind, or is no prepared folder.
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
    """Return the answer vocabulary of a prepared folder; an answer's index is its id."""
    return _read_names(Path(directory) / "answers.json", "answers", "question answering")


def read_classes(directory: str | Path) -> list[str]:
    """Return the class names of a prepared folder; a class's index is its label."""
    return _read_names(Path(directory) / "classes.json", "classes", "classification")


def read_labels(directory: str | Path) -> list[str]:
    """Return the names of a prepared folder's labels of statements; a label is the position of its name."""
    return _read_names(Path(directory) / "labels.json", "labels", "statements")


def _read_names(path: Path, what: str, purpose: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} was not prepared for {purpose}")
    names = _read_json(path)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path} is no list of {what}: prepare the data again")
    return names


def count_regions(directory: str | Path, split: str) -> int:
    """Of how many texts of a split it is known what part of the image they are about; 0 without such a split."""
    counts = read_manifest(directory)["splits"].get(split, {})
    return sum(int(counts.get(f"{texts}_with_region", 0)) for texts in ("questions", "captions", "statements"))


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
    import datasets  # with pandas, which is not needed to read a manifest

    splits = sorted(read_manifest(directory)["splits"])
    if split not in splits:
        raise UserError(f"{directory} has no split '{split}': choose one of {', '.join(splits)}")
    try:
        return datasets.load_from_disk(str(Path(directory) / split))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{Path(directory) / split} is damaged ({one_line(str(error))}): prepare the data again"
        ) from None
