"""Runs that are killed, stopped or damaged continue, and end as if nothing had been."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import assert_one_line_error, command, warm_python

from vlabs.data.loading import LoaderOptions, make_loader
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.training.callbacks.checkpoints import KeepLast, Stopped, WholeCheckpointIO, previous_of
from vlabs.training.callbacks.gradients import FiniteGradients
from vlabs.training.callbacks.resume import GoOn
from vlabs.training.callbacks.schedule import EveryNValidations

STEPS = 20  # two epochs of ten


@pytest.fixture(scope="module")
def long_options(tiny_options):
    """Epochs of ten steps, two workers, a checkpoint after every step, and dropout."""
    left_out = ("trainer.limit_train_batches", "data.num_workers", "trainer.log_every_n_steps")
    return [
        *[option for option in tiny_options if not option.startswith(left_out)],
        "data.num_workers=2", "data.rand_augment=rand-m9-n2", "trainer.log_every_n_steps=1", "logger=csv",
        "checkpoints.every_minutes=null", "checkpoints.every_n_steps=1", "callbacks.predictions.every_n_validations=0",
        "callbacks.grounding.every_n_validations=0", "model.fusion.dropout=0.1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(long_options, tmp_path_factory):
    """The last checkpoint of a run that nothing stopped."""
    cwd = tmp_path_factory.mktemp("whole")
    result = command("vlabs.train", *long_options, "hydra.run.dir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return read(cwd / "run/checkpoints/last.ckpt")


def read(path):
    return torch.load(path, weights_only=True)


def start(options, cwd, python=sys.executable, **more):
    environment = dict(os.environ, OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
    return subprocess.Popen(
        [python, "-m", "vlabs.train", "hydra.run.dir=run", *options],
        cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more,
    )  # fmt: skip


def wait_for_step(process, path, step):
    """Wait until a checkpoint of that step is there."""
    while True:
        assert process.poll() is None, process.stdout.read()
        if path.is_file():
            try:
                if read(path)["global_step"] >= step:
                    return
            except FileNotFoundError:
                continue
        time.sleep(0.005)


def killed_at(step, options, cwd):
    """The last checkpoint of a run that was killed when it had one of that step, and not at its end."""
    last = cwd / "run/checkpoints/last.ckpt"
    for _ in range(5):  # on a busy machine a run may end before it is seen to be there
        process = start(options, cwd, warm_python())
        wait_for_step(process, last, step)
        process.kill()
        process.wait()
        # The process that was asked for is killed a moment later. A run that has ended has no lock.
        with contextlib.suppress(FileNotFoundError), open(cwd / "run/.vlabs-lock", "r+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
        if read(last)["global_step"] < STEPS:
            return last
        shutil.rmtree(cwd / "run")
    raise AssertionError("this machine is too busy to kill a run in time")


def logged_steps(run):
    with open(run / "metrics.csv") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]


def assert_same_end(found, wanted):
    assert found["global_step"] == wanted["global_step"] == STEPS
    for name, value in wanted["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    for ours, theirs in zip(found["optimizer_states"], wanted["optimizer_states"], strict=True):
        for key, state in theirs["state"].items():
            assert all(torch.equal(ours["state"][key][name], value) for name, value in state.items())
    assert found["lr_schedulers"] == wanted["lr_schedulers"]


class Rows(torch.utils.data.Dataset):
    """The rows of a plan, as numbers."""

    def __getitem__(self, plan):
        return torch.tensor([[float(group.row)] for group in plan.groups])


class Small(pl.LightningModule):
    """A model of two numbers whose every step draws from torch's generator."""

    def __init__(self, signal_in=None, number=signal.SIGTERM):
        super().__init__()
        self.number = number
        self.layer = torch.nn.Linear(1, 1)
        self.validated = []
        self.signal_in = signal_in

    def signal(self, *place):
        if place == self.signal_in:
            signal.raise_signal(self.number)

    def training_step(self, rows, batch_idx):
        self.signal("training", self.trainer.current_epoch, batch_idx)
        return (self.layer(rows) * torch.rand_like(rows)).square().mean()

    def validation_step(self, rows, batch_idx):
        self.signal("validation", self.trainer.current_epoch, batch_idx)
        self.log("val/loss", self.layer(rows).square().mean() * torch.rand(()))

    def on_validation_end(self):
        self.validated.append((self.trainer.global_step, float(self.trainer.callback_metrics["val/loss"])))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Recording(WholeCheckpointIO):
    """Keeps every last checkpoint that was written."""

    def __init__(self, folder):
        self.folder, self.paths = folder, []

    def save_checkpoint(self, checkpoint, path, storage_options=None):
        super().save_checkpoint(checkpoint, path)
        if Path(path).name == "last.ckpt":
            self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
            self.paths[-1].write_bytes(Path(path).read_bytes())


def fit(folder, options, start_from=None, signal_in=None, number=signal.SIGTERM):
    """Train the small model for three epochs of five batches; its checkpoints, validations and itself."""
    folder.mkdir()
    pl.seed_everything(1, verbose=False)
    rows = np.arange(15)
    options_of = LoaderOptions(batch_size=3, num_workers=0)
    loaders = [make_loader(Rows(), None, "", rows, rows * 0, options_of, training) for training in (True, False)]
    model, io = Small(signal_in, number), Recording(folder)
    # In one folder for all, or Lightning would not take over what was best.
    best = pl.callbacks.ModelCheckpoint(folder.parent, "best", "val/loss", enable_version_counter=False)
    keeps = KeepLast(folder / "last.ckpt", every_n_steps=None if signal_in else 1)
    trainer = pl.Trainer(
        **{"max_epochs": 3, "check_val_every_n_epoch": 1, **options}, accelerator="cpu", logger=False, plugins=[io],
        callbacks=[best, keeps, GoOn()],
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder,
    )  # fmt: skip
    try:
        trainer.fit(model, *loaders, ckpt_path=start_from, weights_only=True)
    finally:
        keeps.listen_no_more()
    return io.paths, model.validated


def differences(ours, theirs, name=""):
    """The names under which two nested states differ."""
    if isinstance(ours, dict):
        ours, theirs = ({str(key): value for key, value in state.items()} for state in (ours, theirs))
        keys = ours.keys() | theirs.keys()
        return [found for key in keys for found in differences(ours.get(key), theirs.get(key), f"{name}/{key}")]
    if isinstance(ours, list | tuple) and isinstance(theirs, list | tuple) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for key, pair in pairs for found in differences(*pair, f"{name}/{key}")]
    if name.endswith("current_score"):  # of the last validation, for people to read
        return []
    same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return [] if same else [f"{name}: {ours}, not {theirs}"]


@pytest.mark.parametrize(
    ("options", "validations"),
    [
        ({}, [5, 10, 15]),
        ({"val_check_interval": 2}, [2, 4, 7, 9, 12, 14]),
        ({"val_check_interval": 0.5, "limit_train_batches": 4}, [2, 4, 6, 8, 10, 12]),
        ({"check_val_every_n_epoch": 2}, [10]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 6, 9, 12, 15]),
        ({"limit_val_batches": 0}, []),
        ({"accumulate_grad_batches": 2}, [3, 6, 9]),
        ({"accumulate_grad_batches": 2, "val_check_interval": 3}, [1, 4, 7]),
        ({"max_epochs": None, "max_steps": 7}, [5, 7]),
        ({"max_epochs": None, "max_steps": 10}, [5, 10]),
    ],
    ids=str,
)
def test_a_run_continues_the_same_from_every_checkpoint_that_it_ever_wrote(options, validations, tmp_path):
    """So however often it is stopped, by induction: each checkpoint leads to the next, alike in all that it holds."""
    paths, validated = fit(tmp_path / "whole", options)
    assert [step for step, _ in validated] == validations
    for number, path in enumerate(paths):
        again, validated_again = fit(tmp_path / str(number), options, path)
        steps, steps_again = ([read(one)["global_step"] for one in found] for found in (paths, again))
        assert steps_again == steps[number + 1 :]
        assert validated_again == validated[len(validated) - len(validated_again) :]
        if again:
            assert not differences(read(again[0]), read(paths[number + 1])), number
            assert not differences(read(again[-1]), read(paths[-1])), number


@pytest.mark.parametrize(
    ("place", "options", "step"),
    [
        (("training", 1, 2), {}, 8),
        (("training", 1, 4), {}, 10),
        (("training", 1, 4), {"limit_val_batches": 0}, 10),
        (("training", 0, 2), {"accumulate_grad_batches": 2}, 2),
        (("validation", 1, 1), {}, 10),
        (("validation", 1, 4), {}, 10),
        (("validation", 1, 1), {"val_check_interval": 2}, 7),
        (("validation", 1, 1), {"val_check_interval": 3, "accumulate_grad_batches": 2}, 5),
        (("validation", 1, 1), {"max_epochs": None, "max_steps": 14}, 10),
    ],
    ids=str,
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_anywhere_in_an_epoch_loses_nothing(place, options, step, number, tmp_path):
    whole, validated = fit(tmp_path / "whole", options)
    listening = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped:
        fit(tmp_path / "stopped", options, signal_in=place, number=number)
    assert stopped.value.signal == number
    assert signal.getsignal(number) == listening
    last = tmp_path / "stopped/last.ckpt"
    assert read(last)["global_step"] == step
    again, validated_again = fit(tmp_path / "again", options, last)
    assert not differences(read(again[-1]), read(whole[-1]))
    assert validated_again == validated[len(validated) - len(validated_again) :]


def test_the_end_of_the_terminal_is_a_stop_unless_nohup_says_otherwise(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("vlabs.training.callbacks.checkpoints.write_to_no_terminal", lambda: said.append(1))
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the suite was started by
    try:
        with pytest.raises(Stopped) as stopped:
            fit(tmp_path / "stopped", {}, signal_in=("training", 1, 1), number=signal.SIGHUP)
        assert stopped.value.signal == signal.SIGHUP
        assert said
        assert read(tmp_path / "stopped/last.ckpt")["global_step"] > 0
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        keeps = KeepLast(tmp_path / "last.ckpt")
        keeps._listen(signal.SIGHUP, keeps._ask_stop)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_checkpoint_before_is_kept_where_a_file_has_one_name_alone(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    for number in (1, 2):
        WholeCheckpointIO().save_checkpoint({"n": number}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt") == {"n": 2}
    assert torch.load(tmp_path / "last.ckpt.previous") == {"n": 1}


def test_a_second_ctrl_c_stops_at_once(tmp_path, monkeypatch):
    keeps = KeepLast(tmp_path / "last.ckpt")
    keeps._ask_stop(signal.SIGINT)
    keeps.saving = True
    keeps._ask_stop(signal.SIGINT)  # what is being saved is saved
    keeps.saving = False
    with pytest.raises(Stopped):
        keeps._ask_stop(signal.SIGINT)


def test_sigterm_after_the_last_step_lets_a_run_end(tmp_path):
    options = {"max_epochs": None, "max_steps": 10}
    whole, validated = fit(tmp_path / "whole", options)
    again, validated_again = fit(tmp_path / "again", options, signal_in=("validation", 1, 1))
    assert validated_again == validated
    assert not differences(read(again[-1]), read(whole[-1]))


@pytest.mark.parametrize("step", [3, 14])
def test_a_run_that_is_killed_in_mid_epoch_ends_with_the_same_weights(step, long_options, whole, tmp_path):
    last = killed_at(step, long_options, tmp_path)
    saved = read(last)["global_step"]
    result = command("vlabs.train", "resume=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_same_end(read(last), whole)
    logged = logged_steps(tmp_path / "run")
    # Lightning logs a step after it was saved; killed between the two, that step alone has no row.
    assert sorted({*logged, saved - 1}) == list(range(STEPS))
    assert len(logged) == len(set(logged))


def test_sigterm_saves_and_stops_and_sigusr1_saves_and_continues(long_options, whole, tmp_path):
    options = [option for option in long_options if not option.startswith("checkpoints.every_n_steps")]
    process = start([*options, "checkpoints.every_n_steps=null", "trainer.max_epochs=2"], tmp_path, warm_python())
    metrics, last = tmp_path / "run/metrics.csv", tmp_path / "run/checkpoints/last.ckpt"
    while not (metrics.is_file() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    while not last.is_file():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.005)
    first = read(last)["global_step"]
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "stopped"
    # SIGTERM in the hook that saved for SIGUSR1 finds all saved already.
    again = read(last)["global_step"] > first
    assert output.count("because of a signal") == 1 + again, output
    assert output.count("continue with resume=") in (1, 2), output  # of what SIGUSR1 saved, and where it stopped
    assert first <= read(last)["global_step"] < STEPS
    assert command("vlabs.train", "resume=run", cwd=tmp_path).returncode == 0
    assert_same_end(read(last), whole)
    assert logged_steps(tmp_path / "run") == list(range(STEPS))


def test_ctrl_c_in_a_terminal_saves_says_so_and_ends_a_sweep(long_options, tmp_path):
    options = [*long_options, "trainer.max_epochs=50", "seed=0,1", "hydra.sweep.dir='sweep (1)'", "-m"]
    process = start(options, tmp_path, start_new_session=True)
    run = tmp_path / "sweep (1)/0"
    wait_for_step(process, run / "checkpoints/last.ckpt", 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to loader processes too
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    assert "saved" in output
    assert output.count("resume=") == 1, output
    assert "Traceback" not in output
    assert shlex.split(output.split("continue with ")[1]) == [f"resume={run}"]  # may be pasted into a shell
    assert json.loads((run / "summary.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "sweep (1)/1").exists()


def test_sigterm_to_one_process_saves_and_stops_all(long_options, tmp_path):
    two = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp", "data.num_workers=0"]
    process = start([*long_options, *two, "trainer.max_epochs=400"], tmp_path)
    last = tmp_path / "run/checkpoints/last.ckpt"
    wait_for_step(process, last, 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGTERM, output
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "stopped"
    assert output.count("because of a signal") == output.count("continue with resume=") == 1
    assert read(last)["global_step"] >= 3
    assert children
    until = time.monotonic() + 60  # the first process does not wait for the others
    while left := [child for child in children if Path(f"/proc/{child}").exists()]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(long_options, whole, tmp_path):
    last = killed_at(5, long_options, tmp_path)
    step = read(last)["global_step"]
    # The same where the run was killed after it had kept the old one and before it had put the new one in its place.
    assert read(previous_of(last))["global_step"] in (step - 1, step)
    cut = last.read_bytes()[:1000]
    last.unlink()
    last.write_bytes(cut)
    result = command("vlabs.train", "resume=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "last.ckpt" in result.stdout
    assert "resuming from the one before" in result.stdout
    assert_same_end(read(last), whole)


def test_a_rank_whose_part_is_finite_leaves_the_step_out_with_the_others(tmp_path):
    check = FiniteGradients(1, tmp_path / "last.ckpt")
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision: False)  # another rank's part is not
    trainer = SimpleNamespace(global_step=3, log_every_n_steps=10, precision_plugin=None, strategy=strategy)
    model = torch.nn.Linear(1, 1)
    model.weight.grad = torch.ones(1, 1)
    check.on_before_optimizer_step(trainer, model, None)
    assert model.weight.grad is None
    assert check.bad_steps == 1


def test_validations_are_counted_over_a_stop():
    trainer = SimpleNamespace(sanity_checking=False)
    whole, first, second = (EveryNValidations(3) for _ in range(3))
    wanted = [whole.is_due(trainer) for _ in range(7)]
    found = [first.is_due(trainer) for _ in range(2)]
    second.load_state_dict(first.state_dict())
    assert found + [second.is_due(trainer) for _ in range(5)] == wanted
    assert wanted.count(True) == 2


def test_two_damaged_checkpoints_are_one_line(long_options, tmp_path):
    last = killed_at(2, long_options, tmp_path)
    for path in (last, previous_of(last)):
        path.write_bytes(b"not a checkpoint")
    assert_one_line_error(command("vlabs.train", "resume=run", cwd=tmp_path), "last.ckpt.previous")


def test_a_gradient_that_is_not_finite_stops_the_run_and_names_its_questions(tiny_options, tmp_path):
    options = [*tiny_options, "logger=csv", "task.recipe.lr.vision=1e30", "hydra.run.dir=run"]
    result = command("vlabs.train", *options, cwd=tmp_path)
    assert_one_line_error(result, "the gradient is not finite at step", "texts ", "max_bad_steps")
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_steps_that_are_not_finite_can_be_left_out(tiny_data, monkeypatch, capsys):
    callback = FiniteGradients(1, Path("run/checkpoints/last.ckpt"))
    layer = torch.nn.Linear(2, 1)
    layer.sample_ids = lambda batch: batch.caption_ids
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision: decision)  # of one process
    trainer = SimpleNamespace(global_step=3, log_every_n_steps=10, precision_plugin=None, strategy=strategy)
    batch = SimpleNamespace(caption_ids=[7, 8])
    for expected in ("skipped, 1 of at most 1", None):
        callback.on_train_batch_start(trainer, layer, batch, 0)
        layer.weight.grad = torch.full_like(layer.weight, float("nan"))
        if expected is None:
            with pytest.raises(UserError, match="texts 7, 8.*no checkpoint yet"):
                callback.on_before_optimizer_step(trainer, layer, None)
        else:
            callback.on_before_optimizer_step(trainer, layer, None)
            assert expected in capsys.readouterr().out
            assert layer.weight.grad is None


def test_a_loader_process_that_dies_is_one_line(long_options, tmp_path):
    process = start([*long_options, "trainer.max_epochs=50"], tmp_path)
    wait_for_step(process, tmp_path / "run/checkpoints/last.ckpt", 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    lines = [line for line in process.communicate()[0].splitlines() if line.startswith("error: ")]
    assert process.returncode == 1
    assert len(lines) == 1
    assert "a loader process died" in lines[0]
    assert "data.num_workers" in lines[0]
    assert "resume=" in lines[0]


@pytest.mark.parametrize("interruption", [RuntimeError("DataLoader worker (pid 1) is killed"), KeyboardInterrupt()])
def test_what_interrupts_the_writing_of_a_checkpoint_is_what_is_heard(interruption, tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, data):
            if self.tell() > 1000:
                raise interruption
            return super().write(data)

    writer, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)
    monkeypatch.setattr("vlabs.training.callbacks.checkpoints.open", Interrupted, raising=False)
    with pytest.raises(type(interruption)) as heard:
        writer.save_checkpoint({"step": 2, "weight": torch.zeros(1000)}, path)
    assert heard.value is interruption
    assert read(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_at_no_time_is_there_no_checkpoint(tmp_path, monkeypatch):
    writer, path = WholeCheckpointIO(), tmp_path / "last.ckpt"
    writer.save_checkpoint({"step": 1}, path)
    seen = []
    replace = type(path).replace

    def watched(self, target):
        seen.append(path.is_file())
        replace(self, target)
        seen.append(path.is_file())

    monkeypatch.setattr(type(path), "replace", watched)
    writer.save_checkpoint({"step": 2}, path)
    assert all(seen)
    assert (read(path)["step"], read(previous_of(path))["step"]) == (2, 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("given", [0, 3])
def test_a_loader_continues_with_the_next_batch_of_the_same_epoch(given, workers, tiny_data):
    data = VQADataModule(tiny_data, image_size=16, batch_size=32, num_workers=workers)
    whole, part, resumed = (data.train_dataloader() for _ in range(3))
    for loader in (whole, part):
        loader.sampler.set_epoch(5)
    questions = [batch.question_ids for batch in whole]
    iterator = iter(part)
    for _ in range(given):
        next(iterator)
    resumed.load_state_dict(part.state_dict())
    assert [batch.question_ids for batch in resumed] == questions[given:]
    assert [batch.question_ids for batch in resumed] == questions  # the next epoch is whole


def test_loading_leaves_the_global_generators_alone(tiny_data):
    data = VQADataModule(tiny_data, image_size=16, rand_augment="rand-m9-n2", num_workers=0)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    next(iter(data.train_dataloader()))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()
    assert states[2] == random.getstate()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["checkpoints.every_minutes=0"], ["checkpoints.every_minutes=0", "above 0"]),
        (["checkpoints.every_n_steps=5"], ["set only one of every_minutes and every_n_steps"]),
    ],
)
def test_wrong_intervals_are_one_line(options, parts, tiny_options, tmp_path, in_process):
    result = in_process("vlabs.train", [*tiny_options, "logger=csv", *options, "hydra.run.dir=run"], tmp_path)
    assert_one_line_error(result, *parts)
