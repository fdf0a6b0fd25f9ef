"""VQA batches from prepared data: images once, their questions beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlabs.data.images import ImageReader
from vlabs.data.loading import check_choice, check_whole, identity_of, list_texts, make_loader, text_lengths
from vlabs.data.prepared import check_kind, count_regions, load_split, read_answers
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing
from vlabs.data.sampling import Plan
from vlabs.data.tokenizer import read_tokenizer
from vlabs.errors import UserError


class VQABatch(NamedTuple):
    """n questions about B images.

    Attributes:
        images: (B, 3, H, W), normalised.
        input_ids, attention_mask: (n, T).
        image_index: (n,), the position in `images` of each question's image; None where question i is about image i.
        image_ids: (n,), the data set's id of each question's image.
        targets: (n, answers), the official accuracy of every vocabulary answer, in [0, 1].
        coverage: (n, patches) in [0, 1], how much of every patch a question is about; zeros where nobody said; None
            where nobody asked.
        question_ids, questions, answer_types, question_types: n each.
        answers: n lists of human answers, empty where they are kept back.
        skipped: ids of images that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor | None
    image_ids: Tensor
    targets: Tensor
    coverage: Tensor | None
    question_ids: list[int]
    questions: list[str]
    answer_types: list[str]
    question_types: list[str]
    answers: list[list[str]]
    skipped: list[int]


class VQADataset(Dataset[VQABatch]):
    """Reads whole batches: indexed by a `Plan`, gives a `VQABatch`.

    Args:
        rows: prepared rows (see `vlabs.data.prepared.VQA_FEATURES`).
        preprocessing: images and texts to tensors, and the answer vocabulary.
        rand_augment: timm's RandAugment string, e.g. `rand-m9-n2`; None for no augmentation.
        seed: of the augmentation, which is a function of (seed, epoch, image id).
        on_bad: `error`, or `skip` to leave out images that cannot be decoded.
        with_targets: read the soft scores; False where the model's vocabulary is not the data's, or nobody asks.
        scaled_decoding, region_grid: as in `ImageReader`.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        rand_augment: str | None = None,
        seed: int = 0,
        on_bad: str = "error",
        with_targets: bool = True,
        scaled_decoding: bool = False,
        region_grid: tuple[int, int] | None = None,
    ) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        self.images = ImageReader(rows, preprocessing, rand_augment, seed, on_bad, scaled_decoding, region_grid)
        self.with_targets = with_targets

    def __getitem__(self, plan: Plan) -> VQABatch:
        images, index, chosen, skipped = self.images.read_plan(plan)
        texts = [row["question"][position] for _, row, position in chosen]
        input_ids, attention_mask = self.preprocessing.pad(self.preprocessing.token_ids(texts))
        targets = torch.zeros(len(chosen), len(self.preprocessing.answers))
        for n, (_, row, position) in enumerate(chosen):
            if self.with_targets and row["answer_ids"][position]:
                targets[n, row["answer_ids"][position]] = torch.tensor(row["answer_scores"][position])
        one_each = index == list(range(len(images)))
        return VQABatch(
            images=images,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_index=None if one_each else torch.tensor(index),
            image_ids=torch.tensor([row["image_id"] for _, row, _ in chosen], dtype=torch.int64),
            targets=targets,
            coverage=self.images.coverage(chosen, plan.epoch),
            question_ids=[row["question_id"][position] for _, row, position in chosen],
            questions=texts,
            answer_types=[row["answer_type"][position] for _, row, position in chosen],
            question_types=[row["question_type"][position] for _, row, position in chosen],
            answers=[row["answers"][position] for _, row, position in chosen],
            skipped=skipped,
        )


class VQADataModule(pl.LightningDataModule):
    """Batches of a prepared VQA folder.

    Args:
        dir: the prepared folder.
        image_size: side of the square input in pixels.
        batch_size: questions a step on each device; the batch of an optimiser step is this times devices times
            `trainer.accumulate_grad_batches`.
        eval_batch_size: questions a step in evaluation; `batch_size` if not given.
        questions_per_image: questions of one image that share its first pass in a training step.
        train_split: `train`, or `train+val` without the images of `minival`.
        val_split: a split, or `minival`: the last `minival_images` images of val.
        max_length: tokens a question at most.
        tokenizer: a RoBERTa name or folder; None for the tokenizer that was trained with the data.
        rand_augment: timm's RandAugment string for training, e.g. `rand-m9-n2`; None for none.
        num_workers: loader processes.
        on_bad: `error` or `skip`, for images that cannot be decoded.
        bucket_batches: in training, texts of similar length come together: so many batches are drawn at a time and sorted.
            Less padding, but in-batch negatives of similar length; 0 for none.
        scaled_decoding: in training, decode JPEGs at the smallest scale that is not below `image_size`, and resize to
            within a pixel; evaluation always decodes whole pictures and resizes exactly.
        image_mean, image_std: by which channels in [0, 1] are normalised. CLIP's, unless nothing is pre-trained: then
            those of the data make training from scratch easier.
        seed: of shuffling and augmentation.
        preprocessing: of a checkpoint, in place of all options of images, text and vocabulary.

    Raises:
        UserError: no prepared data there, an unknown split, no tokenizer.
    """

    def __init__(
        self,
        dir: str | Path,
        image_size: int = 224,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        questions_per_image: int = 1,
        train_split: str = "train",
        val_split: str = "val",
        minival_images: int = 1000,
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
        check_choice("train_split", train_split, ("train", "train+val"))
        check_choice("on_bad", on_bad, ("error", "skip"))
        check_whole("image_size", image_size, 1)
        check_whole("batch_size", batch_size, 1)
        check_whole("eval_batch_size", eval_batch_size or batch_size, 1)
        check_whole("max_length", max_length, 1)
        check_whole("minival_images", minival_images, 1)
        check_whole("questions_per_image", questions_per_image, 1)
        check_whole("bucket_batches", bucket_batches, 0)
        check_whole("num_workers", num_workers, 0)
        self.dir = Path(dir)
        check_kind(dir, "vqa")
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.questions_per_image = questions_per_image
        self.train_split, self.val_split = train_split, val_split
        self.minival_images = minival_images
        self.rand_augment = rand_augment
        self.num_workers = num_workers
        self.on_bad = on_bad
        self.scaled_decoding = scaled_decoding
        self.bucket_batches = bucket_batches
        self.seed = seed
        # Set by the task, where it learns what a question is about.
        self.region_grid: tuple[int, int] | None = None
        self.preprocessing = preprocessing or Preprocessing(
            image_size=image_size,
            tokenizer=read_tokenizer(tokenizer, self.dir),
            max_length=max_length,
            answers=tuple(read_answers(dir)),
            mean=tuple(image_mean),
            std=tuple(image_std),
        )

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of its data; see `identity_of`."""
        return identity_of(self.dir)

    @property
    def regions_known(self) -> int:
        """Of how many training questions it is known what part of the picture they are about."""
        return count_regions(self.dir, "train")

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split, `minival` and `train+val` included.

        Raises:
            UserError: no such split, or too few images in val for a minival.
        """
        if split not in ("minival", "train+val"):
            return load_split(self.dir, split)
        val = load_split(self.dir, "val")
        rest = len(val) - self.minival_images
        if rest < 0 or (split == "train+val" and rest == 0):
            raise UserError(
                f"{self.dir} has {len(val)} images in val, too few for a minival of {self.minival_images}: "
                "pass a smaller data.minival_images"
            )
        if split == "minival":
            return val.select(range(rest, len(val)))
        return datasets.concatenate_datasets([load_split(self.dir, "train"), val.select(range(rest))])

    def answer_types(self, split: str) -> list[str]:
        """The answer types that occur in a split, sorted."""
        column = self.rows(split).data.column("answer_type")
        return sorted(value for value in pc.unique(pc.list_flatten(column)).to_pylist() if value)

    def train_dataloader(self) -> DataLoader[VQABatch]:
        """Training batches: questions whose answers are all outside the vocabulary are left out."""
        return self._loader(self.rows(self.train_split), training=True)

    def val_dataloader(self) -> DataLoader[VQABatch]:
        """Validation batches: every question."""
        return self.eval_dataloader(self.val_split)

    def eval_dataloader(self, split: str, with_targets: bool = True) -> DataLoader[VQABatch]:
        """Every question of a split, in stored order, all questions of an image together."""
        return self._loader(self.rows(split), training=False, with_targets=with_targets)

    def _loader(self, rows: datasets.Dataset, training: bool, with_targets: bool = True) -> DataLoader[VQABatch]:
        question_rows, positions = list_questions(rows, only_answerable=training)
        if not len(question_rows):
            raise UserError(f"{self.dir} has no question to {'train on' if training else 'evaluate'}")
        dataset = VQADataset(
            rows,
            self.preprocessing,
            self.rand_augment if training else None,
            self.seed,
            self.on_bad,
            with_targets,
            scaled_decoding=training and self.scaled_decoding,
            region_grid=self.region_grid if training else None,
        )
        return make_loader(
            dataset,
            question_rows,
            positions,
            self.questions_per_image if training else 0,
            self.batch_size if training else self.eval_batch_size,
            training,
            self.seed,
            self.num_workers,
            text_lengths(rows, "question", question_rows, positions) if training and self.bucket_batches else None,
            self.bucket_batches,
        )


def list_questions(rows: datasets.Dataset, only_answerable: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row and position in its row of every question, both (Q,); optionally only those with a vocabulary answer."""
    question_rows, positions = list_texts(rows, "question_id")
    if only_answerable:
        answers = pc.list_flatten(rows.data.column("answer_ids"))
        if isinstance(answers, pa.ChunkedArray):
            answers = answers.combine_chunks()
        keep = pc.list_value_length(answers).to_numpy(zero_copy_only=False) > 0
        question_rows, positions = question_rows[keep], positions[keep]
    return question_rows, positions
