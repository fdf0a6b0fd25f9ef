"""Which questions form a batch: grouped by image, a pure function of (seed, epoch), and shared out over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

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


class EpochSampler(Sampler[BatchSpec]):
    """Yields the batches of an epoch, this process's part of them, from any of them on.

    An epoch that was begun under other options (another batch size, another number of processes) goes on with what is
    left of it: what was given does not come again.

    Args:
        size: of a whole epoch, in what is shared out (groups of texts, images).

    Attributes:
        epoch: which epoch is next.
        how: all that decides which texts or images form a batch, by the names of `data.NAME` where it is an option.
        before: how the epoch was shared out by other options until now, in order: their `how`, and as `given` how many
            batches every process got.
        first: the batch to begin with, of what `before` left.
    """

    how: dict[str, int]

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0
        self.before: list[dict[str, int]] = []
        self.first = 0

    @property
    def left(self) -> int:
        """Of `size`, what `before` left."""
        raise NotImplementedError

    def batches_of(self, size: int) -> int:
        """In how many batches of this process so much is shared out."""
        raise NotImplementedError

    @property
    def whole_length(self) -> int:
        """Batches of a whole epoch."""
        return self.batches_of(self.size)

    def __len__(self) -> int:
        return self.batches_of(self.left if self.before else self.size)

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this at the start of every epoch."""
        self.epoch = epoch

    def begin(self) -> None:
        """Make the next epoch a whole one."""
        self.before, self.first = [], 0

    def state_dict(self, given: int) -> dict[str, Any]:
        """Where the epoch is, as plain data.

        Args:
            given: batches of this process that were given, of those after `before`.
        """
        return {"epoch": self.epoch, "parts": [*self.before, self.how | {"given": given}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there."""
        *before, last = state["parts"]
        same = last == self.how | {"given": last["given"]}
        self.epoch = state["epoch"]
        self.before = before if same else [*before, last]
        self.first = last["given"] if same else 0


class GroupSampler(EpochSampler):
    """Yields the batches of an epoch as plans. Each question comes exactly once an epoch.

    Args:
        rows, positions: (Q,) for every question its row, ascending, and its position in the row.
        questions_per_image: questions of one image that go into a batch together; 0 for all of them.
        batch_size: questions a batch, at most (an image with more questions than that is a batch of its own).
        shuffle: draw the questions of a group and the order of groups anew each epoch; else keep the stored order.
        seed: of the shuffling.
        rank, world_size: this process and how many there are. Training gives every rank the same number of batches, of
            which the last may have a group more than others.
        lengths: (Q,) of the texts, in any unit; None to leave lengths alone.
        bucket_batches: with `lengths`, the groups of so many steps are sorted by length before they are cut into
            batches, so that a batch is padded less; the order of those batches stays random.
        shuffle_block: shuffle whole blocks of so many groups that are stored one after another, and then the groups of
            a few blocks, so that reading stays in a few places at a time; 0 to shuffle all groups.
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
        per_image = questions_per_image or max(1, int(np.bincount(rows).max(initial=0)))
        super().__init__(int(_starts_a_group(rows, per_image).sum()))
        self.rows, self.positions, self.lengths = rows, positions, lengths
        self.rank, self.shuffle = rank, shuffle
        self.how = {
            "texts": len(rows),
            "texts_per_image": per_image,
            "batch_size": batch_size,
            "processes": world_size,
            "bucket_batches": bucket_batches,
            "shuffle_block": shuffle_block,
            "seed": seed,
        }
        self._left_groups: tuple[int, int, int] = (0, 0, 0)  # of which epoch and how many options before, and how many

    @property
    def left(self) -> int:
        """See `EpochSampler`."""
        if self._left_groups[:2] != (self.epoch, len(self.before)):
            self._left_groups = (self.epoch, len(self.before), len(self._left()[0]))
        return self._left_groups[2]

    def batches_of(self, size: int) -> int:
        """See `EpochSampler`."""
        full, rest = divmod(size, _per_step(self.how))
        if self.shuffle:
            # Too few groups for a step of their own go into the last one.
            return full + (rest >= self.how["processes"] or bool(rest and not full))
        return full + (rest > self.rank)

    def __iter__(self) -> Iterator[BatchSpec]:
        group_order, starts, ends, order = self._left()
        steps, world, per_step = len(self), self.how["processes"], _per_step(self.how)
        if self.shuffle and 0 < len(group_order) < world:
            group_order = np.resize(group_order, world)  # every process has a batch, or the others would wait for it
        for step in range(self.first, steps):
            end = len(group_order) if self.shuffle and step == steps - 1 else (step + 1) * per_step
            groups = []
            for index in group_order[step * per_step : end][self.rank :: world]:
                questions = order[starts[index] : ends[index]]
                groups.append(
                    Group(int(self.rows[questions[0]]), tuple(int(p) for p in np.sort(self.positions[questions])))
                )
            yield BatchSpec(self.epoch, groups, step * world + self.rank)

    def _left(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What is left of the epoch, as of `_plan`."""
        texts = np.arange(len(self.rows))
        for number, part in enumerate(self.before):
            group_order, starts, ends, order = self._plan(texts, part, number)
            given = np.zeros(len(starts), dtype=bool)
            given[group_order[: part["given"] * _per_step(part)]] = True
            texts = np.sort(order[~np.repeat(given, ends - starts)])
        return self._plan(texts, self.how, len(self.before))

    def _plan(
        self, texts: np.ndarray, how: dict[str, int], number: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The order in which groups come; and where each starts and ends in the texts as they come, the last array.

        Args:
            texts: which ones are to be shared out, ascending.
            how, number: by which options; the how manieth of the epoch these are.
        """
        rng = np.random.default_rng((how["seed"], self.epoch, number) if number else (how["seed"], self.epoch))
        rows = self.rows[texts]
        order = np.lexsort((rng.random(len(rows)), rows)) if self.shuffle else np.arange(len(rows))
        # `order` keeps rows together, so a group is a run of questions of one row.
        starts = np.flatnonzero(_starts_a_group(rows, how["texts_per_image"]))
        ends = np.append(starts[1:], len(order))
        order = texts[order]
        count = len(starts)
        group_order = _shuffled(count, how["shuffle_block"], rng) if self.shuffle else np.arange(count)
        if self.lengths is not None and how["bucket_batches"] and count:
            longest = np.maximum.reduceat(self.lengths[order], starts)
            group_order = _sort_within(group_order, longest, _per_step(how), how["bucket_batches"], rng)
        return group_order, starts, ends, order


def _per_step(how: dict[str, int]) -> int:
    """Groups of a step, of all processes."""
    return max(1, how["batch_size"] // how["texts_per_image"]) * how["processes"]


def _starts_a_group(rows: np.ndarray, per_image: int) -> np.ndarray:
    """Of every question whether a group starts with it, where `per_image` of a row follow one another."""
    return np.asarray((np.arange(len(rows)) - np.searchsorted(rows, rows)) % per_image == 0)


_OPEN_BLOCKS = 8


def _shuffled(count: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """An order of `count` things: any, or by blocks of neighbors of which a few are mixed at a time."""
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
