"""Several processes train as one does with the same global batch, and what they share is weighted by count."""

from __future__ import annotations

import csv
import json
import socket
import subprocess

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import assert_one_line_error, clean_environment, command, warm_python
from test_ranking import random_model

from vlabs.data.captions import CaptionBatch
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.vqa import VQABatch
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import VQAHead
from vlabs.models.topdown import AbSTopDown
from vlabs.tasks.optim import Recipe
from vlabs.tasks.retrieval import RetrievalTask
from vlabs.tasks.vqa import VQATask

TWO = ["trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2"]


# Losses and gradients of two ranks, without Lightning


def make_vqa_task():
    model = random_model(AbSTopDown(), "cls")
    torch.manual_seed(1)
    model.head = VQAHead(2 * model.fusion.width, 7)
    return VQATask(without_dropout(model), Preprocessing(32, ""), {}, Recipe(), prior_bottom_up_weight=0.2,
                   region_prior_weight=1.0)  # fmt: skip


def make_retrieval_task():
    model = without_dropout(random_model(AbSTopDown(), "cls"))
    # The reconstruction loss is a mean over pairs, of which captions have unequal numbers here.
    options = {"negatives": "batch", "num_false": 99, "reconstruction_weight": 0.0, "region_prior_weight": 1.0}
    return RetrievalTask(model, Preprocessing(32, ""), {}, Recipe(), **options)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, CoAttentionFusion) or hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    for layer in model.text.roberta.encoder.layer:
        layer.attention_dropout = 0.0
    return model


def vqa_batch(chosen):
    """Some of 7 questions about 4 images."""
    torch.manual_seed(0)
    images, targets = torch.randn(4, 3, 32, 32), torch.rand(7, 7)
    ids, index = torch.randint(5, 300, (7, 9)), torch.tensor([0, 0, 1, 1, 2, 3, 3])
    used, local = index[chosen].unique(return_inverse=True)
    mask = torch.ones(len(chosen), 9, dtype=torch.int64)
    coverage = torch.rand(7, 4) * torch.tensor([1, 1, 0, 1, 0, 1, 1])[:, None]  # two are about nobody knows what
    return VQABatch(images[used], ids[chosen], mask, local, index[chosen], targets[chosen], coverage[chosen],
                    list(chosen), [], [], [], [], [])  # fmt: skip


def caption_batch(chosen):
    full = vqa_batch(chosen)
    return CaptionBatch(full.images, full.input_ids, full.attention_mask, full.image_index, full.image_ids,
                        list(chosen), full.coverage, None, None, None, 0, 0, [])  # fmt: skip


def vqa_total(task, chosen):
    return task.total(task.losses(vqa_batch(chosen)))


def retrieval_total(task, chosen):
    return task.total(task.losses(caption_batch(chosen)))


TASKS = {"vqa": (make_vqa_task, vqa_total), "retrieval": (make_retrieval_task, retrieval_total)}


def gradients(task, total):
    total.backward()
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


UNEVEN = [[[0, 1, 2, 3], [4, 5, 6]], [[2], [0, 1, 3, 4, 5, 6]]]


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, (make, total_of) in TASKS.items():
        for number, parts in enumerate(UNEVEN):
            task = make().train()
            total = total_of(task, parts[rank])
            found = gradients(task, total)
            for value in found.values():  # as DDP does
                dist.all_reduce(value)
                value /= 2
            mean = total.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                torch.save({"loss": mean / 2, "gradients": found}, f"{folder}/{name}{number}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two_ranks(tmp_path_factory):
    """The folder with loss and gradients of every task and parts, by two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    method = "spawn" if torch.cuda.is_available() else "fork"  # a fork imports nothing again, and can use no GPU
    mp.start_processes(work, (str(folder),), nprocs=2, start_method=method)
    return folder


@pytest.mark.parametrize("number", range(len(UNEVEN)))
@pytest.mark.parametrize("name", TASKS)
def test_two_uneven_ranks_have_the_loss_and_gradients_of_one(name, number, of_two_ranks):
    found = torch.load(of_two_ranks / f"{name}{number}.pt", weights_only=True)
    make, total_of = TASKS[name]
    task = make().train()
    total = total_of(task, [0, 1, 2, 3, 4, 5, 6])
    torch.testing.assert_close(found["loss"], total.detach(), atol=1e-5, rtol=1e-5)
    plain = gradients(task, total)
    assert found["gradients"].keys() == plain.keys()
    assert any("prior" in key for key in plain)
    for key, value in plain.items():
        torch.testing.assert_close(found["gradients"][key], value, atol=2e-5, rtol=1e-3, msg=key)


# The command line


@pytest.fixture(scope="module")
def options(tiny_options):
    left_out = ("data.batch_size", "trainer.max_epochs", "trainer.limit_train_batches", "data.questions_per_image")
    return [
        *[option for option in tiny_options if not option.startswith(left_out)],
        "data.questions_per_image=2", "logger=csv", "trainer.max_epochs=1",
        "callbacks.predictions.every_n_validations=0", "callbacks.grounding.every_n_validations=0",
        "trainer.gradient_clip_val=null",
    ]  # fmt: skip


def made(cwd):
    """What a command left in its folder; W&B and matplotlib keep their own things in hidden ones."""
    return {path.name for path in cwd.iterdir() if not path.name.startswith(".")}


def train(options, cwd):
    result = command("vlabs.train", *options, "hydra.run.dir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return json.loads((cwd / "run/summary.json").read_text()), gradient_norms(cwd / "run")


def gradient_norms(run):
    with open(run / "metrics.csv", newline="") as file:
        return [float(row["train/gradient_norm"]) for row in csv.DictReader(file) if row["train/gradient_norm"]]


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    return train([*options, "data.batch_size=32", "trainer.limit_train_batches=4"], tmp_path_factory.mktemp("alone"))


def test_two_processes_train_as_one_with_the_same_global_batch(options, alone, tmp_path):
    summary, norms = train([*options, *TWO, "data.batch_size=16", "trainer.limit_train_batches=4"], tmp_path)
    assert summary["steps"] == alone[0]["steps"] == 4
    assert norms == pytest.approx(alone[1], rel=1e-3)
    for name in ("val/vqa_loss", "val/vqa_accuracy"):
        assert summary["metrics"][name] == pytest.approx(alone[0]["metrics"][name], rel=1e-2)
    assert made(tmp_path) == {"run"}


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_trains_as_one_process_too_on_one_node_or_two(options, alone, tmp_path, nodes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = 2 // nodes
    trained = [
        *options, "data.batch_size=16", "trainer.limit_train_batches=4", "hydra.run.dir=run",
        "trainer.accelerator=cpu", "trainer.strategy=ddp", f"trainer.devices={each}", f"trainer.num_nodes={nodes}",
    ]  # fmt: skip
    started = [
        subprocess.Popen(
            [warm_python(), "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--node-rank={node}",
             f"--nproc-per-node={each}", "--master-addr=127.0.0.1", f"--master-port={port}",
             "-m", "vlabs.train", *trained],
            cwd=tmp_path, env=clean_environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(nodes)
    ]  # fmt: skip
    for process in started:
        printed, _ = process.communicate(timeout=280)
        assert process.returncode == 0, printed
    assert gradient_norms(tmp_path / "run") == pytest.approx(alone[1], rel=1e-3)
    assert made(tmp_path) == {"run"}


def test_accumulated_batches_train_as_one_large_one_without_contrastive_losses(options, tmp_path):
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    plain = [*options, "task.prior_weight=0"]
    large = train([*plain, "data.batch_size=32", "trainer.limit_train_batches=4"], tmp_path / "large")
    accumulated = ["data.batch_size=16", "trainer.limit_train_batches=8", "trainer.accumulate_grad_batches=2"]
    small = train([*plain, *accumulated], tmp_path / "small")
    assert small[0]["steps"] == large[0]["steps"] == 4
    assert small[1] == pytest.approx(large[1], rel=1e-3)


def test_a_sweep_over_several_devices_is_refused(options, tmp_path):
    result = command("vlabs.train", "-m", *options, *TWO, "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert_one_line_error(result, "trainer.devices=2 in a sweep", "trainer.devices=1")


def test_the_runs_of_a_sweep_can_be_processes_of_their_own(options, tmp_path):
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10", "trainer.limit_train_batches=2"]
    result = command(
        "vlabs.train", "-m", *options, *launcher, "seed=0,1", "hydra.sweep.dir=sweep", cwd=tmp_path
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "sweep/runs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["status"], row["seed"]) for row in rows] == [("0", "done", "0"), ("1", "done", "1")]


def test_the_slurm_launcher_is_a_choice_that_composes():
    from hydra import compose, initialize_config_dir

    from vlabs.runs.groups import config_dir

    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", ["hydra/launcher=slurm"], return_hydra_config=True)
    assert config.hydra.launcher._target_.endswith("SlurmLauncher")
    assert config.hydra.launcher.additional_parameters.signal == "USR1@300"


# What a run will cost


def test_a_plan_says_batch_steps_and_hours_and_leaves_nothing_behind(options, tmp_path):
    given = ["data.batch_size=16", "trainer.accumulate_grad_batches=2", "trainer.max_epochs=7"]
    result = command("vlabs.train", *options, *given, "plan=true", "hydra.run.dir=run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "32 = 16 x 1 devices x 2 accumulated" in result.stdout
    assert "70 = 10 per epoch x 7 epochs" in result.stdout
    for word in ("GiB at the peak", "texts/s", "MB of checkpoints", "time  "):
        assert word in result.stdout
    assert not made(tmp_path)


def test_a_plan_has_the_steps_that_the_run_then_has(options, tmp_path):
    given = [*options, "data.batch_size=24", "trainer.accumulate_grad_batches=3", "trainer.max_epochs=1"]
    planned = command("vlabs.train", *given, "plan=true", "hydra.run.dir=run", cwd=tmp_path)
    summary, _ = train(given, tmp_path)
    assert f"steps         {summary['steps']:,} =" in planned.stdout
