"""A run's folder is its own, its record is over all of its parts, and what it needs to continue lies in it."""

import csv
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import assert_one_line_error, command

from vlabs.errors import UserError
from vlabs.evaluation.report import read_runs
from vlabs.runs.environment import write_environment
from vlabs.runs.logging import _run_id, csv_logger
from vlabs.runs.record import Record, merged, read_config, run_folder
from vlabs.runs.sweep import check_table, has_table, write_table
from vlabs.training.callbacks.speed import SamplesPerSecond
from vlabs.training.start import last_whole, make_start


@pytest.fixture(scope="module")
def options(tiny_options):
    quick = ["logger=csv", "callbacks.predictions.every_n_validations=0", "callbacks.grounding.every_n_validations=0"]
    return [option for option in tiny_options if not option.startswith(("callbacks.", "logger"))] + quick


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    """A finished run of six steps, begun with relative paths from a start and a tokenizer that are gone since."""
    cwd = tmp_path_factory.mktemp("trained")
    data = Path(next(option for option in options if option.startswith("data.dir=")).removeprefix("data.dir="))
    shutil.copytree(data / "tokenizer", cwd / "tokenizer")
    given = [option for option in options if not option.startswith("data.dir=")]
    relative = [f"data.dir={os.path.relpath(data, cwd)}", "data.tokenizer=tokenizer"]
    short = ["trainer.max_epochs=1", "trainer.limit_train_batches=1", "hydra.run.dir=start"]
    assert command("vlabs.train", *given, *relative, *short, cwd=cwd).returncode == 0
    start = "start/checkpoints/best.ckpt"
    init = [f"init={start}", "init_by=['task=nowhere']", "seed=1"]
    result = command("vlabs.train", *given, *relative, *init, "hydra.run.dir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    shutil.rmtree(cwd / "start")
    shutil.rmtree(cwd / "tokenizer")
    return cwd / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, under another name in another place."""
    shutil.copytree(trained, tmp_path / "elsewhere/copied")
    return tmp_path / "elsewhere/copied"


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(path, **changed):
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))


def test_a_run_keeps_whole_paths_and_what_was_asked_for(trained):
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert all(os.path.isabs(path) for path in (config["data"]["dir"], config["data"]["tokenizer"], config["init"]))
    assert config["resume"] is None
    assert config["model"]["head"]["num_answers"] is None  # the data say it, and other data say something else
    header = torch.load(trained / "checkpoints/best.ckpt", weights_only=True)["vlabs"]
    assert header["architecture"]["head"]["num_answers"] > 1


def test_a_finished_run_that_continues_stays_as_it_is(run, tmp_path, in_process):
    before = contents(run)
    result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=2"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "nothing is left to train" in result.stdout
    result = in_process("vlabs.train", [f"resume={run}", "max_bad_steps=1"], tmp_path)  # changed, to no effect
    assert result.returncode == 0, result.stderr
    assert "nothing is left to train" in result.stdout
    assert contents(run) == before


def test_more_epochs_need_nothing_outside_the_run_and_are_a_part_of_its_record(run, tmp_path, in_process):
    before, best = summary_of(run), run / "checkpoints/best.ckpt"
    history = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["vlabs"]["data"]["history"]
    result = in_process(
        "vlabs.train",
        [f"++resume={run}", "++trainer.max_epochs=3", "trainer.gradient_clip_val=0.5", "seed=1"],
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "resuming" in result.stdout
    assert "last.ckpt, after 6 steps" in result.stdout
    assert "trainer.gradient_clip_val=0.5, was 1.0" in result.stdout
    after = summary_of(run)
    assert after["command"] == before["command"]
    assert after["overrides"] == merged(before["overrides"], ["trainer.max_epochs=3", "trainer.gradient_clip_val=0.5"])
    assert [part["steps"] for part in after["parts"]] == [[0, 6], [6, 9]]
    assert after["parts"][1]["overrides"] == ["++trainer.max_epochs=3", "trainer.gradient_clip_val=0.5"]
    for name in ("fit_seconds", "seconds"):
        assert after[name] == pytest.approx(sum(part[name] for part in after["parts"]), abs=0.01)
        assert after[name] > before[name]
    assert after["metrics"].keys() == before["metrics"].keys()
    assert (run / after["checkpoint"]) == best
    last = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert last["vlabs"]["data"]["history"] == history
    assert len(history) == 1
    states = json.dumps([state for name, state in last["callbacks"].items() if "Checkpoint" in name], default=str)
    assert str(run) in states
    assert "trained" not in states  # where it lay before
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3


def test_a_worse_model_takes_no_place_in_a_folder_that_was_moved(run, tmp_path, in_process):
    for path in (run / "checkpoints").glob("last.ckpt*"):
        content = torch.load(path, weights_only=True)
        [state] = [state for name, state in content["callbacks"].items() if name.startswith("ModelCheckpoint")]
        best = torch.tensor(1000.0)
        state |= {"best_model_score": best, "kth_value": best, "best_k_models": {state["best_model_path"]: best}}
        torch.save(content, path)
    best = (run / "checkpoints/best.ckpt").read_bytes()
    result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert (run / "checkpoints/best.ckpt").read_bytes() == best
    assert summary_of(run)["best/val/vqa_accuracy"] == 1000
    (run / "checkpoints/best.ckpt").unlink()  # one that is gone is the best no more
    assert in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=4"], tmp_path).returncode == 0
    assert (run / "checkpoints/best.ckpt").is_file()
    assert summary_of(run)["best/val/vqa_accuracy"] < 1000


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("trainer.accelerator=gpu", ["gpu"]),
        ("trainer.devices=lots", ["trainer"]),
        ("callbacks.speed._target_=nowhere.Nothing", ["nowhere"]),
        ("checkpoints.every_minutes=0", ["checkpoints.every_minutes=0"]),
        ("model.fusion.width=32", ["model.fusion.width=32", "16"]),
        ("model.fusion.num_heads=4", ["model.fusion.num_heads=4", "2"]),
        ("task.freeze=[vision]", ["task.freeze=['vision']", "[]"]),
        ("task.lora.rank=2", ["task.lora.rank=2", "0"]),
        ("task.prior_loss.learnable=false", ["task.prior_loss.learnable=False", "was True"]),
        ("data.image_size=64", ["data.image_size=64", "32"]),
        ("data.size=small", ["data.size=small", "tiny"]),
        ("data.dir=nowhere", ["data.dir=", "nowhere", "not there"]),
        ("seed=5", ["seed=5", "1"]),
        ("init=scenes", ["init=scenes"]),
        ("hydra.run.dir=elsewhere", ["hydra.run.dir=elsewhere", "the run's own folder"]),
        ("--config-dir=elsewhere", ["--config-dir=elsewhere", "own folder and config"]),
        ("logger=wandb", ["+logger=CHOICE"]),
        ("+max_epochs=3", ["pass trainer.max_epochs"]),
    ],
)
def test_an_option_that_is_refused_leaves_a_run_as_it_was(option, parts, run, tmp_path, in_process):
    before = contents(run)
    result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3", option], tmp_path)
    assert_one_line_error(result, *parts)
    assert contents(run) == before


def test_an_option_that_is_newer_than_a_run_had_its_default(run, tmp_path, in_process):
    config = yaml.safe_load((run / "config.yaml").read_text())
    newer = {name: config["data"].pop(name) for name in ("blind", "crop_mode")}
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for path in (run / "checkpoints").glob("last.ckpt*"):
        content = torch.load(path, weights_only=True)
        for name in newer:
            del content["callbacks"]["Recorder"]["config"]["data"][name]
        torch.save(content, path)
    result = in_process("vlabs.train", [f"resume={run}", "data.blind=false", "data.crop_mode=center"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "nothing is left to train" in result.stdout
    more = [f"resume={run}", "trainer.max_epochs=3"]
    result = in_process("vlabs.train", [*more, "data.crop_mode=squash"], tmp_path)
    assert_one_line_error(result, "data.crop_mode=squash cannot change", "center")
    assert_one_line_error(
        in_process("vlabs.train", [*more, "data.blnd=true"], tmp_path), "there is no option 'data.blnd'"
    )
    result = in_process("vlabs.train", [*more, "data.blind=true"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "data.blind=true, was false" in result.stdout.lower()
    again = [f"--config-dir={run}", "--config-name=config", "init=null", "data.tokenizer=null", "hydra.run.dir=again"]
    result = in_process("vlabs.train", [*again, "data.crop_mode=squash", "trainer.max_epochs=1"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "crop_mode: squash" in (tmp_path / "again/config.yaml").read_text()


def test_a_config_that_was_edited_is_measured_by_what_was_trained(run, tmp_path, in_process):
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("embed_dim: 16", "embed_dim: 32"))
    result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3"], tmp_path)
    assert_one_line_error(result, "model.vision.embed_dim=32", "16")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("run/checkpoints/last.ckpt", "pass resume=run"),
        ("run/checkpoints", "pass resume=run"),
        ("", "resume= names no folder"),
        ("run.zip", "resume=run.zip: there is no such folder"),
    ],
)
def test_what_is_no_run_folder_is_told_from_one(path, said, tmp_path, monkeypatch, in_process):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").touch()
    (tmp_path / "run.zip").touch()
    assert_one_line_error(in_process("vlabs.train", [f"resume={path}"], tmp_path), said)


def test_data_with_other_answers_are_for_a_new_run_alone(run, tiny_data, tmp_path, in_process):
    shutil.copytree(tiny_data, tmp_path / "data")
    answers = json.loads((tmp_path / "data/answers.json").read_text())
    (tmp_path / "data/answers.json").write_text(json.dumps([*answers, "one more"]))
    result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3", "data.dir=data"], tmp_path)
    assert_one_line_error(result, "data.dir=", "other answers")
    again = [f"--config-dir={run}", "--config-name=config", "data.dir=data", "data.tokenizer=null", "init=null"]
    result = in_process("vlabs.train", [*again, "trainer.max_epochs=1", "trainer.limit_val_batches=1"], tmp_path)
    assert result.returncode == 0, result.stderr
    [new] = (tmp_path / "outputs").rglob("summary.json")
    found = json.loads(new.read_text())
    assert found["overrides"] == merged(
        summary_of(run)["overrides"],
        ["data.dir=data", "data.tokenizer=null", "init=null", "trainer.max_epochs=1", "trainer.limit_val_batches=1"],
    )
    assert found["variant"] == "absvit"
    assert len(found["parts"]) == 1
    header = torch.load(new.parent / "checkpoints/best.ckpt", weights_only=True)["vlabs"]
    assert header["architecture"]["head"]["num_answers"] == len(answers) + 1
    assert {path.name for path in new.parent.iterdir()} <= {
        ".vlabs", "config.yaml", "environment.json", "metrics.csv", "summary.json", "checkpoints", "figures",
    }  # fmt: skip


def test_the_checkpoint_before_is_used_where_the_last_is_gone(run):
    (run / "checkpoints/last.ckpt").unlink()
    assert last_whole(run, "run").path.name == "last.ckpt.previous"
    (run / "checkpoints/last.ckpt.previous").unlink()
    with pytest.raises(UserError, match=r"resume=run: .*last.ckpt does not exist"):
        last_whole(run, "run")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv", "summary.json", "checkpoints", "figures", "wandb"])
def test_a_folder_that_holds_what_a_run_would_write_is_refused(name, options, tmp_path, in_process):
    there = tmp_path / "run" / name
    there.parent.mkdir()
    there.write_text("mine\n") if there.suffix else there.mkdir()
    before = contents(tmp_path)
    result = in_process("vlabs.train", [*options, "hydra.run.dir=run"], tmp_path)
    assert_one_line_error(result, name, "resume=", "a new folder")
    assert contents(tmp_path) == before
    assert there.exists()


def test_a_second_training_in_a_run_is_refused(run, options, tmp_path, in_process):
    before = contents(run)
    result = in_process("vlabs.train", [*options, f"hydra.run.dir={run}"], tmp_path)
    assert_one_line_error(result, f"resume={run}", "a new folder")
    assert contents(run) == before


@pytest.mark.parametrize("option", ["trainer.val_check_interval=1000", "model.fusion.num_heads=5", "logger.mode=x"])
def test_a_start_that_fails_leaves_the_folder_as_it_was(option, options, tmp_path, in_process):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("of the user")
    for folder in ("new", "mine"):
        arguments = [*options, option, f"hydra.run.dir={folder}", "trainer.max_epochs=1"]
        try:
            assert in_process("vlabs.train", arguments, tmp_path).returncode == 1
        except ValueError:  # of Lightning, before it is put into a sentence
            assert "val_check_interval" in option
    assert {path.name for path in tmp_path.iterdir() if path.name != "outputs"} == {"mine"}
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_what_a_killed_start_left_is_no_run(tmp_path):
    def left(status):
        with run_folder(tmp_path, False):
            Record(tmp_path, "train", []).end(status)
            (tmp_path / "metrics.csv").write_text("step\n1\n")

    left("running")
    left("failed")  # the same command works again
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    with pytest.raises(UserError, match="already has"), run_folder(tmp_path, False):
        pass
    shutil.rmtree(tmp_path / "checkpoints")
    left("done")
    with pytest.raises(UserError, match="already has"), run_folder(tmp_path, False):
        pass


def test_two_processes_never_train_in_one_folder(run, options, tmp_path, in_process):
    held = "from pathlib import Path; from vlabs.utils.files import locked\nimport sys\n"
    held += "with locked(Path(sys.argv[1]), 'busy'): print('ready', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", held, run], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "ready\n"
    before = contents(run)
    result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3"], tmp_path)
    assert_one_line_error(result, f"resume={run}", "another process is training there")
    result = in_process("vlabs.train", [*options, f"hydra.run.dir={run}"], tmp_path)
    assert_one_line_error(result, "another process is training there", "another folder")
    other.communicate()
    assert {name: content for name, content in before.items() if name != ".vlabs-lock"} == contents(run)


def test_a_folder_that_cannot_be_written_is_one_line(run, tmp_path, in_process, monkeypatch):
    def refuse(folder, message):
        raise OSError(30, "Read-only file system", str(folder))

    monkeypatch.setattr("vlabs.runs.record.locked", refuse)
    assert_one_line_error(
        in_process("vlabs.train", [f"resume={run}"], tmp_path), f"resume={run} cannot be written", "no permission"
    )


@contextmanager
def full_disk(more, path):
    """No file may become longer than a file is now, and `more`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def rows_of(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def log(logger, steps, **more):
    for step in steps:
        logger.log_metrics({"train/loss": step / 7, **more}, step=step)


def test_a_full_disk_costs_no_row_that_was_there(tmp_path):
    logger = csv_logger(tmp_path)
    log(logger, range(50))
    with full_disk(20, tmp_path / "metrics.csv"), pytest.raises(UserError, match=r"metrics.csv cannot be .* full"):
        log(logger, [50, 51])
    with full_disk(20, tmp_path / "metrics.csv"), pytest.raises(UserError, match=r"metrics.csv cannot be .* full"):
        log(logger, [51], new=1.0)  # another column: all rows are written anew
    assert [row["step"] for row in rows_of(tmp_path)] == [str(step) for step in range(51)][: len(rows_of(tmp_path))]
    assert len(rows_of(tmp_path)) >= 50
    again = csv_logger(tmp_path, resumed_step=49)
    log(again, [49, 50])
    assert [int(row["step"]) for row in rows_of(tmp_path)] == list(range(51))


@pytest.mark.parametrize("damage", ["cut", "cut in the number", "zeros", "zeros in between", "bytes"])
def test_a_damaged_line_of_the_metrics_is_left_out_and_said(damage, tmp_path, capsys):
    log(csv_logger(tmp_path), range(5))
    path = tmp_path / "metrics.csv"
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    path.write_bytes(
        {
            "cut": content + b"5",
            "cut in the number": content[:-4],
            "zeros": content + bytes(100),
            "zeros in between": b"".join([*lines[:3], bytes(50), *lines[3:]]),
            "bytes": b"".join([*lines[:3], b"\xff\xfe,\r\n", *lines[3:]]),
        }[damage]
    )
    log(csv_logger(tmp_path, resumed_step=5), [5])
    kept = [int(row["step"]) for row in rows_of(tmp_path)]
    lost = {"cut in the number": 4, "zeros in between": 2}.get(damage)
    assert kept == [step for step in range(6) if step != lost]
    assert "1 damaged lines are left out" in capsys.readouterr().out


def test_a_header_that_is_damaged_costs_the_rows_and_not_the_run(tmp_path):
    (tmp_path / "metrics.csv").write_bytes(bytes(200))
    log(csv_logger(tmp_path, resumed_step=5), [5])
    assert [row["step"] for row in rows_of(tmp_path)] == ["5"]


@pytest.mark.parametrize("content", [b"", b"{", bytes(50), b"[]", b"{}"], ids=str)
def test_damaged_small_files_stop_neither_run_nor_sweep_nor_report(content, run, tmp_path, in_process, capfd):
    for name in ("summary.json", "environment.json"):
        (run / name).write_bytes(content)
    shutil.copytree(run, tmp_path / "sweep/0")
    shutil.copytree(run, tmp_path / "sweep/1")
    (tmp_path / "sweep/1/summary.json").write_text(
        json.dumps({"status": "done", "overrides": ["seed=1"], "command": "train", "fit_seconds": 1, "parameters": 1})
    )
    assert len(write_table(tmp_path / "sweep").splitlines()) == 3
    assert [found.path.name for found in read_runs(tmp_path / "sweep")] == ["1"]
    assert capfd.readouterr().err.count("is damaged") == 2
    if content != b"":
        return
    result = in_process("vlabs.train", [f"resume={run}"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = summary_of(run)  # from the last checkpoint and metrics.csv
    assert found["status"] == "done"
    assert found["overrides"][0] == "task=vqa"
    assert "hydra.run.dir=run" in found["command"]
    assert [part["steps"] for part in found["parts"]] == [[0, 6], [6, 6]]
    assert found["metrics"]["val/vqa_accuracy"] == pytest.approx(float(rows_of(run)[-1]["val/vqa_accuracy"]))
    assert "torch" in json.loads((run / "environment.json").read_text())["packages"]


def test_a_damaged_environment_is_written_anew(tmp_path):
    path = tmp_path / "environment.json"
    path.write_text('{"code": 1, "packages": []}')
    assert write_environment(path, {"code": "a"}, going_on=True) == []
    assert json.loads(path.read_text()) == {"code": "a"}


@pytest.mark.parametrize("content", [None, b"", bytes(9), b"task: [", b"data: {dir: x}\n"], ids=str)
def test_a_damaged_config_is_taken_from_the_last_checkpoint(content, run, tmp_path, in_process):
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    result = in_process("vlabs.train", [f"resume={run}"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "restored from the last checkpoint" in result.stdout
    assert yaml.safe_load(path.read_text()) == config


def test_a_part_that_was_killed_counts_until_its_last_checkpoint(run, tmp_path, in_process):
    [part] = summary_of(run)["parts"]
    edit(run / "summary.json", status="running", parts=[part | {"status": "running", "fit_seconds": 0, "seconds": 0}])
    result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = summary_of(run)
    assert [(part["status"], part["steps"]) for part in found["parts"]] == [("killed", [0, 6]), ("done", [6, 9])]
    assert 0 < found["parts"][0]["fit_seconds"] <= part["fit_seconds"]
    assert found["fit_seconds"] == pytest.approx(sum(part["fit_seconds"] for part in found["parts"]), abs=0.01)


def test_a_full_disk_at_the_end_loses_no_result(run, tmp_path, in_process, monkeypatch):
    wanted = summary_of(run)
    real = sys.modules["vlabs.runs.record"].write_json

    def write(path, content, **options):
        if content["status"] == "running":
            return real(path, content, **options)
        raise UserError(f"{path} cannot be written: the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("vlabs.runs.record.write_json", write)
        result = in_process("vlabs.train", [f"resume={run}", "trainer.max_epochs=3"], tmp_path)
        assert_one_line_error(result, "summary.json", "the disk is full", f"resume={run}")
    assert summary_of(run)["status"] == "running"
    assert in_process("vlabs.train", [f"resume={run}"], tmp_path).returncode == 0
    found = summary_of(run)
    assert (found["status"], found["steps"]) == ("done", 9)
    assert set(wanted["metrics"]) <= set(found["metrics"])


def test_the_table_of_a_sweep_knows_of_a_run_that_was_resumed(run, tmp_path, in_process):
    sweep = tmp_path / "sweep"
    (sweep / "a").mkdir(parents=True)
    run.rename(sweep / "a/0")
    (sweep / "runs.csv").write_text("run,status\n")
    result = in_process("vlabs.train", [f"resume={sweep / 'a/0'}", "trainer.max_epochs=3"], tmp_path)
    assert result.returncode == 0, result.stderr
    [row] = csv.DictReader((sweep / "runs.csv").read_text().splitlines())
    assert (row["run"], row["status"], row["trainer.max_epochs"]) == ("a/0", "done", "3")


def test_a_table_of_the_users_is_no_table_of_a_sweep(tmp_path):
    check_table(tmp_path)
    assert not has_table(tmp_path)
    (tmp_path / "runs.csv").write_text("name,money\n")
    assert not has_table(tmp_path)
    with pytest.raises(UserError, match="that no sweep wrote"):
        check_table(tmp_path)


def test_a_config_of_somebody_else_is_looked_at_without_looking_anything_up(tmp_path):
    (tmp_path / "config.yaml").write_text(f"data: ${{new_run:{tmp_path}/made}}\nresume: null\n")
    assert read_config(tmp_path) is None
    assert not (tmp_path / "made").exists()


def test_runs_in_folders_within_folders_are_found(tmp_path, capsys):
    names = ["seed=0/model/topdown=none", "seed=0/model/topdown=film", "10", "9", "9/inner"]
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        overrides = [f"model/topdown={name[-4:]}", f"seed={len(name)}", "+logger=csv"]
        summary = {"status": "done", "overrides": overrides, "command": "train", "fit_seconds": 1, "parameters": 1}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        (tmp_path / name / "config.yaml").write_text("{task: {}, model: {}, trainer: {}, data: {dir: data}}\n")
    _, common, columns, *_ = write_table(tmp_path).splitlines()
    assert common == "all runs: logger=csv"  # which the table does not repeat
    assert columns.split() == ["run", "status", "model/topdown", "seed", "fit_seconds", "parameters"]
    with open(tmp_path / "runs.csv", newline="") as file:
        found = [row["run"] for row in csv.DictReader(file)]
    assert found == ["9", "10", "seed=0/model/topdown=film", "seed=0/model/topdown=none"]  # none of 9 is another's
    assert [run.path.relative_to(tmp_path).as_posix() for run in read_runs(tmp_path)] == found


def test_resumed_runs_stay_with_their_variant(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "config.yaml").write_text("{task: {}, model: {}, trainer: {}, data: {dir: data}}\n")
        first = Record(folder, f"train seed={seed}", ["model/topdown=none", f"seed={seed}", "trainer.max_epochs=2"])
        before = first.end("stopped", error="SIGTERM")
        Record(folder, f"train resume={folder}", [], before).end("done", parameters=1)
    assert {found.variant for found in read_runs(tmp_path)} == {"default"}
    assert json.loads((tmp_path / "1/summary.json").read_text())["command"] == "train seed=1"


def test_a_run_of_before_there_were_parts_is_one_part(tmp_path):
    old = {"status": "done", "command": "c", "overrides": ["a=1", "++resume='x'"], "fit_seconds": 2.0, "seconds": 3.0}
    found = Record(tmp_path, "again", ["+a=2", "b=1"], old | {"steps": 5}).end("done")
    assert found["overrides"] == ["a=2", "b=1"]
    assert found["fit_seconds"] == pytest.approx(2.0, abs=0.1)
    assert [part["steps"] for part in found["parts"]] == [[0, 5], [0, 0]]


@pytest.mark.parametrize(
    ("old", "given", "wanted"),
    [
        (["a=1", "b=2"], ["b=3"], ["a=1", "b=3"]),
        (["+a=1"], ["a=2"], ["+a=2"]),
        (["a=1"], ["++a=2"], ["a=2"]),
        (["a=1"], ["~a"], ["~a"]),
        (["a=1"], ["ab=2"], ["a=1", "ab=2"]),
    ],
)
def test_of_each_override_the_last_counts(old, given, wanted):
    assert merged(old, given) == wanted


def test_minutes_are_of_training_also_after_resuming_in_mid_epoch(monkeypatch):
    now = 1e6  # seconds that the machine is up
    monkeypatch.setattr("vlabs.training.callbacks.speed.time.perf_counter", lambda: now)
    logged = {}
    task = SimpleNamespace(sample_ids=lambda batch: batch, log=lambda name, value, **_: logged.update({name: value}))
    trainer = SimpleNamespace(world_size=1, log_every_n_steps=1, sanity_checking=False)
    speed = SamplesPerSecond()
    speed.load_state_dict({"texts": 10, "seconds": 60.0})
    speed.on_train_start(trainer, task)
    now += 30
    speed.on_train_batch_end(trainer, task, None, [1, 2, 3], 4)
    assert logged["train/samples_per_second"] == pytest.approx(0.1)
    speed.on_validation_epoch_end(trainer, task)
    assert logged["seen/minutes"] == pytest.approx(1.5)
    now += 1000
    speed.on_validation_end(trainer, task)
    now += 30
    speed.on_train_batch_end(trainer, task, None, [1, 2, 3], 5)
    assert logged["train/samples_per_second"] == pytest.approx(0.1)  # validation does not count
    speed.on_validation_epoch_end(trainer, task)
    assert logged["seen/minutes"] == pytest.approx(2.0)


@pytest.mark.parametrize("content", [b"", bytes(8), b"\xff", None])
def test_the_wandb_run_is_known_where_its_file_is_damaged(content, tmp_path):
    assert _run_id(tmp_path) is None
    if content is not None:
        (tmp_path / "run_id").write_bytes(content)
    (tmp_path / "offline-run-20260101_000000-abc123").mkdir()
    assert _run_id(tmp_path) == "abc123"
    (tmp_path / "run_id").write_text("def456\n")
    assert _run_id(tmp_path) == "def456"


def test_a_start_that_was_stopped_continues(run, monkeypatch):
    edit(run / "summary.json", status="stopped")
    calls = []
    monkeypatch.setattr(
        "vlabs.training.start.subprocess.run", lambda c: calls.append(c) or SimpleNamespace(returncode=0)
    )
    make_start(run, ["task=vqa"])
    (run / "summary.json").write_bytes(b"")
    make_start(run, ["task=vqa"])
    assert [call[3:] for call in calls] == [[f"resume={run}"]] * 2
