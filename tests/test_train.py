"""The training command: what a run folder holds, resuming, starting from weights, sweeps."""

import csv
import hashlib
import json
import platform
import re
import shutil
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import LOOKS, assert_one_line_error, command
from test_models import make_model

from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.preprocessing import Preprocessing
from vlabs.models.vlm import VisionLanguageModel
from vlabs.runs.environment import write_environment
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vqa import VQATask
from vlabs.training.words import EpochLine, beginning, ending


def metrics_of(run):
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_holds_config_metrics_checkpoints_figures_and_wandb(tiny_run):
    run, _ = tiny_run
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "last.ckpt.previous"}
    for figure in ("val", "questions", "pathway", "alpha"):
        assert list((run / "figures").glob(f"{figure}_step*.png"))
    assert list((run / "wandb").glob("offline-run-*"))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["steps"] == 6
    assert "vlabs train" in summary["command"]


def test_a_run_folder_names_code_packages_device_and_data(tiny_run, tiny_data):
    found = json.loads((tiny_run[0] / "environment.json").read_text())
    assert found["packages"]["torch"] == version("torch")
    assert found["data"][0]["manifest_sha256"] == hashlib.sha256((tiny_data / "manifest.json").read_bytes()).hexdigest()
    assert found["code"] is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", found["code"])
    assert found["python"] == platform.python_version()
    assert found["device"]


def test_resuming_with_other_packages_or_data_is_said_and_the_first_are_kept(tmp_path):
    def environment(torch_version, data):
        return {
            "code": "a", "python": "3.12", "device": "CPU", "packages": {"torch": torch_version},
            "data": [{"manifest_sha256": data}],
        }  # fmt: skip

    path = tmp_path / "environment.json"
    assert write_environment(path, environment("1", "x"), going_on=False) == []
    assert write_environment(path, environment("1", "x"), going_on=True) == []
    assert write_environment(path, environment("2", "y"), going_on=True) == ["torch 2, was 1", "the prepared data"]
    assert json.loads(path.read_text()) == environment("1", "x")
    assert write_environment(path, environment("2", "y"), going_on=False) == []  # a new run in the same folder
    assert json.loads(path.read_text()) == environment("2", "y")


def test_wandb_is_offline_without_an_account_and_says_how_to_upload(tiny_run):
    _, result = tiny_run
    assert "wandb sync" in result.stderr + result.stdout


def test_a_run_says_what_it_begins_with_every_epoch_and_what_came_out(tiny_run):
    run, result = tiny_run
    for said in (
        "train: vqa on scenes (320 questions, 40 images), images of 32 px, from scratch",
        "M parameters, all trained",
        "kB of checkpoints",
        "epoch 1/2: train/loss ",
        "epoch 2/2: ",
        f"done: {run}",
        "best val/vqa_accuracy: ",
        f"next: vlabs evaluate ckpt={run}",
    ):
        assert said in result.stdout, said
    for noise in ("anonymous", "worker processes", "Run history"):
        assert noise not in result.stdout + result.stderr


def test_a_small_model_from_scratch_is_said_to_be_small_for_photographs_and_not_for_scenes():
    def said(name):
        task = VQATask(make_model(None), Preprocessing(16, ""), {"name": name, "images": 3}, Recipe())
        return beginning(task, SimpleNamespace(preprocessing=task.preprocessing), "run")

    assert "pass experiment=photo_vqa" in said("vqav2")
    assert not any("photo" in said(name) for name in ("scenes", "objects-small"))


def test_a_run_names_the_evaluation_of_the_user_s_own_config_folder(tmp_path):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/size.yaml").touch()
    for name, own, said in (
        ("size", [], "next: vlabs train init=run ..."),
        ("size", ["elsewhere", str(tmp_path)], f"next: vlabs evaluate --config-dir {tmp_path} task=size ckpt=run"),
        ("vqa", [str(tmp_path)], "next: vlabs evaluate ckpt=run"),
    ):
        assert ending(SimpleNamespace(name=name), "run", EpochLine(), own).splitlines()[-1].strip() == said


def test_every_loss_accuracy_rate_norm_and_speed_is_logged(tiny_run):
    logged = {key for row in metrics_of(tiny_run[0]) for key, value in row.items() if value}
    wanted = {"train/loss", "train/vqa_loss", "train/reconstruction_loss", "train/prior_loss", "train/gradient_norm",
              "val/vqa_accuracy", "val/vqa_accuracy/number", "val/vqa_accuracy/yes/no", "val/vqa_accuracy/other",
              "train/samples_per_second"}  # fmt: skip
    wanted |= {f"lr-AdamW/{part}" for part in ("vision", "text", "fusion", "head", "feedback")}
    assert wanted <= logged


def test_config_of_a_run_reproduces_it_bit_for_bit(tiny_run, tmp_path):
    run, _ = tiny_run
    shutil.copytree(run, tmp_path / "given")
    result = command(
        "vlabs.train", f"--config-dir={tmp_path / 'given'}", "--config-name=config", "hydra.run.dir=again",
        *(one.replace("=1", "=0") for one in LOOKS), cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    old, new = (
        torch.load(r / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for r in (run, tmp_path / "again")
    )
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_unknown_run_folder_to_resume_is_named(tmp_path):
    assert_one_line_error(command("vlabs.train", "resume=nowhere", cwd=tmp_path), "nowhere")


def test_init_takes_another_resolution_and_another_head_and_says_what_it_did(tiny_run, tiny_options, tmp_path):
    run, _ = tiny_run
    result = command(
        "vlabs.train", *tiny_options, f"init={run}", "data.image_size=48", "model.head.num_answers=9999",
        "logger=csv", "hydra.run.dir=run", "model/topdown=none", "trainer.max_epochs=0", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    said = result.stderr + result.stdout
    assert "resampled (1): vision.vit.pos_embed" in said
    assert "left out" in said
    assert "vision.decoders.0.linear.weight" in said
    assert "new (2): head.classifier.3.weight, head.classifier.3.bias" in said


def test_a_frozen_encoder_keeps_its_weights(tiny_run, tiny_options, tmp_path):
    run, _ = tiny_run
    result = command(
        "vlabs.train", *tiny_options, f"init={run}", "task.freeze=[vision,text]", "logger=tensorboard",
        "callbacks.predictions.every_n_validations=0", "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "M trained; frozen: vision, text\n" in result.stdout
    assert list((tmp_path / "run/tensorboard").glob("events.out.tfevents.*"))
    before = load_checkpoint(run / "checkpoints/best.ckpt").model.state_dict()
    after = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    for name, value in before.items():
        same = torch.equal(after[f"model.{name}"], value)
        assert same or not name.startswith(("vision.vit.", "text."))
    for name in ("fusion.text_map.weight", "vision.decoders.0.linear2.weight"):
        assert not torch.equal(after[f"model.{name}"], before[name])


def test_a_sweep_leaves_a_folder_a_run_and_a_table_with_the_failures(tiny_options, tmp_path, in_process):
    options = [
        "-m", *tiny_options, "model/topdown=none,absvit_released", "model.fusion.num_heads=2,5",
        "trainer.max_epochs=1", "trainer.limit_train_batches=1", "callbacks.predictions.every_n_validations=0",
        "logger=csv", "hydra.sweep.dir=sweep",
        "hydra.sweep.subdir='${hydra:runtime.choices.model/topdown}/heads=${model.fusion.num_heads}'",
    ]  # fmt: skip
    result = command("vlabs.train", *options, cwd=tmp_path)
    assert result.returncode == 1
    with open(tmp_path / "sweep/runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    what = {(row["model/topdown"], row["model.fusion.num_heads"]): row["status"] for row in rows}
    assert what == {
        ("none", "2"): "done", ("none", "5"): "failed",
        ("absvit_released", "2"): "done", ("absvit_released", "5"): "failed",
    }  # fmt: skip
    for row in rows:
        assert bool(row["error"]) == (row["status"] == "failed")
        assert row["status"] == "failed" or float(row["best/val/vqa_accuracy"]) >= 0
    folders = [f"{topdown}/heads={heads}" for topdown in ("none", "absvit_released") for heads in (2, 5)]
    assert {row["run"] for row in rows} == set(folders)
    assert all((tmp_path / "sweep" / folder / "config.yaml").is_file() for folder in folders)
    assert "runs.csv" in result.stdout
    table = (tmp_path / "sweep/runs.csv").read_bytes()
    again = in_process("vlabs.train", options, tmp_path)
    assert_one_line_error(again, "sweep/none/heads=2", "resume=", "a new folder")
    assert (tmp_path / "sweep/runs.csv").read_bytes() == table


def test_train_val_leaves_the_minival_out(tiny_data):
    from vlabs.data.vqa import VQADataModule

    data = VQADataModule(tiny_data, image_size=32, train_split="train+val", val_split="minival", minival_images=4)
    trained = set(data.rows("train+val")["image_id"])
    checked = data.rows("minival")["image_id"]
    assert len(checked) == 4
    assert not trained & set(checked)
    assert trained | set(checked) == set(data.rows("train")["image_id"]) | set(data.rows("val")["image_id"])
    assert max(data.rows("val")["image_id"]) == checked[-1]


def test_a_compiled_run_learns_and_leaves_the_same(tiny_run, tiny_options, tmp_path, in_process, monkeypatch):
    # Traced and run in the whole loop as with any backend; making kernels takes minutes.
    monkeypatch.setattr(VisionLanguageModel.compile_parts, "__defaults__", ("eager",))
    options = [*tiny_options, "logger=csv", "task.compile=true", "callbacks.predictions.every_n_validations=2"]
    result = in_process("vlabs.train", [*options, "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr
    ours, theirs = metrics_of(tmp_path / "run"), metrics_of(tiny_run[0])
    for key in ("train/loss", "val/vqa_loss", "train/gradient_norm"):
        found, wanted = ([float(row[key]) for row in rows if row[key]] for rows in (ours, theirs))
        assert found == pytest.approx(wanted, rel=1e-3), key
    drawn = [{path.name for path in (run / "figures").glob("*_step000006*")} for run in (tmp_path / "run", tiny_run[0])]
    assert drawn[0] == drawn[1] != set()
    weights = [
        load_checkpoint(run / "checkpoints/best.ckpt").model.state_dict() for run in (tmp_path / "run", tiny_run[0])
    ]
    assert weights[0].keys() == weights[1].keys()


def test_a_profile_of_a_run_lies_in_its_folder(tiny_options, tmp_path, in_process):
    options = [*tiny_options, "logger=csv", "trainer.profiler=simple", "trainer.max_epochs=1", "hydra.run.dir=run"]
    assert in_process("vlabs.train", options, tmp_path).returncode == 0
    assert "train_dataloader_next" in (tmp_path / "run/fit-profile.txt").read_text()


def test_every_validation_says_what_was_seen_until_then(tiny_run):
    rows = [row for row in metrics_of(tiny_run[0]) if row.get("val/vqa_accuracy")]
    # Two epochs of three batches of 32 questions.
    assert [float(row["seen/texts"]) for row in rows] == [96, 192]
    first, second = (float(row["seen/minutes"]) for row in rows)
    assert 0 < first < second


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(precision, tmp_path):
    import pytorch_lightning as pl
    import torch
    from torch import nn

    from vlabs.data.preprocessing import Preprocessing
    from vlabs.tasks.base import Losses, Task
    from vlabs.tasks.optim import Recipe

    norms = []

    class Steep(Task):
        name, monitor = "steep", "val/loss"

        def sample_ids(self, batch):
            return [0]

        def losses(self, batch):
            return Losses({"steep": 1e3 * self.model(batch).sum()}, 1)

        def on_train_start(self):
            optimizer = self.trainer.optimizers[0]
            assert optimizer.param_groups[0]["fused"]
            optimizer.register_step_post_hook(
                lambda *_: norms.append(float(nn.utils.get_total_norm([p.grad for p in self.model.parameters()])))
            )

    task = Steep(nn.Linear(4, 4), Preprocessing(8, ""), {}, Recipe())
    task.on_save_checkpoint = lambda checkpoint: None
    trainer = pl.Trainer(
        max_steps=3, precision=precision, gradient_clip_val=0.5, logger=False, enable_checkpointing=False,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(task, torch.utils.data.DataLoader(torch.ones(3, 4)))
    assert norms == pytest.approx([0.5] * 3, rel=1e-2)


def test_a_run_in_bfloat16_trains(tiny_options, tmp_path, in_process):
    options = [*tiny_options, "logger=csv", "trainer.precision=bf16-mixed", "hydra.run.dir=run"]
    result = in_process("vlabs.train", options, tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"
