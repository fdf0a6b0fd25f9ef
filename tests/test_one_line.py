"""Whatever a user, a library or the system gets wrong is one line; a traceback is of vlabs' own faults."""

import errno
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import datasets
import pytest
import pytorch_lightning as pl
import torch
from conftest import LOOKS, assert_one_line_error
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader

from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import check_text
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError, foreseen, one_line, run_cli
from vlabs.prediction.predictor import load
from vlabs.runs.config import as_config, hydra_arguments, hydra_quoted, path_of, save_config
from vlabs.runs.groups import config_dir
from vlabs.runs.trainer import check_options, make_trainer
from vlabs.runs.values import check_values
from vlabs.utils.device import find_device


def passed_on(error):
    """An error as torch raises it of one in a loader process."""
    from torch._utils import ExceptionWrapper

    try:
        raise error
    except Exception:
        wrapper = ExceptionWrapper(where="in DataLoader worker process 0")
    try:
        wrapper.reraise()
    except Exception as again:
        return again


def raised_in_lightning():
    try:
        pl.Trainer(logger=False, callbacks=[], max_epochs=-5)
    except Exception as error:
        return error


class OutOfMemoryError(RuntimeError):
    """By its name torch's, which no machine without GPU can make."""


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (UserError("a sentence"), ["a sentence"]),
        (passed_on(UserError("image 3 is no image")), ["image 3 is no image"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.png"), ["a.png: No such", "check the name"]),
        (OSError(errno.ENOSPC, "No space left on device", "run/metrics.csv"), ["run/metrics.csv", "make room"]),
        (passed_on(PermissionError(errno.EACCES, "Permission denied", "a.tar")), ["a.tar", "denied", "its rights"]),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), ["data.batch_size", "accumulate_grad"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), ["memory ran out"]),
        (MemoryError(), ["memory ran out", "data.batch_size"]),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), ["loader process", "num_workers"]),
        (RuntimeError("Too many open files. Communication with the workers"), ["ulimit -n", "fewer loader"]),
        (passed_on(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")), ["not UTF-8"]),
        (json.JSONDecodeError("Expecting value", "", 0), ["damaged", "VLABS_DEBUG=1"]),
        (ModuleNotFoundError("No module named 'tensorboard'"), ["package tensorboard", "pip install"]),
        (raised_in_lightning(), ["trainer: ", "max_epochs"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_what_others_say_is_a_sentence_with_a_remedy(error, parts):
    sentence = foreseen(error)
    assert "Traceback" not in sentence
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize("error", [KeyError("x"), passed_on(ValueError("odd")), AssertionError(), TypeError("no")])
def test_a_fault_of_vlabs_own_has_its_traceback(error, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run_cli(main)
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert "Traceback" in said
    assert said.splitlines()[-1].startswith(f"error: {type(error).__name__}")
    assert "a bug in vlabs" in said


@pytest.mark.parametrize("way", ["from another", "in the handling of another", "as the only one"])
def test_a_dead_loader_process_is_named_by_whatever_library_hears_of_it(way):
    def library():  # as inspect.getfullargspec and others do with any error
        try:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        except RuntimeError as died:
            if way == "from another":
                raise TypeError("unsupported callable") from died
            if way == "as the only one":
                raise UserError("it cannot be built") from None
            raise TypeError("unsupported callable")  # noqa: B904

    with pytest.raises((TypeError, UserError)) as heard:
        library()
    assert "a loader process died (DataLoader worker (pid 7)" in foreseen(heard.value)


def test_a_loader_process_that_dies_while_a_batch_is_received_is_named_too(monkeypatch):
    def breaks_off(*_):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    batches = iter(DataLoader(torch.zeros(4, 1000), batch_size=2, num_workers=1))
    monkeypatch.setattr("multiprocessing.reduction.recv_handle", breaks_off)
    with pytest.raises(ConnectionResetError) as heard:
        next(batches)
    assert "a loader process died (Connection reset by peer)" in foreseen(heard.value)


@pytest.mark.parametrize("debug", ["", "0", "1"])
def test_a_traceback_of_a_users_error_is_shown_if_asked_for(debug, capsys, monkeypatch):
    monkeypatch.setenv("VLABS_DEBUG", debug)

    def main():
        raise UserError("wrong\nline \x1b[31mred\u202e")

    with pytest.raises(SystemExit):
        run_cli(main)
    said = capsys.readouterr().err
    assert ("Traceback" in said) == (debug == "1")
    assert said.splitlines()[-1] == r"error: wrong line \x1b[31mred\u202e"


def test_a_closed_pipe_and_an_encoding_without_the_characters_are_no_error(tmp_path):
    program = "from vlabs.errors import run_cli\nrun_cli(lambda: print('ξ' * 100_000))"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    python = [sys.executable, "-c", program]
    whole = subprocess.run(python, env=environment, capture_output=True, cwd=tmp_path)
    assert (whole.returncode, whole.stdout[:6], whole.stderr) == (0, rb"\u03be", b"")
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(python, stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, b"")
    reader, writer = os.pipe()
    os.close(reader)
    program = (
        "from vlabs.errors import UserError, run_cli\n"
        "def main():\n    try:\n        print('x' * 100_000, flush=True)\n"
        "    except OSError as error:\n        raise UserError('of a run') from error\n"
        "run_cli(main)"
    )
    within = subprocess.run([sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path)
    os.close(writer)
    assert (within.returncode, within.stderr) == (141, b"")
    none = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *python], capture_output=True, cwd=tmp_path)
    assert (none.returncode, none.stderr) == (0, b"")


def test_what_libraries_say_when_they_are_taken_apart_is_not_heard(tmp_path):
    program = (
        "from vlabs.errors import UserError, run_cli\n"
        "class Half:\n    def __del__(self): self.missing\n"
        "def main():\n    half.append(Half())\n    raise UserError('wrong')\n"
        "half = []\nrun_cli(main)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "error: wrong\n")


@pytest.mark.parametrize(
    ("module", "arguments", "parts"),
    [
        ("vlabs.search", ["--ckpt", "x", "--images", "x", "--query", "x", "--k", "0"], ["--k", "at least 1"]),
        ("vlabs.search", ["--ckpt", "x", "--images", "x", "--query", "\udcff"], ["--query is not UTF-8"]),
        ("vlabs.segment", ["--ckpt", "x", "--image", "x", "--device", "foo"], ["--device foo", "cpu, cuda"]),
        ("vlabs.attention.__main__", ["--ckpt", "x", "--image", "x", "--alpha", "nan"], ["--alpha", "a number"]),
        ("vlabs.demo_page", ["--max-megabytes", "inf"], ["--max-megabytes", "a number"]),
        ("vlabs.demo_page", ["--device", "cuda:99"], ["--device cuda:99"]),
        ("vlabs.report", ["x", "--grounding-texts", "many"], ["--grounding-texts", "whole number"]),
        ("data_prep.objects", ["--out-dir", "x", "--seed", "-1"], ["--seed", "0 to 4294967295"]),
        ("vlabs.predict", ["--ckpt", "x"], ["--image", "--help"]),
        ("vlabs.predict", ["--ckpt=~/x", "--image=~/no.png", "--question", "x"], ["image HOME/no.png"]),
        ("vlabs.predict", ["--ckpt", "x", "--image", "x", "--question", "a b " * 5000], ["--question", "10,000"]),
        ("vlabs.cli", ["fly"], ["'fly'", "train, evaluate"]),
        ("vlabs.train", ["--cfg", "foo"], ["--cfg", "'job'"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_command_line_is_one_line(module, arguments, parts, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *arguments])
    with pytest.raises(SystemExit) as left:
        run_cli(importlib.import_module(module).main)
    result = subprocess.CompletedProcess(arguments, left.value.code, *capfd.readouterr())
    assert_one_line_error(result, *(part.replace("HOME", str(tmp_path)) for part in parts))


def test_a_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [find_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    for name in ("cuda:2", "foo", "cuda:x", "cuda:", "meta", "CPU", ""):
        with pytest.raises(UserError, match=f"--device {name}"):
            find_device(name)


@pytest.mark.parametrize("text", [" ", "\ud800", "x" * 1_000_000])
def test_a_text_that_nobody_asks_is_refused(text):
    with pytest.raises(UserError, match="a question"):
        check_text("a question", text)


# Paths

NAMES = [
    "lr=0.1", "größe", "run#1", "run (1)", "it's", "a[1]", "[x]", "{a}", "a b", " lead", "slash/", "-dash", "$HOME",
    "a$b", "${x}", 'q"q', "a'b\"c", "back\\slash", "end\\", "2024", "1e3", "true", "a:b", "a%b", "*", "@x", "a=b=c",
    "日本", "tab\tx", "a;b|c<d>&e", "choice(1)", "range(1,3)", "a,b", "'quoted'", "null", "a/b=c/d,e",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flags", [[], ["-m"]])
def test_a_path_that_is_there_is_read_as_it_is(name, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    read = OverridesParser.create().parse_override(hydra_arguments([*flags, f"ckpt={name}"])[-1]).value()
    assert OmegaConf.create({"ckpt": read}).ckpt == name
    assert path_of(name) == name


@pytest.mark.parametrize("name", NAMES[:-6])
@pytest.mark.parametrize("option", ["hydra.run.dir", "init", "+data.sets.mine", "model.text.name_or_path"])
def test_a_path_that_is_new_is_read_as_it_is(name, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read = OverridesParser.create().parse_override(hydra_arguments([f"{option}={name}"])[-1])
    # What could be an interpolation is one, as in the configs; a name of such a kind must be there.
    assert read.value() == name
    assert OverridesParser.create().parse_override(f"x={hydra_quoted(name)}").value() == name


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["-m", "ckpt=a,lr=1"], ["-m", "ckpt=a,'lr=1'"]),
        (["-m", "ckpt='a,b',c"], ["-m", "ckpt='a,b',c"]),
        (["-m", "init=choice(a,b)"], ["-m", "init=choice(a,b)"]),
        (["ckpt=~/a"], ["ckpt=HOME/a"]),
        (["-m", "ckpt=~/a,b"], ["-m", "ckpt=HOME/a,b"]),
        (["-m", "hydra.sweep.dir=a,b=1"], ["-m", "hydra.sweep.dir='a,b=1'"]),
        (["hydra.run.dir=a/${task.name}/x=1"], ["hydra.run.dir='a/${task.name}/x=1'"]),
        (["ckpt='a b'", 'init="c"', "init=null", "init=a\\ b"], ["ckpt='a b'", 'init="c"', "init=null", "init=a\\ b"]),
        (["task.maps=[a,b]", "seed=1,2", "~data"], ["task.maps=[a,b]", "seed=1,2", "~data"]),
        (["seed=1", "-m", "init=a", "--config-dir", "x=1"], ["-m", "--config-dir", "x=1", "seed=1", "init=a"]),
    ],
)
def test_sweeps_quotes_and_interpolations_stay(given, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "HOME")
    assert hydra_arguments(given) == read


@pytest.mark.parametrize("text", [*NAMES, "a\\${x}", "a\\\\${x}", "${oc.env:HOME}"])
def test_a_text_of_a_config_is_the_same_when_the_config_is_read_again(text, tmp_path):
    config = as_config({"a": [{"b": text}]})
    assert config.a[0].b == text
    save_config(config, tmp_path / "config.yaml")
    assert OmegaConf.load(tmp_path / "config.yaml").a[0].b == text


def test_a_folder_of_what_an_interpolation_would_be_is_named(tiny_options, tmp_path, in_process):
    result = in_process("vlabs.train", [*tiny_options, "data.dir=x/${y}"], tmp_path)
    assert_one_line_error(result, "'y'", "${...}")


def test_a_value_that_cannot_be_read_is_named_with_its_quotes(in_process, tmp_path):
    result = in_process("vlabs.train", ["logger.name=run (1)"], tmp_path)
    assert_one_line_error(result, "logger.name=run (1)", "\"logger.name='run (1)'\"")


ODD = 'it\'s größe #1 (x) [a]{b},lr=0.1 "q" $b %d'


def test_a_run_in_an_odd_folder_is_evaluated_started_from_and_resumed(tiny_data, tiny_options, tmp_path, in_process):
    shutil.copytree(tiny_data, tmp_path / f"data {ODD}")
    (tmp_path / "of task=1").symlink_to(tiny_data.parent / "raw")
    options = [*tiny_options, f"data.dir=data {ODD}", "logger=csv", "callbacks.predictions=null"]
    options += ["callbacks.grounding.instances=of task=1/annotations.zip", "trainer.max_epochs=1", *LOOKS[1:]]
    for module, arguments in [
        ("vlabs.train", [*options, f"hydra.run.dir={ODD}"]),
        ("vlabs.train", [f"resume={ODD}/", "trainer.max_epochs=2"]),
        ("vlabs.train", [*options, f"init={ODD}", "hydra.run.dir=lr=2", "callbacks.grounding=null"]),
        ("vlabs.evaluate", [f"ckpt={ODD}", "logger=csv", "hydra.run.dir=of=1"]),
        ("vlabs.evaluate", ["ckpt=lr=2", "task=grounding", "task.instances=of task=1/annotations.zip",
                            "task.num_texts=4", "logger=csv", "hydra.run.dir=of=2"]),
    ]:  # fmt: skip
        result = in_process(module, arguments, tmp_path)
        assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / ODD / "summary.json").read_text())["status"] == "done"
    assert (tmp_path / "of=1/metrics.json").is_file()
    assert (tmp_path / "of=2/metrics.json").is_file()


def test_a_folder_that_cannot_be_is_named_with_its_option(in_process, tmp_path):
    result = in_process("vlabs.evaluate", ["ckpt=scenes", "logger=csv", "hydra.run.dir=/dev/null/x"], tmp_path)
    assert_one_line_error(result, "hydra.run.dir=/dev/null/x", "Not a directory")


# Values

STOPPING = "vlabs.training.callbacks.stopping.EarlyStopping"
AVERAGE = "vlabs.training.callbacks.averaging.WeightAverage"
PICTURES = "vlabs.training.callbacks.pictures.PredictionTable"
VIT = "vlabs.models.absvit.AbSViT"
FUSION = "vlabs.models.fusion.CoAttentionFusion"
VQA_DATA = "vlabs.data.vqa.VQADataModule"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": None}, "seed=null must be a whole number from 0 to 4294967295"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": "abc"}, "seed=abc"),
        ({"task": {"_target_": "vlabs.tasks.pretrain.PretrainTask", "seed": 2**32}}, "task.seed=4294967296"),
        ({"plan": "maybe"}, "plan=maybe must be true or false"),
        ({"ckpt": None}, "ckpt=null"),
        (
            {"model": {"vision": {"topdown": {"alpha": float("nan")}}}},
            "model.vision.topdown.alpha=nan must be a finite",
        ),
        ({"task": {"alphas": [1.0, float("inf")]}}, "task.alphas=inf"),
        ({"model": {"vision": {"_target_": VIT, "depth": 0}}}, "vision.depth=0 must be a whole number, at least 1"),
        ({"callbacks": {"x": {"_target_": PICTURES, "num_images": -1}}}, "callbacks.x.num_images=-1"),
        (
            {"logger": {"_target_": "vlabs.runs.logging.wandb_logger", "mode": "onlin"}},
            "logger.mode=onlin must be one of",
        ),
        ({"task": {"_target_": "vlabs.tasks.vqa.VQATask", "compile": "maybe"}}, "task.compile=maybe must be true"),
        ({"task": {"_target_": "vlabs.tasks.vqa.VQATask", "freeze": "vision"}}, "task.freeze=vision must be a list"),
        (
            {"recipe": {"_target_": "vlabs.tasks.optim.Recipe", "lr": {"head": "big"}}},
            "recipe.lr.head=big must be a numb",
        ),
        ({"data": {"_target_": "vlabs.data.embedded.scenes_masks", "hflip": "abc"}}, "data.hflip=abc must be a number"),
        ({"data": {"_target_": "vlabs.data.embedded.scenes_masks", "crop": 112}}, "data.crop=112 must be a list"),
        ({"checkpoints": None}, "pass checkpoints.NAME=VALUE"),
        (
            {"checkpoints": {"every_n_steps": 1.5}},
            "every_n_steps=1.5 must be a whole number, at least 1, or null",
        ),
        ({"max_bad_steps": None}, "max_bad_steps=null must be a whole number"),
        ({"task": {"_target_": "vlabs.tasks.vqa.VQATask", "recipe": None}}, "task.recipe=null must be a group of opt"),
        ({"recipe": {"_target_": "vlabs.tasks.optim.Recipe", "lr": 0.1}}, "recipe.lr=0.1 must be a group of options"),
        ({"x": {"_target_": STOPPING, "patience": "abc"}}, "x.patience=abc must be a whole number"),
        ({"x": {"_target_": STOPPING, "patience": -1}}, "x.patience=-1 must be a whole number, at least 0"),
        (
            {"x": {"_target_": AVERAGE, "update_every_n_steps": 0}},
            "update_every_n_steps=0 must be a whole number, at",
        ),
        (
            {"x": {"_target_": "pytorch_lightning.callbacks.LearningRateMonitor", "logging_interval": "day"}},
            "x.logging_interval=day must be one of step, epoch, or null",
        ),
        (
            {"data": {"_target_": VQA_DATA, "num_workers": 10**9}},
            "num_workers=1000000000 must be a whole number from 0",
        ),
        (
            {"model": {"fusion": {"_target_": FUSION, "dropout": -1}}},
            "fusion.dropout=-1 must be a number in [0, 1]",
        ),
    ],
)
def test_a_value_that_an_option_cannot_have_is_named(options, named):
    with pytest.raises(UserError, match=re.escape(named)):
        check_values(options)


def test_the_values_of_all_configs_are_of_their_types():
    with initialize_config_dir(config_dir(), version_base="1.3"):
        for task in ("vqa", "segment", "classify", "retrieval", "pretrain", "nlvr2"):
            callbacks = "callbacks=[default,ema,early_stopping]"
            check_values(OmegaConf.to_container(compose("train", [f"task={task}", callbacks])))
        for task in ("vqa", "grounding", "robustness", "control", "steering", "segment", "retrieval"):
            check_values(OmegaConf.to_container(compose("evaluate", [f"evaluation@task={task}", "ckpt=x"])))


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("val_check_interval=0", ["trainer.val_check_interval=0", "limit_val_batches=0"]),
        ("val_check_interval=-1", ["trainer.val_check_interval=-1"]),
        ("val_check_interval=1.5", ["trainer.val_check_interval=1.5"]),
        ("check_val_every_n_epoch=0", ["trainer.check_val_every_n_epoch=0"]),
        ("check_val_every_n_epoch=null", ["trainer.val_check_interval=N"]),
        ("log_every_n_steps=-1", ["trainer.log_every_n_steps=-1"]),
        ("accumulate_grad_batches=0", ["trainer.accumulate_grad_batches=0"]),
        ("limit_train_batches=1.5", ["trainer.limit_train_batches=1.5", "[0.0, 1.0]"]),
        ("limit_val_batches=-1", ["trainer.limit_val_batches=-1"]),
        ("overfit_batches=-1", ["trainer.overfit_batches=-1"]),
        ("max_epochs=-1", ["trainer.max_epochs=-1", "trainer.max_steps=N", "max_time"]),
        ("max_epochs=-2", ["trainer.max_epochs=-2"]),
        ("max_steps=many", ["trainer.max_steps=many"]),
        ("max_time=5", ["trainer.max_time=5", "00:08:00:00"]),
        ("max_time=8h", ["trainer.max_time=8h"]),
        ("max_time={hour: 8}", ["trainer.max_time", "hours"]),
        ("num_sanity_val_steps=-2", ["trainer.num_sanity_val_steps=-2"]),
        ("gradient_clip_val=-1", ["trainer.gradient_clip_val=-1", "at least 0"]),
        ("gradient_clip_algorithm=foo", ["trainer.gradient_clip_algorithm=foo", "norm or value"]),
        ("accelerator=foo", ["trainer.accelerator=foo", "cpu, cuda"]),
        ("accelerator=tpu", ["trainer.accelerator=tpu", "pass auto or cpu"]),
        ("devices=0", ["trainer.devices=0"]),
        ("devices=abc", ["trainer.devices=abc"]),
        ("num_nodes=0", ["trainer.num_nodes=0"]),
        ("strategy=foo", ["trainer.strategy=foo", "ddp"]),
        ("deterministic=maybe", ["trainer.deterministic=maybe", "warn"]),
        ("detect_anomaly=2", ["trainer.detect_anomaly=2"]),
        ("fast_dev_run=-1", ["trainer.fast_dev_run=-1"]),
        ("callbacks=[]", ["trainer.callbacks=[]", "+callbacks.NAME._target_"]),
        ("logger=true", ["trainer.logger=true", "logger=csv"]),
        ("plugins=[]", ["trainer.plugins=[]"]),
        ("barebones=true", ["trainer.barebones=true", "plan=true"]),
        ("enable_checkpointing=false", ["trainer.enable_checkpointing=false"]),
        ("foo=1", ["trainer.foo", "max_epochs"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_trainers_option_is_refused_by_name(option, parts):
    default = OmegaConf.load(f"{config_dir()}/trainer/default.yaml")
    config = OmegaConf.merge(default, OmegaConf.from_dotlist([option]))
    with pytest.raises(UserError) as refused:
        check_options(OmegaConf.to_container(config))
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    "option",
    ["max_time=00:08:00:00", "max_time={hours: 8}", "max_steps=0", "val_check_interval=0.5", "limit_val_batches=0",
     "log_every_n_steps=0", "num_sanity_val_steps=-1", "fast_dev_run=2", "devices=-1", "devices=[0]", "devices='0,1'",
     "deterministic=warn", "accelerator=cpu", "strategy=ddp", "gradient_clip_val=null", "profiler=simple"],
)  # fmt: skip
def test_a_trainers_option_that_lightning_documents_is_taken(option):
    default = OmegaConf.load(f"{config_dir()}/trainer/default.yaml")
    check_options(OmegaConf.to_container(OmegaConf.merge(default, OmegaConf.from_dotlist([option]))))


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("trainer.precision=12", ["trainer.precision=12", "bf16-mixed"]),
        ("trainer.val_check_interval=1000", ["`trainer.val_check_interval` (1000)", "trainer.limit_val_batches"]),
        ("trainer.limit_train_batches=0.01", ["trainer.limit_train_batches", "0.01"]),
        ("logger=null", ["logger=null", "csv, tensorboard, wandb"]),
        ("+callbacks.mine._target_=os.getcwd", ["callbacks.mine", "os.getcwd"]),
        ("model.head.num_answers=2", ["model.head.num_answers=2", "null"]),
        ("+max_epochs=3", ["'max_epochs'", "pass trainer.max_epochs="]),
        ("+foo.bar=3", ["'foo'", "leave it out"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_lightning_and_hydra_say_of_an_option_is_one_line(option, parts, tiny_options, tmp_path, in_process):
    result = in_process("vlabs.train", [*tiny_options, "callbacks.grounding=null", "logger=csv", option], tmp_path)
    assert_one_line_error(result, *parts)


class Watched(pl.LightningModule):
    """Trains nothing, and remembers the texts of every batch."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.epochs: list[list[int]] = []
        self.validated: set[int] = set()

    def on_train_epoch_start(self):
        self.epochs.append([])

    def training_step(self, batch, batch_idx):
        self.epochs[-1] += batch.question_ids
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.validated.update(batch.question_ids)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("few", "batches"), [(2, 2), (0.1, 2)])
def test_overfit_batches_trains_on_the_same_few_batches_every_epoch(few, batches, tiny_data, tmp_path):
    data = VQADataModule(tiny_data, image_size=32, batch_size=12, questions_per_image=4, num_workers=0)
    total = len(data.train_dataloader())
    assert int(0.1 * total) == 2
    options = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "max_epochs": 3, "overfit_batches": few}
    options |= {"enable_progress_bar": False, "num_sanity_val_steps": 0, "log_every_n_steps": 0}
    trainer = make_trainer(OmegaConf.create(options), logger=False, enable_checkpointing=False, callbacks=[],
                           default_root_dir=str(tmp_path))  # fmt: skip
    module = Watched()
    trainer.fit(module, datamodule=data)
    first, *others = module.epochs
    assert len(others) == 2
    assert all(other == first for other in others)
    assert 12 < len(first) <= 12 * batches
    assert module.validated  # a share of the validation too, of at least one batch


def test_no_training_values_are_logged_and_steps_are_the_only_end(tiny_options, tmp_path, in_process):
    options = [*tiny_options, "callbacks.grounding=null", "callbacks.predictions=null", "logger=csv"]
    options += ["trainer.log_every_n_steps=0", "trainer.max_epochs=-1", "trainer.max_steps=4", "hydra.run.dir=run"]
    result = in_process("vlabs.train", options, tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 4
    assert "train/gradient_norm" not in (tmp_path / "run/metrics.csv").read_text()


TYPES = ["float", "text", "type", "e.g. colour", "a.b", "", "training", "__class__", "a\nb", "yes/no"]


def test_an_answer_type_may_have_any_name(tiny_data, tiny_options, tmp_path, in_process):
    shutil.copytree(tiny_data, tmp_path / "data")
    rows, features = load_split(tiny_data, "val").to_list(), load_split(tiny_data, "val").features
    for number, row in enumerate(rows):
        row["answer_type"] = [TYPES[(number + n) % len(TYPES)] for n in range(len(row["answer_type"]))]
    shutil.rmtree(tmp_path / "data/val")
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "data/val")
    options = [*tiny_options, "data.dir=data", "callbacks.grounding=null", "logger=csv", "hydra.run.dir=run"]
    result = in_process("vlabs.train", [*options, "trainer.max_epochs=1", "data.minival_images=100"], tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    assert {f"val/vqa_accuracy/{name}" for name in TYPES if name} <= set(metrics)


def test_a_predictors_question_of_no_characters_is_named(tiny_run, tmp_path):
    Image.new("RGB", (40, 32)).save(tmp_path / "a.png")
    predictor = load(tiny_run[0])
    for question in ("\ud800", "?" * 1_000_000):
        with pytest.raises(UserError, match="a question"):
            predictor.answer(tmp_path / "a.png", [question])
    with pytest.raises(UserError, match="--device foo"):
        load(tiny_run[0], device="foo")


def test_a_line_of_a_loader_process_is_what_it_says():
    error = passed_on(UserError("the third image\nis none"))
    assert one_line(str(error)) == "the third image is none"


def test_of_processes_that_fail_alike_the_one_that_started_the_others_is_heard(tmp_path):
    program = "from vlabs.errors import UserError, run_cli\ndef main(): raise UserError('wrong')\nrun_cli(main)"
    both = 'LOCAL_RANK=1 "$@" & sleep 0.5; exec "$@"'
    result = subprocess.run(
        ["sh", "-c", both, "sh", sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (1, "error: wrong\n")
