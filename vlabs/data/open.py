"""Open a prepared folder of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlabs.data.captions import CaptionDataModule
from vlabs.data.classes import ClassDataModule
from vlabs.data.masks import MaskDataModule
from vlabs.data.module import PreparedDataModule
from vlabs.data.prepared import read_manifest
from vlabs.data.statements import StatementDataModule
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError

MODULES: dict[str, type[PreparedDataModule]] = {
    module.kind: module
    for module in (VQADataModule, CaptionDataModule, StatementDataModule, ClassDataModule, MaskDataModule)
}


def open_prepared(dir: str | Path | None, minival_images: int = 1000, **options: Any) -> PreparedDataModule:
    """The data module of a prepared folder, chosen by the kind of data in its manifest.

    Args:
        dir: the prepared folder.
        minival_images: number of images of val in the split `minival`, for questions.
        options: of `PreparedDataModule`.

    Raises:
        UserError: no folder is named, or vlabs does not know its kind.
    """
    if dir is None:
        raise UserError("data.dir must be given: pass data.dir=FOLDER, a prepared folder")
    kind = read_manifest(dir).get("kind")
    if kind not in MODULES:
        raise UserError(f"{dir} holds data of kind {kind!r}: pass data=NAME with the choice that reads it")
    if kind == "vqa":
        options["minival_images"] = minival_images
    MODULES[kind].check_options(options)
    return MODULES[kind](dir, **options)
