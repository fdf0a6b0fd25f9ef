"""Shared by data of images without texts (a class per image or per pixel): order of an epoch, reading, loaders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import datasets
import numpy as np
from PIL import Image
from timm.data.distributed_sampler import RepeatAugSampler
from torch.utils.data import DataLoader, Dataset

from vlabs.data.images import name_of, read_bytes
from vlabs.data.loading import GroupLoader, eval_loader
from vlabs.data.module import PreparedDataModule
from vlabs.data.prepared import read_classes
from vlabs.data.preprocessing import Preprocessing, decode_image
from vlabs.data.sampling import BatchSpec, EpochSampler, Group
from vlabs.errors import UserError, show
from vlabs.utils.ranks import rank_and_world


class ImageSampler(EpochSampler):
    """Yields this process's batches of an epoch, as a pure function of (seed, epoch).

    Args:
        count: number of images.
        batch_size: images per batch; in training the last batch is left out if it is not full.
        training: shuffle; else keep the stored order.
        seed: seed of the order.
        repeats: as in `Augmentation`; uses timm's sampler.
    """

    def __init__(self, count: int, batch_size: int, training: bool, seed: int, repeats: int = 1) -> None:
        super().__init__(count)
        self.batch_size, self.training, self.seed, self.repeats = batch_size, training, seed, repeats
        self.rank, self.world_size = rank_and_world()
        self.how = {"pictures": count, "batch_size": batch_size, "processes": self.world_size, "seed": seed}

    @property
    def left(self) -> int:
        """See `EpochSampler`."""
        return max(0, self.size - self._given)

    def batches_of(self, size: int) -> int:
        """See `EpochSampler`."""
        if not self.training:
            return -(-len(range(self.rank, size, self.world_size)) // self.batch_size)
        return size // self.world_size // self.batch_size

    @property
    def _given(self) -> int:
        """Number of images that were already given in this epoch.

        The order does not depend on batch size or number of processes, so these are always its first images.
        """
        return sum(part["given"] * part["batch_size"] * part["processes"] for part in self.before)

    def _order(self) -> list[int]:
        if not self.training:
            return list(range(self.rank, self.size, self.world_size))
        seed = self.before[0]["seed"] if self.before else self.seed
        if self.repeats > 1:
            sampler = RepeatAugSampler(
                range(self.size), self.world_size, self.rank, num_repeats=self.repeats, selected_round=0
            )
            sampler.set_epoch(self.epoch + 1_000_003 * seed)  # timm's sampler has no seed of its own
            return list(sampler)[self._given // self.world_size :]
        order = np.random.default_rng((seed, self.epoch)).permutation(self.size)[self._given :]
        whole = len(order) - len(order) % self.world_size
        return [int(n) for n in order[:whole][self.rank :: self.world_size]]

    def __iter__(self) -> Iterator[BatchSpec]:
        order = self._order()
        for step in range(self.first, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            groups = [Group(number, (0,)) for number in chosen]
            yield BatchSpec(self.epoch, groups, step * self.world_size + self.rank)


class PictureDataset(Dataset[Any]):
    """Reads whole batches: indexed by a `BatchSpec`.

    Args:
        rows: prepared rows.
        preprocessing: turns images into tensors; has the names of the classes.
        seed: seed of the augmentation, which is a function of (seed, epoch, batch, place in the batch).
        on_bad: `error`, or `skip` to leave out images that cannot be decoded.
    """

    def __init__(
        self, rows: datasets.Dataset, preprocessing: Preprocessing, seed: int = 0, on_bad: str = "error"
    ) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        self.seed = seed
        self.on_bad = on_bad

    def read(self, row: dict[str, Any]) -> Image.Image | None:
        """Decode the image of a row; None if it is left out.

        Raises:
            UserError: it cannot be decoded, and `on_bad` is not `skip`.
        """
        try:
            return decode_image(read_bytes(row), name_of(row))
        except UserError as error:
            if self.on_bad != "skip":
                raise UserError(f"{error}; replace it, or pass data.on_bad=skip") from None
            show(f"left out: {error}", file=sys.stderr)
            return None

    def key(self, spec: BatchSpec, place: int) -> tuple[int, ...]:
        """The seed of what is drawn at a place of a batch."""
        return self.seed, spec.epoch, spec.number, place


class PictureDataModule(PreparedDataModule):
    """Batches of a prepared folder of images without texts. Subclasses say which `dataset` reads them.

    Raises:
        UserError: see `PreparedDataModule`; or the classes are not those of the checkpoint.
    """

    unused: ClassVar[tuple[str, ...]] = ("max_length", "tokenizer", "rand_augment", "scaled_decoding", "bucket_batches",
              "shuffle_block", "blind")  # fmt: skip
    read_names = staticmethod(read_classes)
    repeats = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        names = tuple(read_classes(self.dir))
        if names != self.preprocessing.names:
            raise UserError(f"{self.dir} has {len(names)} classes, which are not those of the checkpoint")

    def of_texts(self) -> dict[str, Any]:
        """See `PreparedDataModule`."""
        return {"tokenizer": ""}

    def dataset(self, rows: datasets.Dataset, training: bool) -> PictureDataset:
        """The dataset that reads batches of these rows."""
        raise NotImplementedError

    @property
    def eval_size(self) -> int:
        """Images per step in evaluation, on each device."""
        return self.eval_batch_size or self.batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """Full training batches."""
        rows = self.rows("train")
        sampler = ImageSampler(len(rows), self.batch_size, True, self.seed, self.repeats)
        if not len(sampler):
            raise UserError(
                f"{self.dir} has {len(rows)} images to train on, fewer than data.batch_size={self.batch_size}"
            )
        return GroupLoader(self.dataset(rows, True), sampler, self.workers)

    def eval_dataloader(self, split: str) -> DataLoader[Any]:
        """All images of a split, in stored order."""
        rows = self.rows(split)
        sampler = ImageSampler(len(rows), self.eval_size, False, self.seed)
        return eval_loader(self.dataset(rows, False), sampler, self)
