"""Shared by the data modules: options of the loaders, and loaders of whole batches that can resume mid-epoch."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from timm.data import create_transform
from torch.utils.data import DataLoader, Dataset

from vlabs.data.prepared import read_manifest
from vlabs.data.sampling import EpochSampler, GroupSampler
from vlabs.errors import UserError, one_line
from vlabs.utils.files import content_sha256
from vlabs.utils.options import Count, Seed, Size, Workers, checked
from vlabs.utils.ranks import rank_and_world

_M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def check_augment(name: str, value: Any) -> None:
    """Raise a UserError unless the option `data.NAME` is a valid augmentation string of timm's."""
    try:
        create_transform(32, is_training=True, auto_augment=value)
    except Exception:  # timm has no error of its own for this
        raise UserError(f"data.{name}={value} is not an augmentation of timm's: write it like rand-m9-n2") from None


@checked("data")
@dataclass(kw_only=True)
class LoaderOptions:
    """How batches are read; the options `data.NAME`.

    Attributes:
        batch_size: texts (or images without texts) per step on each device; an optimizer step has this times devices
            times `trainer.accumulate_grad_batches`.
        eval_batch_size: texts per step in evaluation; None for `batch_size`.
        num_workers: data loading processes; None for one per CPU, at most 8.
        rand_augment: timm's RandAugment for training images, such as `rand-m9-n2`; None for none.
        on_bad: what to do with images that cannot be decoded: `error` stops, `skip` leaves them out and counts them.
        scaled_decoding: in training, decode JPEGs at the smallest scale that is not below the image size; evaluation
            always decodes and resizes exactly.
        bucket_batches: above 0, sort the training texts of this many batches by length, so that less is padded;
            negatives in a batch then have similar lengths.
        shuffle_block: above 0, read the training rows in shuffled blocks of this many neighbors, for images inside
            shards; 0 shuffles all rows.
        blind: show a uniform image, of the mean color, instead of every image: what the texts give by themselves.
        seed: seed of shuffling and augmentation.

    Raises:
        UserError: an option is out of range.
    """

    batch_size: Size = 64
    eval_batch_size: Size | None = None
    num_workers: Workers | None = None
    rand_augment: str | None = None
    on_bad: Literal["error", "skip"] = "error"
    scaled_decoding: bool = True
    bucket_batches: Count = 0
    shuffle_block: Count = 0
    blind: bool = False
    seed: Seed = 0

    def __post_init__(self) -> None:
        if self.rand_augment is not None:
            check_augment("rand_augment", self.rand_augment)

    @property
    def workers(self) -> int:
        """Loader processes."""
        return min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers


def list_texts(rows: datasets.Dataset, id_column: str) -> tuple[np.ndarray, np.ndarray]:
    """Row and position in that row of every text, both (M,), in stored order; `id_column` holds the lists of ids."""
    counts = pc.list_value_length(rows.data.column(id_column)).to_numpy()
    text_rows = np.repeat(np.arange(len(counts)), counts)
    return text_rows, np.arange(len(text_rows)) - np.repeat(np.cumsum(counts) - counts, counts)


def text_lengths(rows: datasets.Dataset, column: str, text_rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Characters of the texts at these rows and positions: a cheap estimate of their number of tokens."""
    texts = rows.data.column(column)
    counts = pc.list_value_length(texts).to_numpy()
    characters: np.ndarray = pc.utf8_length(pc.list_flatten(texts)).to_numpy()
    return characters[(np.cumsum(counts) - counts)[text_rows] + positions]


class GroupLoader(DataLoader[Any]):
    """A training loader that knows its position in the epoch, so that a run can resume with the next batch.

    It does not draw from the global generator.

    Attributes:
        groups: sampler of the batches of an epoch.
        begun: batches that `__len__` adds for the part of the epoch that was given under other options
            (`groups.before`); 0 for a whole epoch.
    """

    def __init__(self, dataset: Dataset[Any], sampler: EpochSampler, num_workers: int) -> None:
        super().__init__(
            dataset,
            sampler=sampler,
            persistent_workers=num_workers > 0,
            **_loader_options(num_workers, sampler.how["seed"]),
        )
        self.groups = sampler
        self.begun = self.given = 0

    @property
    def whole_length(self) -> int:
        """Batches of a whole epoch."""
        return self.groups.whole_length

    def __len__(self) -> int:
        return self.begun + len(self.groups)

    def __iter__(self) -> Any:
        # A generator function, so that workers start an epoch only when its first batch is requested: Lightning makes
        # the iterator before it calls `set_epoch`.
        self.given = self.groups.first
        for batch in super().__iter__():
            self.given += 1
            yield batch
        self.begin()

    def begin(self) -> None:
        """Make the next epoch a whole one."""
        self.groups.begin()
        self.begun = 0

    def state_dict(self) -> dict[str, Any]:
        """The epoch, and how many of its batches were given."""
        return self.groups.state_dict(self.given)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches that were given; with the next epoch if none are left."""
        self.groups.load_state_dict(state)
        self.given = self.groups.first
        if self.given >= len(self.groups):
            self.begin()


def _loader_options(num_workers: int, seed: int) -> dict[str, Any]:
    """Arguments of torch's loader that all loaders of whole batches share."""
    return {
        "batch_size": None,
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _start_worker,
        "generator": torch.Generator().manual_seed(seed),
    }


def _start_worker(worker: int) -> None:
    """Set up a loader process.

    A terminal sends Ctrl-C to loader processes too; only the main process should handle it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Queue._on_queue_feeder_error = staticmethod(_end_worker)  # type: ignore[attr-defined]
    _keep_memory_flat()


def _end_worker(error: BaseException, batch: Any) -> None:
    """End a loader process that cannot hand over a batch, for which the main process would wait forever.

    Batches go through files in /dev/shm, which may be full.
    """
    os.write(2, f"a loader process cannot hand over a batch (is /dev/shm full?): {one_line(str(error))}\n".encode())
    os._exit(1)


def _keep_memory_flat() -> None:
    """Make a loader process return the memory of images and batches to the system at once.

    By default glibc raises this threshold whenever a large block is freed, and keeps the memory of smaller ones. A
    process then grows to several times its size within an epoch (see `benchmarks/loader.py --memory`).
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 256 * 1024)


def make_loader(
    dataset: Dataset[Any],
    rows: datasets.Dataset,
    column: str,
    text_rows: np.ndarray,
    positions: np.ndarray,
    options: LoaderOptions,
    training: bool,
    texts_per_image: int = 1,
) -> DataLoader[Any]:
    """A loader of this process's share of whole batches.

    Args:
        dataset: gives the batch of a `BatchSpec`.
        rows: prepared rows.
        column: name of the column with the lists of texts.
        text_rows, positions: (M,) rows and positions of the texts, see `list_texts`.
        options: options of the loaders.
        training: shuffle, with few texts per image in a batch; else keep the stored order, with all texts of an image
            together.
        texts_per_image: texts of one image that share its first pass in a training step.
    """
    rank, world_size = rank_and_world()
    buckets = training and options.bucket_batches
    sampler = GroupSampler(
        text_rows,
        positions,
        texts_per_image if training else 0,
        options.batch_size if training else options.eval_batch_size or options.batch_size,
        shuffle=training,
        seed=options.seed,
        rank=rank,
        world_size=world_size,
        lengths=text_lengths(rows, column, text_rows, positions) if buckets else None,
        bucket_batches=options.bucket_batches,
        shuffle_block=options.shuffle_block,
    )
    if training:
        return GroupLoader(dataset, sampler, options.workers)
    return eval_loader(dataset, sampler, options)


def eval_loader(dataset: Dataset[Any], sampler: Iterable[Any], options: LoaderOptions) -> DataLoader[Any]:
    """A loader of whole batches, or of whatever a sampler yields, in the sampler's order."""
    return DataLoader(dataset, sampler=sampler, **_loader_options(options.workers, options.seed))


def identity_of(directory: str | Path) -> dict[str, Any]:
    """Identity of a prepared folder for checkpoints: its name, its path, and the hash of its manifest."""
    return {
        "name": read_manifest(directory).get("name", ""),
        "dir": str(Path(directory).resolve()),
        "manifest_sha256": content_sha256(Path(directory) / "manifest.json"),
    }
