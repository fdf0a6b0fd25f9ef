"""Samplers: texts are grouped by image into batches, as a pure function of (seed, epoch), and split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Group(NamedTuple):
    """One image and some of its texts: row of the split, and positions in the row's lists."""

    row: int
    questions: tuple[int, ...]


class BatchSpec(NamedTuple):
    """The plan of a batch: the epoch (augmentation depends on it), its groups, and its number in the epoch."""

    epoch: int
    groups: list[Group]
    number: int = 0


class EpochSampler(Sampler[BatchSpec]):
    """Yields this process's batches of an epoch, beginning with any of them.

    An epoch that began under other options (batch size, number of processes) continues with its remaining samples:
    none comes twice.

    Args:
        size: units in a whole epoch (groups of texts, or images).

    Attributes:
        epoch: the next epoch.
        how: everything that decides which samples form a batch; options are named as in `data.NAME`.
        before: the parts of this epoch that were given under other options, in order: their `how`, and as `given` the
            number of batches per process.
        first: the batch to begin with, counted after the parts in `before`.
    """

    how: dict[str, int]

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0
        self.before: list[dict[str, int]] = []
        self.first = 0

    @property
    def left(self) -> int:
        """Units of the epoch that `before` has left."""
        raise NotImplementedError

    def batches_of(self, size: int) -> int:
        """Number of this process's batches for `size` units."""
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
        """Make the next epoch a whole one, from its first batch."""
        self.before, self.first = [], 0

    def state_dict(self, given: int) -> dict[str, Any]:
        """The position in the epoch, as plain data.

        Args:
            given: batches that this process was given, without those of `before`.
        """
        return {"epoch": self.epoch, "parts": [*self.before, self.how | {"given": given}]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position.

        Under the options of the last part, its batches are skipped. Under other options the last part is added to
        `before`, and what it has left is divided into new batches.
        """
        *before, last = state["parts"]
        same = last == self.how | {"given": last["given"]}
        self.epoch = state["epoch"]
        self.before = before if same else [*before, last]
        self.first = last["given"] if same else 0


class GroupSampler(EpochSampler):
    """Yields the plans of the batches of an epoch. Each text comes exactly once per epoch.

    Args:
        rows, positions: (Q,), the row of each text, ascending, and its position in that row.
        questions_per_image: texts of one image that go into a batch together; 0 for all of them.
        batch_size: largest number of texts per batch (an image with more texts is a batch of its own).
        shuffle: draw the texts of each group and the order of groups anew in each epoch; else keep the stored order.
        seed: seed of the shuffling.
        rank, world_size: index of this process and number of processes. In training all ranks have the same number of
            batches; the last batch may have one group more on some ranks.
        lengths: (Q,), lengths of the texts in any unit; None to ignore lengths.
        bucket_batches: with `lengths`, sort the groups of this many steps by length before they are divided into
            batches, so that less is padded. The order of these batches stays random.
        shuffle_block: shuffle blocks of this many stored groups, then the groups of a few blocks at a time, so that
            reading stays in a few places of the file; 0 to shuffle all groups.
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
        self._left_groups: tuple[int, int, int] = (0, 0, 0)  # cache of `left`: epoch, parts in `before`, groups

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
            # If there is less than one group per process left over, the groups join the last step: all ranks must have
            # the same number of batches, or DDP would wait forever.
            return full + (rest >= self.how["processes"] or bool(rest and not full))
        return full + (rest > self.rank)

    def __iter__(self) -> Iterator[BatchSpec]:
        group_order, starts, ends, order = self._left()
        steps, world, per_step = len(self), self.how["processes"], _per_step(self.how)
        if self.shuffle and 0 < len(group_order) < world:
            # Fewer groups than processes: repeat some, because a rank without a batch would block the others.
            group_order = np.resize(group_order, world)
        for step in range(self.first, steps):
            # In training the last step takes all that is left, see `batches_of`.
            end = len(group_order) if self.shuffle and step == steps - 1 else (step + 1) * per_step
            groups = []
            for index in group_order[step * per_step : end][self.rank :: world]:
                questions = order[starts[index] : ends[index]]
                groups.append(
                    Group(int(self.rows[questions[0]]), tuple(int(p) for p in np.sort(self.positions[questions])))
                )
            yield BatchSpec(self.epoch, groups, step * world + self.rank)

    def _left(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The plan of what is left of the epoch, as returned by `_plan`.

        The parts in `before` are planned again under their own options, to find which texts they have given.
        """
        texts = np.arange(len(self.rows))
        for number, part in enumerate(self.before):
            group_order, starts, ends, order = self._plan(texts, part, number)
            given = np.zeros(len(starts), dtype=bool)
            # `given` counts batches of one process, and a step has groups for all.
            given[group_order[: part["given"] * _per_step(part)]] = True
            texts = np.sort(order[~np.repeat(given, ends - starts)])
        return self._plan(texts, self.how, len(self.before))

    def _plan(
        self, texts: np.ndarray, how: dict[str, int], number: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Divide texts into groups, and order them.

        Args:
            texts: the texts to divide, ascending.
            how: the options.
            number: index of this part in the epoch; the first is shuffled as if the epoch had no parts.

        Returns:
            The order of the groups; where each group starts and ends in the last array; and the texts, group by group.
        """
        rng = np.random.default_rng((how["seed"], self.epoch, number) if number else (how["seed"], self.epoch))
        rows = self.rows[texts]
        # By row, and at random within a row (the last key of lexsort is the first to sort by).
        order = np.lexsort((rng.random(len(rows)), rows)) if self.shuffle else np.arange(len(rows))
        # `order` keeps rows together, so a group is a run of texts of one row.
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
    """Groups per step, over all processes."""
    return max(1, how["batch_size"] // how["texts_per_image"]) * how["processes"]


def _starts_a_group(rows: np.ndarray, per_image: int) -> np.ndarray:
    """Whether a group starts at each text, if each row is divided into groups of `per_image` texts."""
    # Rows ascend, so searchsorted gives where each begins, and the difference is the place in it.
    return np.asarray((np.arange(len(rows)) - np.searchsorted(rows, rows)) % per_image == 0)


_OPEN_BLOCKS = 8  # blocks whose groups are mixed


def _shuffled(count: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of `count` things; with `block`, blocks of neighbors in random order, a few mixed at a time."""
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
    """Sort each `steps` steps of an order by length, then shuffle these steps; an incomplete last step stays last."""
    parts = []
    for start in range(0, len(order), steps * per_step):
        part = order[start : start + steps * per_step]
        part = part[np.argsort(lengths[part], kind="stable")]
        full = len(part) // per_step * per_step
        parts += [rng.permutation(part[:full].reshape(-1, per_step)).ravel(), part[full:]]
    return np.concatenate(parts)
