"""Batches of labeled statements from prepared data, each about one image (SNLI-VE) or a pair (NLVR2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor

from vlabs.data.images import BatchRows, ImageReader
from vlabs.data.prepared import read_labels, read_manifest
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec
from vlabs.data.texts import TextDataModule, TextDataset, column, image_ids
from vlabs.utils.options import Size


class StatementBatch(NamedTuple):
    """n statements about B images, p each.

    Attributes:
        images: (B, 3, H, W), normalized; with a store, the stored first passes instead.
        input_ids, attention_mask: (n, T).
        image_index: (n, p), the positions in `images` of each statement's images, left before right.
        image_ids: (n,), the id of each statement's image or pair.
        labels: (n,), index into the names of the labels; -1 if it is not public.
        coverage: (n * p, patches) in [0, 1], how much of each patch a statement is about, its images one after
            another; zeros where unknown; None if not requested.
        statement_ids: n ids, unique within a split.
        keys: n ids of the dataset itself: pairID of SNLI-VE, identifier of NLVR2.
        skipped: ids of images or pairs that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Any
    input_ids: Tensor
    attention_mask: Tensor
    image_index: Tensor
    image_ids: Tensor
    labels: Tensor
    coverage: Tensor | None
    statement_ids: list[int | str]
    keys: list[str]
    skipped: list[int]


class StatementDataset(TextDataset):
    """Reads whole batches: indexed by a `BatchSpec`, gives a `StatementBatch`.

    Args:
        rows: prepared rows (see `vlabs.data.features.statement_features`).
        preprocessing, images: see `TextDataset`.
        pictures: number of images per statement, p.
    """

    item = "statement"

    def __init__(
        self, rows: datasets.Dataset, preprocessing: Preprocessing, images: ImageReader, pictures: int
    ) -> None:
        super().__init__(rows, preprocessing, images)
        self.pictures = pictures

    def batch(self, spec: BatchSpec, read: BatchRows, common: dict[str, Any]) -> StatementBatch:
        """See `TextDataset`."""
        first = torch.tensor(read.image_index, dtype=torch.int64)
        return StatementBatch(
            image_index=first[:, None] + torch.arange(self.pictures),
            image_ids=image_ids(read),
            labels=torch.tensor(column(read, "label"), dtype=torch.int64),
            keys=column(read, "key"),
            **common,
        )


@dataclass(kw_only=True, eq=False, repr=False)
class StatementDataModule(TextDataModule):
    """Batches of a prepared folder of statements.

    Attributes:
        statements_per_image: statements of one image that share its first pass in a training step.

    Raises:
        UserError: see `PreparedDataModule`.
    """

    kind = "statements"
    item = "statement"
    holds = "statements with a label (data=scenes_snli_ve, scenes_nlvr2, snli_ve, nlvr2)"
    read_names = staticmethod(read_labels)

    val_split: str = "dev"
    statements_per_image: Size = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pictures = int(read_manifest(self.dir).get("pictures", 1))
        self.labels = read_labels(self.dir)

    def texts(self, rows: datasets.Dataset, training: bool) -> tuple[np.ndarray, np.ndarray]:
        """See `TextDataModule`; in training without statements whose label is not public."""
        text_rows, positions = super().texts(rows, training)
        if training:
            known = rows.data.column("label").combine_chunks().flatten().to_numpy() >= 0
            text_rows, positions = text_rows[known], positions[known]
        return text_rows, positions

    def dataset(self, rows: datasets.Dataset, images: ImageReader) -> StatementDataset:
        """See `TextDataModule`."""
        return StatementDataset(rows, self.preprocessing, images, self.pictures)
