"""Which questions form a batch: grouped by image, a pure function of (seed, epoch), and shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Group(NamedTuple):
    """One image and some of its questions: row of the split, and positions in the row's lists."""

    row: int
    questions: tuple[int, ...]


class BatchSpec(NamedTuple):
    """One batch before it is read: the epoch (augmentation depends on it), its groups, and its number in the epoch."""

    epoch: int
    groups: list[Group]
    number: int = 0


class GroupSampler(Sampler[BatchSpec]):
    """Yields the batches of an epoch as plans. Each question comes exactly once an epoch.

    Args:
        rows, positions: (Q,) for every question its row, ascending, and its position in the row.
        questions_per_image: questions of one image that go into a batch together; 0 for all of them.
        batch_size: questions a batch, at most (an image with more questions than that is a batch of its own).
        shuffle: draw the questions of a group and the order of groups anew each epoch; else keep the stored order.
        seed: of the shuffling.
        rank, world_size: this process and how many there are. Training gives every rank the same number of batches.
        lengths: (Q,) of the texts, in any unit; None to leave lengths alone.
        bucket_batches: with `lengths`, the groups of so many steps are sorted by length before they are cut into
            batches, so that a batch is padded less; the order of those batches stays random.
        shuffle_block: shuffle whole blocks of so many groups that are stored one after another, and then the groups of
            a few blocks, so that reading stays in a few places at a time; 0 to shuffle all groups.

    Attributes:
        epoch: which epoch is next.
        first: the batch of it to begin with, of this rank's; a run that was stopped in mid-epoch goes on there.
    """

    def __init__(
        self,
        rows: np.ndarray,
        positions: np.ndarray,
        questions_per_image: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        lengths: np.ndarray | None = None,
        bucket_batches: int = 0,
        shuffle_block: int = 0,
    ) -> None:
        self.shuffle_block = shuffle_block
        self.lengths, self.bucket_batches = lengths, bucket_batches
        self.rows, self.positions = rows, positions
        self.start_of_row = np.searchsorted(rows, rows)  # index of the first question of the same row
        self.per_image = questions_per_image or max(1, int(np.bincount(rows).max(initial=0)))
        self.groups_per_batch = max(1, batch_size // self.per_image)
        self.shuffle, self.seed, self.epoch, self.first = shuffle, seed, 0, 0
        self.rank, self.world_size = rank, world_size
        rank_in_row = np.arange(len(rows)) - self.start_of_row
        self.num_groups = int((rank_in_row % self.per_image == 0).sum())

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        per_step = self.groups_per_batch * self.world_size
        full, rest = divmod(self.num_groups, per_step)
        if self.shuffle:
            return full + (rest >= self.world_size)
        return full + (rest > self.rank)

    def __iter__(self) -> Iterator[BatchSpec]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = np.arange(len(self.rows))
        if self.shuffle:
            order = np.lexsort((rng.random(len(self.rows)), self.rows))
        # `order` keeps rows together, so a group is a run of per_image questions of one row.
        starts = np.flatnonzero((np.arange(len(order)) - self.start_of_row) % self.per_image == 0)
        ends = np.append(starts[1:], len(order))
        group_order = _shuffled(len(starts), self.shuffle_block, rng) if self.shuffle else np.arange(len(starts))
        per_step = self.groups_per_batch * self.world_size
        if self.lengths is not None and self.bucket_batches and len(starts):
            longest = np.maximum.reduceat(self.lengths[order], starts)
            group_order = _sort_within(group_order, longest, per_step, self.bucket_batches, rng)
        for step in range(self.first, len(self)):
            mine = group_order[step * per_step : (step + 1) * per_step][self.rank :: self.world_size]
            groups = []
            for index in mine:
                questions = order[starts[index] : ends[index]]
                groups.append(
                    Group(int(self.rows[questions[0]]), tuple(int(p) for p in np.sort(self.positions[questions])))
                )
            yield BatchSpec(self.epoch, groups, step * self.world_size + self.rank)


_OPEN_BLOCKS = 8


def _shuffled(count: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """An order of `count` things: any, or by blocks of neighbours of which a few are mixed at a time."""
    if not block or block >= count:
        return rng.permutation(count)
    first = rng.permutation(np.arange(0, count, block))
    order = np.concatenate([np.arange(start, min(start + block, count)) for start in first])
    for start in range(0, count, _OPEN_BLOCKS * block):
        rng.shuffle(order[start : start + _OPEN_BLOCKS * block])
    return order


def _sort_within(
    order: np.ndarray, lengths: np.ndarray, per_step: int, steps: int, rng: np.random.Generator
) -> np.ndarray:
    """Sort every `steps` steps of an order by length, and shuffle them; a last one that is not full stays last."""
    parts = []
    for start in range(0, len(order), steps * per_step):
        part = order[start : start + steps * per_step]
        part = part[np.argsort(lengths[part], kind="stable")]
        full = len(part) // per_step * per_step
        parts += [rng.permutation(part[:full].reshape(-1, per_step)).ravel(), part[full:]]
    return np.concatenate(parts)
