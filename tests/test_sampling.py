"""Batches: every question once an epoch, shared out over ranks, a function of seed and epoch."""

import numpy as np
import pytest

from vlabs.data.sampling import GroupSampler

COUNTS = [5, 1, 0, 7, 3]
ROWS = np.repeat(np.arange(5), COUNTS)
POSITIONS = np.concatenate([np.arange(count) for count in COUNTS])
ALL = sorted(zip(ROWS.tolist(), POSITIONS.tolist(), strict=True))


def sampler(per_image=2, batch_size=4, shuffle=True, seed=0, **ranks):
    return GroupSampler(ROWS, POSITIONS, per_image, batch_size, shuffle, seed, **ranks)


def questions(sampler):
    return [(g.row, q) for plan in sampler for g in plan.groups for q in g.questions]


@pytest.mark.parametrize("per_image", [0, 1, 2, 3])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_question_comes_exactly_once(per_image, shuffle):
    made = sampler(per_image, shuffle=shuffle)
    assert sorted(questions(made)) == ALL
    assert len(list(made)) == len(made)


def test_a_batch_holds_at_most_batch_size_questions_and_k_of_an_image():
    for plan in sampler(per_image=2, batch_size=5):
        assert sum(len(g.questions) for g in plan.groups) <= 5
        assert all(1 <= len(g.questions) <= 2 for g in plan.groups)


def test_order_is_a_function_of_seed_and_epoch():
    made, again, other = sampler(seed=1), sampler(seed=1), sampler(seed=2)
    assert questions(made) == questions(again) != questions(other)
    first = questions(made)
    made.set_epoch(1)
    assert questions(made) != first
    again.set_epoch(1)
    assert questions(made) == questions(again)
    assert {plan.epoch for plan in made} == {1}


@pytest.mark.parametrize("world_size", [1, 2])
def test_texts_of_similar_length_come_together_and_each_once(world_size):
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 6, 300)
    rows = np.repeat(np.arange(300), counts)
    positions = np.concatenate([np.arange(count) for count in counts])
    lengths = rng.integers(4, 40, len(rows))
    length_of = {(r, p): n for r, p, n in zip(rows.tolist(), positions.tolist(), lengths.tolist(), strict=True)}

    def plans(bucket_batches, epoch=0):
        ranks = [
            GroupSampler(rows, positions, 1, 16, True, 3, rank, world_size, lengths, bucket_batches)
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.set_epoch(epoch)
        return [list(rank) for rank in ranks]

    def padded(found):
        return sum(
            max(length_of[g.row, q] for g in plan.groups for q in g.questions) * len(plan.groups)
            for rank in found
            for plan in rank
        )

    bucketed = plans(10)
    seen = [(g.row, q) for rank in bucketed for plan in rank for g in plan.groups for q in g.questions]
    assert len(seen) == len(set(seen)) >= len(rows) - 16 * world_size
    assert len({len(rank) for rank in bucketed}) == 1
    assert padded(bucketed) < 0.75 * padded(plans(0))
    firsts = [length_of[plan.groups[0].row, plan.groups[0].questions[0]] for plan in bucketed[0]]
    assert firsts != sorted(firsts)  # batches themselves are not in order of length
    assert plans(10) == bucketed != plans(10, epoch=1)


def test_ranks_share_training_with_equal_numbers_of_batches():
    ranks = [sampler(rank=rank, world_size=2) for rank in range(2)]
    assert len(list(ranks[0])) == len(list(ranks[1])) == len(ranks[0])
    together = questions(ranks[0]) + questions(ranks[1])
    assert len(together) == len(set(together)) >= len(ALL) - 2


def test_ranks_share_evaluation_without_dropping_or_repeating():
    ranks = [sampler(per_image=0, batch_size=7, shuffle=False, rank=rank, world_size=3) for rank in range(3)]
    assert sorted(sum((questions(rank) for rank in ranks), [])) == ALL
    assert all(len(list(rank)) == len(rank) for rank in ranks)
