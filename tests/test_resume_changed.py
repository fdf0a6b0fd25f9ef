"""A run that continues under other options: every text once, rates where the training is, and a line that says it."""

from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlabs.data.loading import LoaderOptions, make_loader
from vlabs.data.pictures import ImageSampler
from vlabs.data.sampling import GroupSampler
from vlabs.errors import UserError
from vlabs.tasks.optim import Course, Recipe
from vlabs.training.callbacks.averaging import WeightAverage
from vlabs.training.callbacks.checkpoints import KeepLast, WholeCheckpointIO
from vlabs.training.callbacks.resume import GoOn

TEXTS = 24


class Rows(torch.utils.data.Dataset):
    """The rows of a plan, as numbers."""

    def __getitem__(self, plan):
        return torch.tensor([[float(group.row)] for group in plan.groups])


class Small(pl.LightningModule):
    """A model of two numbers under METER's schedule, that remembers what it was given and at which rate."""

    def __init__(self, recipe):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.recipe = recipe
        self.seen, self.rates, self.validated = [], {}, []

    def training_step(self, rows, batch_idx):
        self.seen += [(self.trainer.current_epoch, int(row)) for row in rows]
        self.rates[self.trainer.global_step] = self.trainer.optimizers[0].param_groups[0]["lr"]
        return (self.layer(rows) * torch.rand_like(rows)).square().mean()

    def validation_step(self, rows, batch_idx):
        self.log("val/loss", self.layer(rows).square().mean())

    def on_validation_end(self):
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self):
        optimizer = self.recipe.optimizer(self, lambda name: "head")
        schedule = self.recipe.scheduler(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StopAt(pl.Callback):
    """Stops a training as Lightning's timer does."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == self.step


def fit(folder, start_from=None, stop_at=None, batch_size=3, texts=TEXTS, lr=1.0, data=None, ema=False, **options):
    """Train; the model with what it saw, and the last checkpoint."""
    folder.mkdir()
    pl.seed_everything(1, verbose=False)
    rows = np.arange(texts)
    of_training = LoaderOptions(batch_size=batch_size, num_workers=0, **data or {})
    loaders = [make_loader(Rows(), None, "", rows, rows * 0, of_training, training) for training in (True, False)]
    model = Small(Recipe(lr={"head": lr}, warmup=0.25))
    keeps = KeepLast(folder / "last.ckpt")
    trainer = pl.Trainer(
        **{"max_epochs": 4, **options}, accelerator="cpu", logger=False, plugins=[WholeCheckpointIO()],
        callbacks=[keeps, GoOn(), StopAt(stop_at), *[WeightAverage(0.5)] * ema],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    try:
        trainer.fit(model, *loaders, ckpt_path=start_from, weights_only=True)
    finally:
        keeps.listen_no_more()
    return model, folder / "last.ckpt"


def epochs_of(*models):
    """What came in each epoch, in order of the numbers of the texts."""
    seen = [one for model in models for one in model.seen]
    return [sorted(row for epoch, row in seen if epoch == number) for number in range(1 + max(seen)[0])]


def factor(share):
    """METER's schedule by the share of the training that is done: a quarter of warm-up, then down to 0."""
    return share / 0.25 if share < 0.25 else (1 - share) / 0.75


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 6}, "data.batch_size=6, was 3"),
        ({"batch_size": 2}, "data.batch_size=2, was 3"),
        ({"batch_size": 100}, "data.batch_size=100, was 3"),
        ({"accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches=2, was 1"),
        ({"batch_size": 1, "accumulate_grad_batches": 3}, "data.batch_size=1, was 3"),
        ({"data": {"seed": 5}}, "data.seed=5, was 0"),
        ({"data": {"shuffle_block": 2}}, "data.shuffle_block=2, was 0"),
        ({"val_check_interval": 0.5, "batch_size": 2}, "data.batch_size=2, was 3"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stop_at", [11, 16])
def test_with_another_size_of_steps_every_text_comes_once_and_rates_continue(change, said, stop_at, tmp_path, capsys):
    first, last = fit(tmp_path / "a", stop_at=stop_at)  # of 32 steps, 8 an epoch
    then, _ = fit(tmp_path / "b", start_from=last, **change)
    assert epochs_of(first, then) == [list(range(TEXTS))] * 4
    steps = sorted(then.rates)
    done = stop_at / 32
    expected = [factor(done + (1 - done) * (step - stop_at) / (then.global_step - stop_at)) for step in steps]
    assert [then.rates[step] for step in steps] == pytest.approx(expected, abs=1e-9)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("resuming")]
    assert said in line
    assert f"after {100 * done:.1f}% of the training" in line


def test_stopped_again_and_again_under_other_options_it_is_the_run_that_it_would_have_been(tmp_path):
    first, last = fit(tmp_path / "a", stop_at=10)
    whole, _ = fit(tmp_path / "whole", start_from=last, batch_size=2, accumulate_grad_batches=2)
    parts, number = [first], 0
    while last is not None and parts[-1].global_step < whole.global_step:
        number += 1
        stop_at = parts[-1].global_step + 2
        part, last = fit(
            tmp_path / str(number), start_from=last, stop_at=stop_at, batch_size=2, accumulate_grad_batches=2
        )
        parts.append(part)
    assert sum((part.seen for part in parts[1:]), []) == whole.seen
    assert {step: rate for part in parts[1:] for step, rate in part.rates.items()} == whole.rates
    assert torch.equal(parts[-1].layer.weight, whole.layer.weight)
    assert torch.equal(parts[-1].layer.bias, whole.layer.bias)


def test_back_and_forth_in_one_epoch_no_text_is_lost_or_comes_twice(tmp_path):
    models, last = [], None
    for number, (batch_size, stop_at) in enumerate([(3, 2), (2, 4), (3, 6), (1, 9), (24, None)]):
        model, last = fit(tmp_path / str(number), start_from=last, stop_at=stop_at, batch_size=batch_size, max_epochs=2)
        models.append(model)
    assert epochs_of(*models) == [list(range(TEXTS))] * 2


def test_under_a_limit_of_batches_the_epoch_continues_by_its_share(tmp_path):
    first, last = fit(tmp_path / "a", stop_at=6, limit_train_batches=4, max_epochs=3)
    then, _ = fit(tmp_path / "b", start_from=last, limit_train_batches=8, batch_size=1, max_epochs=3)
    epochs = [[row for epoch, row in [*first.seen, *then.seen] if epoch == number] for number in range(3)]
    assert [len(rows) for rows in epochs] == [12, 6 + 4, 8]
    assert all(len(rows) == len(set(rows)) for rows in epochs)
    assert then.rates[6] == pytest.approx(factor(0.5))


@pytest.mark.parametrize(
    ("before", "after", "stopped", "steps"),
    [
        ({"max_epochs": 2}, {"max_epochs": 4}, 16, 32),
        ({"max_epochs": 4, "stop_at": 11}, {"max_epochs": 8}, 11, 64),
        ({"max_epochs": None, "max_steps": 11}, {"max_epochs": None, "max_steps": 30}, 11, 30),
        ({"max_epochs": None, "max_steps": 16}, {"max_epochs": None, "max_steps": 30}, 16, 30),
        ({"max_epochs": 1, "max_steps": 5}, {"max_epochs": 4, "max_steps": 30}, 5, 30),
        ({"max_epochs": 4, "max_steps": 5}, {"max_epochs": 4, "max_steps": -1}, 5, 32),
        ({"max_epochs": 4, "max_steps": 13, "limit_val_batches": 0}, {"max_epochs": 2}, 13, 16),
    ],
    ids=str,
)
def test_more_epochs_or_steps_are_the_longer_training_from_here_on(before, after, stopped, steps, tmp_path):
    first, last = fit(tmp_path / "a", **before)
    assert first.global_step == stopped
    then, _ = fit(tmp_path / "b", start_from=last, **after)
    whole, _ = fit(tmp_path / "whole", **after)
    assert then.global_step == whole.global_step == steps
    assert first.seen + then.seen == whole.seen
    assert then.rates == pytest.approx({step: rate for step, rate in whole.rates.items() if step >= stopped})


def test_a_training_that_steps_end_validates_at_its_end_and_does_nothing_more_when_it_is_resumed(tmp_path):
    first, last = fit(tmp_path / "a", max_steps=11)
    assert first.validated == [8, 11]
    again, _ = fit(tmp_path / "b", start_from=last, max_steps=11)
    assert (again.seen, again.validated) == ([], [])


def test_a_rate_of_the_config_is_the_rate_of_the_run_that_continues(tmp_path, capsys):
    _, last = fit(tmp_path / "a", stop_at=16)
    then, _ = fit(tmp_path / "b", start_from=last, lr=0.1)
    assert then.rates[16] == pytest.approx(0.1 * factor(0.5))
    assert "task.recipe.lr.head=0.1, was 1.0" in capsys.readouterr().out
    same, _ = fit(tmp_path / "c", start_from=last)
    assert same.rates[16] == pytest.approx(factor(0.5))
    assert "resuming" not in capsys.readouterr().out


def test_other_data_are_refused(tmp_path):
    _, last = fit(tmp_path / "a", stop_at=11)
    with pytest.raises(UserError, match=f"texts={TEXTS + 1}, was {TEXTS}"):
        fit(tmp_path / "b", start_from=last, texts=TEXTS + 1)


@pytest.mark.parametrize("stop_at", [3, 8, 11])
def test_a_moving_average_continues_bit_for_bit(stop_at, tmp_path):
    whole, end = fit(tmp_path / "whole", ema=True, max_epochs=2)
    _, last = fit(tmp_path / "a", ema=True, max_epochs=2, stop_at=stop_at, limit_val_batches=0)
    then, end_again = fit(tmp_path / "b", ema=True, max_epochs=2, start_from=last)
    states = [torch.load(path, weights_only=True) for path in (end, end_again)]
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert states[0][part].keys() == states[1][part].keys()
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items()), part
    assert torch.equal(whole.layer.weight, then.layer.weight)  # the average, at the end


HOW = st.fixed_dictionaries({
    "questions_per_image": st.sampled_from([0, 1, 2, 3]), "batch_size": st.sampled_from([1, 2, 5, 16, 90]),
    "world_size": st.sampled_from([1, 2, 3]), "bucket_batches": st.sampled_from([0, 2]),
    "shuffle_block": st.sampled_from([0, 3]), "seed": st.sampled_from([0, 1]),
})  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    hows=st.lists(st.tuples(HOW, st.integers(0, 4)), min_size=1, max_size=4),
    counts=st.lists(st.integers(0, 5), min_size=6, max_size=20),
)
def test_however_often_the_options_change_in_an_epoch_every_text_comes_once(hows, counts):
    rows = np.repeat(np.arange(len(counts)), counts)
    positions = np.concatenate([np.arange(count) for count in counts])
    seen, state, needed = [], None, 0
    for number, (how, steps) in enumerate(hows):
        ranks = [
            GroupSampler(rows, positions, shuffle=True, rank=rank, lengths=np.arange(len(rows)), **how)
            for rank in range(how["world_size"])
        ]
        for rank in ranks:
            rank.set_epoch(3)
            if state is not None:
                rank.load_state_dict(state)
        plans = [list(rank) for rank in ranks]
        assert {len(plan) + rank.first for plan, rank in zip(plans, ranks, strict=True)} == {len(ranks[0])}
        taken = len(plans[0]) if number == len(hows) - 1 else min(steps, len(plans[0]))
        seen += [(g.row, q) for plan in plans for batch in plan[:taken] for g in batch.groups for q in g.questions]
        state = ranks[0].state_dict(ranks[0].first + taken)
        needed = max(needed, how["world_size"])
    twice = len(seen) - len(set(seen))
    assert set(seen) == set(zip(rows.tolist(), positions.tolist(), strict=True))
    # Only where fewer groups are left than there are processes, one comes in several of them.
    assert twice == 0 or needed > 1
    if all(how["world_size"] == 1 for how, _ in hows):
        assert twice == 0


def test_images_that_came_do_not_come_again_under_another_batch_size():
    first, then = ImageSampler(50, 4, True, seed=1), ImageSampler(50, 7, True, seed=2)
    for sampler in (first, then):
        sampler.set_epoch(2)
    came = [group.row for batch in list(first)[:5] for group in batch.groups]
    then.load_state_dict(first.state_dict(5))
    rest = [group.row for batch in then for group in batch.groups]
    assert len(then) == 30 // 7
    assert len(rest) == 28
    assert not set(came) & set(rest)


def test_a_training_that_time_ends_has_the_rate_of_the_time_that_has_passed():
    course = Course(factor, 1)
    course.elapsed = lambda: 0.7
    assert course(5) == factor(0.7)


def test_a_training_without_an_end_is_refused():
    from vlabs.tasks.base import Task

    task = SimpleNamespace(trainer=SimpleNamespace(callbacks=[]))
    with pytest.raises(UserError, match=r"trainer.max_steps=N or \+trainer.max_time"):
        Task._share_of_time(task)
