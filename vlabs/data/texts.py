"""The base of questions, captions and statements: batches of texts whose images are read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlabs.data.images import BatchRows, ImageReader
from vlabs.data.loading import list_texts, make_loader
from vlabs.data.module import PreparedDataModule
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec
from vlabs.data.words import MOST, words_in
from vlabs.errors import UserError


class TextDataset(Dataset[Any]):
    """Reads whole batches, indexed by a `BatchSpec`. Subclasses define the `batch` of a kind of text.

    Args:
        rows: prepared rows with texts in the column `item`, and their ids in the column `item` + `_id`.
        preprocessing: turns images and texts into tensors; has the names of answers or labels.
        images: reads the images of these rows; None to read them as in evaluation.
    """

    item: ClassVar[str]

    def __init__(self, rows: datasets.Dataset, preprocessing: Preprocessing, images: ImageReader | None = None) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        self.images = images or ImageReader(rows, preprocessing)

    def __getitem__(self, spec: BatchSpec) -> Any:
        read = self.images.read_batch(spec)
        input_ids, attention_mask = self.tokens(column(read, self.item))
        return self.batch(
            spec,
            read,
            {
                "images": read.images,
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "coverage": self.images.coverage(read.texts, spec.epoch),
                "skipped": read.skipped,
                f"{self.item}_ids": column(read, f"{self.item}_id"),
            },
        )

    def batch(self, spec: BatchSpec, read: BatchRows, common: dict[str, Any]) -> Any:
        """Make a batch from what was read; `common` has the fields of all kinds of text."""
        raise NotImplementedError

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`input_ids` and `attention_mask` of n texts, both (n, T)."""
        return self.preprocessing.pad(self.preprocessing.token_ids(texts))


def column(read: BatchRows, name: str) -> list[Any]:
    """The values of a list column for the texts of a batch."""
    return [row[name][position] for _, row, position in read.texts]


def image_ids(read: BatchRows) -> Tensor:
    """The dataset's id of each text's image, (n,)."""
    return torch.tensor([row["image_id"] for _, row, _ in read.texts], dtype=torch.int64)


class TextDataModule(PreparedDataModule):
    """Batches of prepared folders of texts. Subclasses say which `dataset` reads them.

    The option `questions_per_image`, `captions_per_image`, ... sets how many texts of one image share its first pass
    in a training step.
    """

    def dataset(self, rows: datasets.Dataset, images: ImageReader) -> TextDataset:
        """The dataset that reads batches of these rows."""
        raise NotImplementedError

    def texts(self, rows: datasets.Dataset, training: bool) -> tuple[np.ndarray, np.ndarray]:
        """Row and position in that row of each text to read, both (M,)."""
        return list_texts(rows, f"{self.item}_id")

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches: each text once per epoch."""
        return self.loader(self.rows("train"), training=True)

    def eval_dataloader(self, split: str) -> DataLoader[Any]:
        """All texts of a split, in stored order, the texts of an image together."""
        return self.loader(self.rows(split), training=False)

    def extent(self) -> dict[str, Any]:
        """See `PreparedDataModule`. `words` is one string of all words, sorted, unless they are too many."""
        rows = self.rows(self.train_split)
        words: set[str] = set()
        for chunk in rows.data.column(self.item).chunks:
            words |= words_in(pc.unique(chunk.flatten()).to_pylist())
        known = {"words": " ".join(sorted(words))} if len(words) <= MOST else {}
        return super().extent() | {f"{self.item}s": len(self.texts(rows, training=True)[0])} | known

    def most_frequent(self, words: set[str], count: int) -> list[str]:
        """The `count` of these words that most training texts have, the most frequent first."""
        counts: Counter[str] = Counter()
        for chunk in self.rows(self.train_split).data.column(self.item).chunks:
            for text in chunk.flatten().to_pylist():
                counts.update(words_in([text]) & words)
        return [word for word, _ in sorted(counts.items(), key=lambda found: (-found[1], found[0]))[:count]]

    def loader(self, rows: datasets.Dataset, training: bool) -> DataLoader[Any]:
        """A loader of whole batches; see `make_loader`.

        Raises:
            UserError: there are no texts.
        """
        text_rows, positions = self.texts(rows, training)
        if not len(text_rows):
            raise UserError(f"{self.dir} has no {self.item} to {'train on' if training else 'evaluate'}")
        per_image: int = getattr(self, f"{self.item}s_per_image")
        dataset = self.dataset(rows, self.image_reader(rows, training))
        return make_loader(dataset, rows, self.item, text_rows, positions, self, training, per_image)

    def image_reader(self, rows: datasets.Dataset, training: bool) -> ImageReader:
        """The reader of these rows' images. Only in training they are augmented and decoded at a smaller scale."""
        return ImageReader(
            rows,
            self.preprocessing,
            self.rand_augment if training else None,
            self.seed,
            self.on_bad,
            training and self.scaled_decoding,
            self.wants.region_grid if training or self.wants.regions_in_validation else None,
            self.wants.region_sets,
            self.pictures,
            self.wants.stored() if self.wants.stored else None,
            self.blind,
        )
