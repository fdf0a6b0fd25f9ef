"""Image-caption batches from prepared data: for pre-training, for retrieval, and for ranking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vlabs.data.images import BatchRows, ImageReader, joined, random_generator
from vlabs.data.prepared import check_kind, load_split, read_manifest
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec
from vlabs.data.texts import TextDataModule, TextDataset
from vlabs.errors import UserError
from vlabs.utils.options import Size

# How many false images are tried with on_bad=skip before one that cannot be decoded is an error.
_REDRAWS = 20
_TEXTS = datasets.List(datasets.Value("string"))


class CaptionBatch(NamedTuple):
    """n captions with their images, and false partners where the task wants them.

    Attributes:
        images: (B, 3, H, W), normalized: the captions' own images, then the false ones. With a store, the stored first
            passes instead.
        input_ids, attention_mask: (n, T).
        image_index: (n,), the position in `images` of each caption's image.
        image_ids: (n,), the row of each caption's image in the data: the same number for the same image.
        caption_ids: n, the data's own ids.
        coverage: (n, patches) in [0, 1], how much of each patch a caption is about; zeros where unknown; None if not
            requested.
        false_image_index: (n,), the position in `images` of an image that the caption does not belong to; or None.
        false_input_ids, false_attention_mask: (n, m, T), captions of other images; or None.
        epoch, number: the epoch and the batch's number in it, from which random draws are seeded.
        skipped: ids of images that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Any
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor
    image_ids: Tensor
    caption_ids: list[int | str]
    coverage: Tensor | None
    false_image_index: Tensor | None
    false_input_ids: Tensor | None
    false_attention_mask: Tensor | None
    epoch: int
    number: int
    skipped: list[int]


class CaptionDataset(TextDataset):
    """Reads whole batches: indexed by a `BatchSpec`, gives a `CaptionBatch`.

    Args:
        rows: prepared rows (see `vlabs.data.features.CAPTION_FEATURES`).
        preprocessing, images: see `TextDataset`.
        seed: seed of the false partners, which are a function of (seed, epoch, caption).
        false_images: also draw, for each caption, an image that it does not belong to.
        false_captions: number of captions of other images to draw for each caption.
    """

    item = "caption"

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        images: ImageReader | None = None,
        seed: int = 0,
        false_images: bool = False,
        false_captions: int = 0,
    ) -> None:
        super().__init__(rows, preprocessing, images)
        self.captions = rows.select_columns(["caption"])
        self.seed = seed
        self.false_images = false_images
        self.false_captions = false_captions
        if (false_images or false_captions) and len(rows) < 2:
            raise UserError("false partners need at least two images in the data: pass task.negatives=batch")

    def batch(self, spec: BatchSpec, read: BatchRows, common: dict[str, Any]) -> CaptionBatch:
        """See `TextDataset`."""
        false_index = None
        if self.false_images:
            false = self._false_images(read.texts, spec.epoch, read.skipped)
            false_index = len(set(read.image_index)) + torch.arange(len(false))
            common["images"] = joined([read.images, *false])
        false_ids, false_mask = self._false_captions(read.texts, spec.epoch) if self.false_captions else (None, None)
        return CaptionBatch(
            image_index=torch.tensor(read.image_index, dtype=torch.int64),
            image_ids=torch.tensor([number for number, _, _ in read.texts], dtype=torch.int64),
            false_image_index=false_index,
            false_input_ids=false_ids,
            false_attention_mask=false_mask,
            epoch=spec.epoch,
            number=spec.number,
            **common,
        )

    def _others(self, row: int, position: int, epoch: int, count: int) -> np.ndarray:
        """Draw rows of other images."""
        generator = random_generator(self.seed, epoch, row, position)
        # Drawing from one row less and skipping over `row` gives every other row the same probability.
        drawn: np.ndarray = generator.integers(len(self.rows) - 1, size=count)
        return drawn + (drawn >= row)

    def _false_images(self, chosen: list[tuple[int, dict[str, Any], int]], epoch: int, skipped: list[int]) -> list[Any]:
        """Read an image of another row for each caption."""
        images = []
        for number, _, position in chosen:
            for other in self._others(number, position, epoch, _REDRAWS).tolist():
                row, image = self.images.read(other, epoch)
                if image is not None:
                    break
                skipped.append(row["image_id"])
            else:
                raise UserError(f"{_REDRAWS} images in a row cannot be decoded: prepare the data again")
            images.append(image)
        return images

    def _false_captions(self, chosen: list[tuple[int, dict[str, Any], int]], epoch: int) -> tuple[Tensor, Tensor]:
        texts = []
        for number, _, position in chosen:
            for other in self._others(number, position, epoch, self.false_captions).tolist():
                captions = self.captions[other]["caption"]
                texts.append(
                    captions[random_generator(self.seed, epoch, number, position, other).integers(len(captions))]
                )
        ids, mask = self.tokens(texts)
        shape = (len(chosen), self.false_captions, ids.shape[1])
        return ids.view(shape), mask.view(shape)


@dataclass(kw_only=True, eq=False, repr=False)
class CaptionDataModule(TextDataModule):
    """Batches of one or more prepared caption folders, which are trained on together.

    Attributes:
        sets: further prepared folders, each under a name of your choice, e.g. `{coco: data/coco_captions}`.
        captions_per_image: captions of one image that share its first pass in a training step.

    Raises:
        UserError: see `PreparedDataModule`.
    """

    kind = "captions"
    item = "caption"
    holds = "captions (data=scenes_captions, flickr30k, coco_captions)"

    sets: Mapping[str, str | Path] | None = None
    captions_per_image: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.folders |= {name: Path(folder) for name, folder in (self.sets or {}).items()}
        for folder in self.folders.values():
            check_kind(folder, self.kind)

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split, from all folders that have it.

        Raises:
            UserError: no folder has this split.
        """
        having = [directory for directory in self.folders.values() if split in read_manifest(directory)["splits"]]
        # If no folder has the split, load_split raises an error that lists the splits of the first folder.
        parts = [load_split(directory, split) for directory in having or list(self.folders.values())[:1]]
        if any(not _fit(part.features, parts[0].features) for part in parts):
            raise UserError(
                f"data.sets: {', '.join(map(str, having))} were prepared by different versions: prepare again"
            )
        if len({str(part.features["caption_id"]) for part in parts}) > 1:  # numbers in one folder, strings in another
            parts = [_with_text_ids(part) for part in parts]
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    def dataset(self, rows: datasets.Dataset, images: ImageReader) -> CaptionDataset:
        """See `TextDataModule`. False partners in validation are the same in every epoch."""
        return CaptionDataset(
            rows, self.preprocessing, images, self.seed, self.wants.false_images, self.wants.false_captions
        )


def _with_text_ids(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows with caption ids as strings; images are not copied."""
    ids = rows.data.column("caption_id").cast(pa.list_(pa.string())).combine_chunks()
    return rows.remove_columns("caption_id").add_column("caption_id", ids, feature=_TEXTS)


def _fit(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether rows can be concatenated. Rows whose images lie in shards have columns that others lack."""
    apart = ("path", "offset", "size", "caption_id")
    return {name: one for name, one in some.items() if name not in apart} == {
        name: one for name, one in others.items() if name not in apart
    }
