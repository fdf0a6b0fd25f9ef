"""Image-caption batches from prepared data: for pre-training, for retrieval, and for ranking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlabs.data.images import ImageReader, random_generator
from vlabs.data.loading import check_choice, check_whole, identity_of, list_texts, make_loader, text_lengths
from vlabs.data.prepared import check_kind, count_regions, load_split, read_manifest
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing
from vlabs.data.sampling import Plan
from vlabs.data.tokenizer import read_tokenizer
from vlabs.errors import UserError

# How often another image is drawn where a false one cannot be decoded, with on_bad=skip.
_REDRAWS = 20


class CaptionBatch(NamedTuple):
    """n captions with their images, and false partners where the task wants them.

    Attributes:
        images: (B, 3, H, W), normalised; the captions' own, then the false ones.
        input_ids, attention_mask: (n, T).
        image_index: (n,), the position in `images` of each caption's image.
        image_ids: (n,), the row of each caption's image in the data: the same number for the same image.
        caption_ids: n, the data's own ids.
        coverage: (n, patches) in [0, 1], how much of every patch a caption is about; zeros where nobody said; None
            where nobody asked.
        false_image_index: (n,), the position in `images` of an image that the caption does not belong to; or None.
        false_input_ids, false_attention_mask: (n, m, T), captions of other images; or None.
        epoch, number: which epoch and which batch of it this is, for randomness that is a function of them.
        skipped: ids of images that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor
    image_ids: Tensor
    caption_ids: list[int]
    coverage: Tensor | None
    false_image_index: Tensor | None
    false_input_ids: Tensor | None
    false_attention_mask: Tensor | None
    epoch: int
    number: int
    skipped: list[int]


class CaptionDataset(Dataset[CaptionBatch]):
    """Reads whole batches: indexed by a `Plan`, gives a `CaptionBatch`.

    Args:
        rows: prepared rows (see `vlabs.data.prepared.CAPTION_FEATURES`).
        preprocessing: images and texts to tensors.
        rand_augment: timm's RandAugment string; None for no augmentation.
        seed: of augmentation and false partners, which are functions of (seed, epoch, image or caption).
        on_bad: `error`, or `skip` to leave out images that cannot be decoded.
        false_images: draw an image that does not belong to it for every caption.
        false_captions: captions of other images to draw for every caption.
        scaled_decoding, region_grid: as in `ImageReader`.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        rand_augment: str | None = None,
        seed: int = 0,
        on_bad: str = "error",
        false_images: bool = False,
        false_captions: int = 0,
        scaled_decoding: bool = False,
        region_grid: tuple[int, int] | None = None,
    ) -> None:
        self.rows = rows
        self.texts = rows.select_columns(["caption"])
        self.preprocessing = preprocessing
        self.images = ImageReader(rows, preprocessing, rand_augment, seed, on_bad, scaled_decoding, region_grid)
        self.seed = seed
        self.false_images = false_images
        self.false_captions = false_captions
        if (false_images or false_captions) and len(rows) < 2:
            raise UserError("false partners need at least two images in the data: pass task.negatives=batch")

    def __getitem__(self, plan: Plan) -> CaptionBatch:
        images, index, chosen, skipped = self.images.read_plan(plan)
        false_index = None
        if self.false_images:
            false = self._false_images(chosen, plan.epoch, skipped)
            false_index = len(images) + torch.arange(len(false))
            images = torch.cat([images, *(image[None] for image in false)])
        input_ids, attention_mask = self._tokens([row["caption"][position] for _, row, position in chosen])
        false_ids, false_mask = self._false_captions(chosen, plan.epoch) if self.false_captions else (None, None)
        return CaptionBatch(
            images=images,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_index=torch.tensor(index, dtype=torch.int64),
            image_ids=torch.tensor([number for number, _, _ in chosen], dtype=torch.int64),
            caption_ids=[row["caption_id"][position] for _, row, position in chosen],
            coverage=self.images.coverage(chosen, plan.epoch),
            false_image_index=false_index,
            false_input_ids=false_ids,
            false_attention_mask=false_mask,
            epoch=plan.epoch,
            number=plan.number,
            skipped=skipped,
        )

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.preprocessing.pad(self.preprocessing.token_ids(texts))

    def _others(self, row: int, position: int, epoch: int, count: int) -> np.ndarray:
        """Rows of other images, at random."""
        generator = random_generator(self.seed, epoch, row, position)
        drawn: np.ndarray = generator.integers(len(self.rows) - 1, size=count)
        return drawn + (drawn >= row)

    def _false_images(
        self, chosen: list[tuple[int, dict[str, Any], int]], epoch: int, skipped: list[int]
    ) -> list[Tensor]:
        """An image of another row for every caption."""
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

    def _false_captions(
        self, chosen: list[tuple[int, dict[str, Any], int]], epoch: int
    ) -> tuple[Tensor, Tensor]:
        texts = []
        for number, _, position in chosen:
            for other in self._others(number, position, epoch, self.false_captions).tolist():
                captions = self.texts[other]["caption"]
                texts.append(captions[random_generator(self.seed, epoch, number, position, other).integers(len(captions))])
        ids, mask = self._tokens(texts)
        shape = (len(chosen), self.false_captions, ids.shape[1])
        return ids.view(shape), mask.view(shape)


class CaptionDataModule(pl.LightningDataModule):
    """Batches of one or more prepared caption folders, trained on together.

    Args:
        sets: the prepared folders by a name of your choice, e.g. `{coco: data/coco_captions}`.
        image_size: side of the square input in pixels.
        batch_size: captions a step on each device.
        eval_batch_size: captions a step in validation; `batch_size` if not given.
        captions_per_image: captions of one image that share its first pass in a training step.
        val_split: the split that is validated on.
        max_length: tokens a caption at most.
        tokenizer: a RoBERTa name or folder; None for the one trained with the first set.
        rand_augment: timm's RandAugment string for training; None for none.
        num_workers: loader processes.
        on_bad: `error` or `skip`, for images that cannot be decoded.
        bucket_batches: in training, texts of similar length come together: so many batches are drawn at a time and sorted.
            Less padding, but in-batch negatives of similar length; 0 for none.
        scaled_decoding: in training, decode JPEGs at the smallest scale that is not below `image_size`, and resize to
            within a pixel; evaluation always decodes whole pictures and resizes exactly.
        image_mean, image_std: by which channels in [0, 1] are normalised.
        seed: of shuffling, augmentation and false partners.
        preprocessing: of a checkpoint, in place of all options of images and text.

    Raises:
        UserError: no prepared captions there, no tokenizer, an option out of range.
    """

    def __init__(
        self,
        sets: Mapping[str, str | Path],
        image_size: int = 224,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        captions_per_image: int = 1,
        val_split: str = "val",
        max_length: int = 50,
        tokenizer: str | None = None,
        rand_augment: str | None = None,
        num_workers: int = 2,
        on_bad: str = "error",
        scaled_decoding: bool = True,
        bucket_batches: int = 0,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        seed: int = 0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        check_choice("on_bad", on_bad, ("error", "skip"))
        check_whole("image_size", image_size, 1)
        check_whole("batch_size", batch_size, 1)
        check_whole("eval_batch_size", eval_batch_size or batch_size, 1)
        check_whole("captions_per_image", captions_per_image, 1)
        check_whole("bucket_batches", bucket_batches, 0)
        check_whole("max_length", max_length, 1)
        check_whole("num_workers", num_workers, 0)
        if not sets:
            raise UserError("data.sets is empty: name at least one prepared folder, data.sets.NAME=FOLDER")
        self.sets = {name: Path(directory) for name, directory in sets.items()}
        for directory in self.sets.values():
            check_kind(directory, "captions")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.captions_per_image = captions_per_image
        self.val_split = val_split
        self.rand_augment = rand_augment
        self.num_workers = num_workers
        self.on_bad = on_bad
        self.scaled_decoding = scaled_decoding
        self.bucket_batches = bucket_batches
        self.seed = seed
        # Set by the task, which knows what it compares with what.
        self.false_images = False
        self.false_captions = 0
        self.region_grid: tuple[int, int] | None = None
        self.regions_in_validation = False
        self.preprocessing = preprocessing or Preprocessing(
            image_size=image_size,
            tokenizer=read_tokenizer(tokenizer, next(iter(self.sets.values()))),
            max_length=max_length,
            mean=tuple(image_mean),
            std=tuple(image_std),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of its data: the first set as of `identity_of`, and all of them under `sets`."""
        sets = [identity_of(directory) for directory in self.sets.values()]
        return sets[0] | {"sets": sets}

    @property
    def regions_known(self) -> int:
        """Of how many training captions it is known what part of the picture they are about."""
        return sum(count_regions(directory, "train") for directory in self.sets.values())

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split of all sets that have it.

        Raises:
            UserError: no set has it.
        """
        having = [directory for directory in self.sets.values() if split in read_manifest(directory)["splits"]]
        # With one set, or none that has it, load_split says which splits there are.
        parts = [load_split(directory, split) for directory in having or list(self.sets.values())[:1]]
        if any(part.features != parts[0].features for part in parts):
            raise UserError(f"data.sets: {', '.join(map(str, having))} were prepared by different versions: prepare again")
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    def train_dataloader(self) -> DataLoader[CaptionBatch]:
        """Training batches: every caption once an epoch."""
        return self._loader("train", training=True)

    def val_dataloader(self) -> DataLoader[CaptionBatch]:
        """Validation batches, in stored order; false partners are the same in every epoch."""
        return self._loader(self.val_split, training=False)

    def _loader(self, split: str, training: bool) -> DataLoader[CaptionBatch]:
        rows = self.rows(split)
        caption_rows, positions = list_texts(rows, "caption_id")
        if not len(caption_rows):
            raise UserError(f"data.sets: the split {split} has no caption")
        dataset = CaptionDataset(
            rows,
            self.preprocessing,
            self.rand_augment if training else None,
            self.seed,
            self.on_bad,
            self.false_images,
            self.false_captions,
            scaled_decoding=training and self.scaled_decoding,
            region_grid=self.region_grid if training or self.regions_in_validation else None,
        )
        return make_loader(
            dataset,
            caption_rows,
            positions,
            self.captions_per_image if training else 0,
            self.batch_size if training else self.eval_batch_size,
            training,
            self.seed,
            self.num_workers,
            text_lengths(rows, "caption", caption_rows, positions) if training and self.bucket_batches else None,
            self.bucket_batches,
        )
