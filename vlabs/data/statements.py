"""Batches of statements with a label (SNLI-VE, NLVR2) from prepared data: about a picture each, or about a pair."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlabs.data.images import ImageReader
from vlabs.data.loading import check_whole, list_texts
from vlabs.data.module import PreparedDataModule
from vlabs.data.prepared import check_kind, load_split, read_labels, read_manifest
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec


class StatementBatch(NamedTuple):
    """n statements about B pictures, p each.

    Attributes:
        images: (B, 3, H, W), normalised.
        input_ids, attention_mask: (n, T).
        image_index: (n, p), the positions in `images` of each statement's pictures, left before right.
        image_ids: (n,), the data's number of each statement's picture or pair.
        labels: (n,), position among the names of the labels; -1 where it is kept back.
        coverage: (n * p, patches) in [0, 1], how much of every patch a statement is about, of its pictures one after
            another; zeros where nobody said; None where nobody asked.
        statement_ids: n, in one split.
        keys: n, what the data set calls the statements: pairID of SNLI-VE, identifier of NLVR2.
        skipped: numbers of pictures or pairs that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor
    image_ids: Tensor
    labels: Tensor
    coverage: Tensor | None
    statement_ids: list[int]
    keys: list[str]
    skipped: list[int]


class StatementDataset(Dataset[StatementBatch]):
    """Reads whole batches: indexed by a `BatchSpec`, gives a `StatementBatch`.

    Args:
        rows: prepared rows (see `vlabs.data.prepared.statement_features`).
        preprocessing: images and texts to tensors.
        images: reads the images of these rows.
        pictures: p.
    """

    def __init__(
        self, rows: datasets.Dataset, preprocessing: Preprocessing, images: ImageReader, pictures: int
    ) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        self.images = images
        self.pictures = pictures

    def __getitem__(self, spec: BatchSpec) -> StatementBatch:
        images, index, chosen, skipped = self.images.read_batch(spec)
        texts = [row["statement"][position] for _, row, position in chosen]
        input_ids, attention_mask = self.preprocessing.pad(self.preprocessing.token_ids(texts))
        first = torch.tensor(index, dtype=torch.int64)
        return StatementBatch(
            images=images,
            input_ids=input_ids,
            attention_mask=attention_mask,
            image_index=first[:, None] + torch.arange(self.pictures),
            image_ids=torch.tensor([row["image_id"] for _, row, _ in chosen], dtype=torch.int64),
            labels=torch.tensor([row["label"][position] for _, row, position in chosen], dtype=torch.int64),
            coverage=self.images.coverage(chosen, spec.epoch),
            statement_ids=[row["statement_id"][position] for _, row, position in chosen],
            keys=[row["key"][position] for _, row, position in chosen],
            skipped=skipped,
        )


class StatementDataModule(PreparedDataModule):
    """Batches of a prepared folder of statements.

    Args:
        dir: the prepared folder.
        statements_per_image: statements about one picture or pair that share its first pass in a training step.
        options: of `PreparedDataModule`.

    Raises:
        UserError: see `PreparedDataModule`.
    """

    kind = "statements"
    holds = "statements with a label (data=scenes_snli_ve, scenes_nlvr2, snli_ve, nlvr2)"

    def __init__(
        self,
        dir: str | Path,
        statements_per_image: int = 1,
        val_split: str = "dev",
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        check_whole("statements_per_image", statements_per_image, 1)
        check_kind(dir, self.kind)
        super().__init__(
            {"": dir},
            val_split=val_split,
            preprocessing=preprocessing,
            answers=read_labels(dir) if preprocessing is None else (),
            texts_per_image=statements_per_image,
            **options,
        )
        self.pictures = int(read_manifest(dir).get("pictures", 1))
        self.labels = read_labels(dir)

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split.

        Raises:
            UserError: there is no such split.
        """
        return load_split(self.dir, split)

    def train_dataloader(self) -> DataLoader[StatementBatch]:
        """Training batches: statements whose label is kept back are left out."""
        return self._loader(self.rows("train"), training=True)

    def val_dataloader(self) -> DataLoader[StatementBatch]:
        """Validation batches."""
        return self.eval_dataloader(self.val_split)

    def eval_dataloader(self, split: str) -> DataLoader[StatementBatch]:
        """Every statement of a split, in stored order, all about a picture together."""
        return self._loader(self.rows(split), training=False)

    def _loader(self, rows: datasets.Dataset, training: bool) -> DataLoader[StatementBatch]:
        text_rows, positions = list_texts(rows, "statement_id")
        if training:
            known = rows.data.column("label").combine_chunks().flatten().to_numpy() >= 0
            text_rows, positions = text_rows[known], positions[known]
        images = self.image_reader(rows, training, regions=training)
        dataset = StatementDataset(rows, self.preprocessing, images, self.pictures)
        return self.loader(dataset, rows, "statement", text_rows, positions, training)
