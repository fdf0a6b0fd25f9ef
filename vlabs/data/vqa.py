"""VQA batches from prepared data: images once, their questions beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlabs.data.images import ImageReader
from vlabs.data.loading import check_choice, check_whole, list_texts
from vlabs.data.module import PreparedDataModule
from vlabs.data.prepared import check_kind, load_split, read_answers
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec
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
    """Reads whole batches: indexed by a `BatchSpec`, gives a `VQABatch`.

    Args:
        rows: prepared rows (see `vlabs.data.prepared.VQA_FEATURES`).
        preprocessing: images and texts to tensors, and the answer vocabulary.
        images: reads the images of these rows; None to read them as in evaluation, all of them.
        with_targets: read the soft scores; False where the model's vocabulary is not the data's, or nobody asks.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        images: ImageReader | None = None,
        with_targets: bool = True,
    ) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        self.images = images or ImageReader(rows, preprocessing)
        self.with_targets = with_targets

    def __getitem__(self, spec: BatchSpec) -> VQABatch:
        images, index, chosen, skipped = self.images.read_batch(spec)
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
            coverage=self.images.coverage(chosen, spec.epoch),
            question_ids=[row["question_id"][position] for _, row, position in chosen],
            questions=texts,
            answer_types=[row["answer_type"][position] for _, row, position in chosen],
            question_types=[row["question_type"][position] for _, row, position in chosen],
            answers=[row["answers"][position] for _, row, position in chosen],
            skipped=skipped,
        )


class VQADataModule(PreparedDataModule):
    """Batches of a prepared VQA folder.

    Args:
        dir: the prepared folder.
        questions_per_image: questions of one image that share its first pass in a training step.
        train_split: `train`, or `train+val` without the images of `minival`.
        val_split: a split, or `minival`: the last `minival_images` images of val.
        options: of `PreparedDataModule`.

    Raises:
        UserError: see `PreparedDataModule`, or an unknown split.
    """

    kind = "vqa"
    holds = "questions (data=scenes, vqav2)"

    def __init__(
        self,
        dir: str | Path,
        questions_per_image: int = 1,
        train_split: str = "train",
        minival_images: int = 1000,
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        check_choice("train_split", train_split, ("train", "train+val"))
        check_whole("minival_images", minival_images, 1)
        check_whole("questions_per_image", questions_per_image, 1)
        check_kind(dir, self.kind)
        answers = read_answers(dir) if preprocessing is None else ()
        super().__init__(
            {"vqa": dir}, preprocessing=preprocessing, answers=answers, texts_per_image=questions_per_image, **options
        )
        self.train_split = train_split
        self.minival_images = minival_images

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
        images = self.image_reader(rows, training, regions=training)
        dataset = VQADataset(rows, self.preprocessing, images, with_targets)
        return self.loader(dataset, rows, "question", question_rows, positions, training)


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
