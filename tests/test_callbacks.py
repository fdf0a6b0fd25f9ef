"""Callbacks that the config chooses, and the command `vlabs`."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line_error
from torch.optim.swa_utils import AveragedModel

from vlabs.errors import UserError
from vlabs.training.callbacks.averaging import WeightAverage, _update

QUICK = ["callbacks.predictions=null", "callbacks.grounding=null", "logger=csv", "trainer.limit_train_batches=2"]


def read(path):
    return torch.load(path, weights_only=True)


def test_a_run_stops_early_on_the_tasks_own_metric_or_one_of_your_own(tiny_options, in_process, tmp_path):
    options = [*tiny_options, *QUICK, "callbacks=[default,early_stopping]", "trainer.max_epochs=6"]
    often = ["callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=1000"]
    result = in_process("vlabs.train", [*options, *often, "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["epochs"] == 2
    wrong = in_process("vlabs.train", [*options, "callbacks.early_stopping.monitor=val/nothing"], tmp_path)
    assert_one_line_error(wrong, "callbacks.early_stopping.monitor=val/nothing", "val/vqa_accuracy")


def test_the_best_checkpoint_holds_the_average_that_was_validated(tiny_options, in_process, tmp_path):
    options = [*tiny_options, *QUICK, "callbacks=[default,ema]", "callbacks.ema.decay=0.5", "task.recipe.warmup=0"]
    result = in_process("vlabs.train", [*options, "trainer.max_epochs=1", "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr
    best, last = (read(tmp_path / f"run/checkpoints/{name}.ckpt") for name in ("best", "last"))
    for name, value in last["state_dict"].items():
        torch.testing.assert_close(best["state_dict"][name], value, msg=name)
    apart = [(value - last["current_model_state"][name]).abs().max() for name, value in last["state_dict"].items()]
    assert max(apart) > 0
    # A run continues from both: one epoch more moves the average, and still keeps it apart from what is trained.
    resumed = in_process("vlabs.train", ["resume=run", "trainer.max_epochs=2"], tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    again = read(tmp_path / "run/checkpoints/last.ckpt")
    head = "model.head.classifier.3.weight"
    assert not torch.equal(again["state_dict"][head], last["state_dict"][head])
    assert not torch.equal(again["state_dict"][head], again["current_model_state"][head])


def test_the_average_soon_forgets_what_training_began_with():
    """Its decay is that of TensorFlow's moving averages; whole numbers are those of the model."""
    model = torch.nn.Module()
    model.weight, model.steps = torch.nn.Parameter(torch.zeros(2)), torch.nn.Buffer(torch.tensor(0))
    average = AveragedModel(model, multi_avg_fn=partial(_update, 0.8), use_buffers=True)
    expected = None
    for n in range(60):
        with torch.no_grad():
            model.weight += 1
            model.steps += 1
        average.update_parameters(model)
        share = min(0.8, (1 + n) / (10 + n))
        expected = n + 1.0 if expected is None else share * expected + (1 - share) * (n + 1)
    torch.testing.assert_close(average.module.weight.data, torch.full((2,), expected))
    assert average.module.steps == 60
    with pytest.raises(UserError, match="ema.decay=2"):
        WeightAverage(2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks=[default,ema_]", "there is no callbacks=ema_: choose one of default, early_stopping, ema"),
        ("+callbacks.mine.patience=3", "callbacks.mine names no class"),
        ("logger=csv +logger.project=mine", "there is no option logger.project: logger has none here"),
        ("-m seed=0,1 --cfg job", "leave out -m"),
        ("+task._=1", "there is no option task._: choose from recipe, "),
        ("task.zz=1", "there is no option 'task.zz': task has alive_prior_margin, "),
        ("predictions.num_images=1", "there is no option 'predictions'"),
        ("data=trained_on", "data.dir must be given"),
    ],
)
def test_wrong_choices_are_one_line(override, message, in_process, tmp_path):
    assert_one_line_error(in_process("vlabs.train", [*override.split(), "hydra.run.dir=run"], tmp_path), message)


def test_one_script_has_all_commands(tmp_path):
    script = Path(sys.executable).parent / "vlabs"
    usage = subprocess.run([script, "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert usage.returncode == 0
    wrong = subprocess.run([script, "trian"], capture_output=True, text=True, cwd=tmp_path)
    assert_one_line_error(wrong, "there is no command 'trian'", "train, evaluate")
    missing = subprocess.run([script, "evaluate", "task=vqa"], capture_output=True, text=True, cwd=tmp_path)
    assert_one_line_error(missing, "ckpt")
    for command in usage.stdout.split("\n\n")[1].splitlines():
        name = command.split()[0].replace("-", "_")
        assert __import__("importlib").util.find_spec("data_prep.__main__" if name == "prepare" else f"vlabs.{name}")
