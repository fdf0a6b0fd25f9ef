"""VQA batches from prepared data: each image once, with its questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vlabs.data.images import BatchRows, ImageReader
from vlabs.data.instances import crop_map
from vlabs.data.prepared import load_split, read_answers
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec
from vlabs.data.texts import TextDataModule, TextDataset, column, image_ids
from vlabs.errors import UserError
from vlabs.utils.options import Size


class VQABatch(NamedTuple):
    """n questions about B images.

    Attributes:
        images: (B, 3, H, W), normalized; with a store, the stored first passes instead.
        input_ids, attention_mask: (n, T).
        image_index: (n,), the position in `images` of each question's image; None if question i is about image i.
        image_ids: (n,), the dataset's id of each question's image.
        targets: (n, answers), the official accuracy of each answer of the vocabulary, in [0, 1].
        coverage: (n, patches) in [0, 1], how much of each patch a question is about; zeros where unknown; None if not
            requested.
        question_ids, questions, answer_types, question_types: n each.
        answers: n lists of human answers; empty if they are not public.
        skipped: ids of images that could not be decoded and were left out (only with `on_bad=skip`).
        human: (n, H, W), where people looked, over the pixels that the model sees; zeros where nobody was asked; None
            if not requested.
    """

    images: Any
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor | None
    image_ids: Tensor
    targets: Tensor
    coverage: Tensor | None
    question_ids: list[int | str]
    questions: list[str]
    answer_types: list[str]
    question_types: list[str]
    answers: list[list[str]]
    skipped: list[int]
    human: Tensor | None = None


class VQADataset(TextDataset):
    """Reads whole batches: indexed by a `BatchSpec`, gives a `VQABatch`.

    Args:
        rows: prepared rows (see `vlabs.data.features.VQA_FEATURES`).
        preprocessing, images: see `TextDataset`.
        with_targets: read the soft scores; False if the model's vocabulary is not the data's, or they are not needed.
        human_map: see `Wants`.
    """

    item = "question"

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        images: ImageReader | None = None,
        with_targets: bool = True,
        human_map: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(rows, preprocessing, images)
        self.with_targets = with_targets
        self.human_map = human_map

    def batch(self, spec: BatchSpec, read: BatchRows, common: dict[str, Any]) -> VQABatch:
        """See `TextDataset`."""
        targets = torch.zeros(len(read.texts), len(self.preprocessing.names))
        for n, (_, row, position) in enumerate(read.texts):
            if self.with_targets and row["answer_ids"][position]:
                targets[n, row["answer_ids"][position]] = torch.tensor(row["answer_scores"][position])
        one_each = read.image_index == list(range(len(read.texts)))
        return VQABatch(
            image_index=None if one_each else torch.tensor(read.image_index),
            image_ids=image_ids(read),
            targets=targets,
            questions=column(read, "question"),
            answer_types=column(read, "answer_type"),
            question_types=column(read, "question_type"),
            answers=column(read, "answers"),
            human=self._human(common["question_ids"]),
            **common,
        )

    def _human(self, question_ids: list[Any]) -> Tensor | None:
        if self.human_map is None:
            return None
        size, mode = self.preprocessing.image_size, self.preprocessing.crop_mode
        maps = torch.zeros(len(question_ids), size, size)
        for n, question_id in enumerate(question_ids):
            if (looked := self.human_map(question_id)) is not None:
                maps[n] = torch.from_numpy(crop_map(looked, size, crop_mode=mode))
        return maps


@dataclass(kw_only=True, eq=False, repr=False)
class VQADataModule(TextDataModule):
    """Batches of a prepared VQA folder.

    Attributes:
        train_split: split for training: `train`, or `train+val`, which leaves out the images of `minival`.
        minival_images: number of images of val in the split `minival`: its last ones.
        questions_per_image: questions of one image that share its first pass in a training step.

    Raises:
        UserError: see `PreparedDataModule`.
    """

    kind = "vqa"
    item = "question"
    holds = "questions (data=scenes, vqav2)"
    read_names = staticmethod(read_answers)

    train_split: Literal["train", "train+val"] = "train"
    minival_images: Size = 1000
    questions_per_image: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._with_targets = True

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split, `minival` and `train+val` included.

        Raises:
            UserError: there is no such split, or val has too few images for a minival.
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
        """The answer types of a split, sorted."""
        column = self.rows(split).data.column("answer_type")
        return sorted(value for value in pc.unique(pc.list_flatten(column)).to_pylist() if value)

    def train_dataloader(self) -> DataLoader[VQABatch]:
        """Training batches, without questions that have no answer in the vocabulary."""
        return self.loader(self.rows(self.train_split), training=True)

    def eval_dataloader(self, split: str, with_targets: bool = True) -> DataLoader[VQABatch]:
        """All questions of a split, in stored order, the questions of an image together."""
        self._with_targets = with_targets
        try:
            return super().eval_dataloader(split)
        finally:
            self._with_targets = True

    def texts(self, rows: datasets.Dataset, training: bool) -> tuple[np.ndarray, np.ndarray]:
        """See `TextDataModule`; in training only questions with an answer in the vocabulary."""
        question_rows, positions = super().texts(rows, training)
        if training:
            answers = pc.list_flatten(rows.data.column("answer_ids"))
            if isinstance(answers, pa.ChunkedArray):
                answers = answers.combine_chunks()
            keep = pc.list_value_length(answers).to_numpy(zero_copy_only=False) > 0
            question_rows, positions = question_rows[keep], positions[keep]
        return question_rows, positions

    def dataset(self, rows: datasets.Dataset, images: ImageReader) -> VQADataset:
        """See `TextDataModule`."""
        return VQADataset(rows, self.preprocessing, images, self._with_targets, self.wants.human_map)
