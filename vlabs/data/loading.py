"""What the data modules share: option checks, and a loader over batches that are planned by image."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from vlabs.data.prepared import read_manifest
from vlabs.data.sampling import GroupSampler
from vlabs.errors import UserError


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a UserError unless the option `data.NAME` is one of the choices."""
    if value not in choices:
        raise UserError(f"data.{name}={value}: choose one of {', '.join(choices)}")


def check_whole(name: str, number: Any, least: int) -> None:
    """Raise a UserError unless the option `data.NAME` is a whole number and at least `least`."""
    if not isinstance(number, int) or number < least:
        raise UserError(f"data.{name}={number} must be a whole number, at least {least}")


def list_texts(rows: datasets.Dataset, id_column: str) -> tuple[np.ndarray, np.ndarray]:
    """Row and position in its row of every text, both (M,), in stored order; `id_column` is the list of their ids."""
    counts = pc.list_value_length(rows.data.column(id_column)).to_numpy()
    text_rows = np.repeat(np.arange(len(counts)), counts)
    return text_rows, np.arange(len(text_rows)) - np.repeat(np.cumsum(counts) - counts, counts)


def make_loader(
    dataset: Dataset[Any],
    rows: np.ndarray,
    positions: np.ndarray,
    texts_per_image: int,
    batch_size: int,
    training: bool,
    seed: int,
    num_workers: int,
) -> DataLoader[Any]:
    """A loader of whole batches, this process's part of them; arguments as in `GroupSampler`."""
    distributed = dist.is_available() and dist.is_initialized()
    sampler = GroupSampler(
        rows,
        positions,
        texts_per_image,
        batch_size,
        shuffle=training,
        seed=seed,
        rank=dist.get_rank() if distributed else 0,
        world_size=dist.get_world_size() if distributed else 1,
    )
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=training and num_workers > 0,
    )


def identity_of(directory: str | Path) -> dict[str, Any]:
    """What a checkpoint says of a prepared folder: its name, where it was, and the hash of its manifest."""
    manifest = (Path(directory) / "manifest.json").read_bytes()
    return {
        "name": read_manifest(directory).get("name", ""),
        "dir": str(Path(directory).resolve()),
        "manifest_sha256": hashlib.sha256(manifest).hexdigest(),
    }
