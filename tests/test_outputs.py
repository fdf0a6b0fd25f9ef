"""What commands write: where a user says, over nothing else, in folders that are new and say what they are of."""

import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
from conftest import assert_one_line_error, command
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from vlabs import demo, export, predict, search, segment, vqa_eval
from vlabs.attention import __main__ as attention
from vlabs.attention.figures import save_out
from vlabs.errors import UserError
from vlabs.evaluate import _claimed
from vlabs.look import __main__ as look
from vlabs.prediction.search import Search, list_pictures
from vlabs.runs import folders
from vlabs.runs.groups import config_dir
from vlabs.utils.arguments import add_out, check_out
from vlabs.utils.files import mark

ROOT = Path(__file__).parent.parent


# --- files and folders that a user names ------------------------------------------------------------------------------

COMMANDS = {
    predict: (["--ckpt", "scenes", "--image", "a.png", "--question", "What?"], "x.png"),
    segment: (["--ckpt", "scenes", "--image", "a.png"], "x.png"),
    search: (["--ckpt", "scenes_search", "--images", ".", "--query", "star"], "x.png"),
    attention: (["--ckpt", "scenes", "--image", "a.png", "--question", "What?"], "x.svg"),
    look: (["--model", "clip", "--image", "a.png", "--text", "a cat"], "x.png"),
    vqa_eval: (["--annotations", "a.json", "--results", "r.json"], "x.json"),
    export: (["--ckpt", "scenes"], "x.safetensors"),
}


@pytest.mark.parametrize("what", ["a file", "a folder", "a name too long", "in a file"])
@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_a_file_that_is_there_or_cannot_be_is_refused_before_the_work(module, what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, name = COMMANDS[module]
    (tmp_path / "of the user").write_text("years of work")
    out = Path({"a name too long": "x" * 300 + name, "in a file": f"of the user/{name}"}.get(what, name))
    said = {"a file": "already exists.*--overwrite", "a folder": "is a folder"}.get(what, "cannot be written")
    if what == "a file":
        out.write_text("years of work")
    if what == "a folder":
        out.mkdir()
        (out / "thesis").touch()
    if what == "in a file" and module is not export:
        return  # said when it is written, with the same sentence
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["program", *arguments, "--out", str(out)])
    with pytest.raises(UserError, match=said):
        module.main()
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "of the user").read_text() == "years of work"
    assert what != "a file" or out.read_text() == "years of work"


def test_a_figure_without_a_name_gets_one_that_is_free_and_a_named_one_overwrites_when_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser()
    add_out(parser, "prediction.png")
    (tmp_path / "prediction.png").write_text("of the user")
    names = [save_out(Figure((1, 1)), parser.parse_args([])).name for _ in range(2)]
    assert names == ["prediction-2.png", "prediction-3.png"]
    assert (tmp_path / "prediction.png").read_text() == "of the user"
    named = parser.parse_args(["--out", "prediction.png", "--overwrite"])
    check_out(named)
    save_out(Figure((1, 1)), named)
    with Image.open("prediction.png") as picture:
        assert picture.width > 0
    monkeypatch.setattr(Figure, "savefig", lambda *given, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_out(Figure((1, 1)), parser.parse_args([]))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "prediction-2.png", "prediction-3.png", "prediction.png",
    ]  # fmt: skip


def exported(*arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["export", "--ckpt", "scenes", *map(str, arguments)])
    export.main()


def test_only_an_export_is_overwritten_by_an_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exported("--out", "model", monkeypatch=monkeypatch)
    exported("--out", "one.safetensors", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="--out model already exists.*--overwrite"):
        exported("--out", "model", monkeypatch=monkeypatch)
    (tmp_path / "model/README.md").write_text("old")
    (tmp_path / "one.safetensors").write_text("old")
    exported("--out", "model", "--overwrite", monkeypatch=monkeypatch)
    exported("--out", "one.safetensors", "--overwrite", monkeypatch=monkeypatch)
    assert "vqa on scenes" in (tmp_path / "model/README.md").read_text()
    assert (tmp_path / "one.safetensors").stat().st_size > 1e6
    (tmp_path / "model/thesis").write_text("years of work")  # of the user's, within an export
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"architectures": ["Bert"]}')
    before = sorted(tmp_path.rglob("*"))
    for out in ("model", "run", "theirs", "."):
        for form in ([], ["--format", "torch"]):
            with pytest.raises(UserError, match="was not made by this command"):
                exported("--out", out, "--overwrite", *form, monkeypatch=monkeypatch)
    assert sorted(tmp_path.rglob("*")) == before


# --- evaluations ------------------------------------------------------------------------------------------------------


def test_an_evaluation_goes_into_a_folder_of_its_own_and_overwrites_one_when_told(tmp_path):
    with _claimed(tmp_path, overwrite=False):
        (tmp_path / "metrics.json").write_text("half")
    with _claimed(tmp_path, overwrite=False):  # the one before did not end
        (tmp_path / "config.yaml").write_text("whole")
    with pytest.raises(UserError, match="already holds an evaluation.*overwrite=true"), _claimed(tmp_path, False):
        pass
    assert (tmp_path / "config.yaml").read_text() == "whole"
    with _claimed(tmp_path, overwrite=True):
        pass
    hold = "import time\nfrom vlabs.utils.files import *\nwith locked(Path(), ''): print(flush=True) or time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"\n"
    with pytest.raises(UserError, match="is being written by another evaluation"), _claimed(tmp_path, overwrite=True):
        pass
    other.kill()
    other.wait()


@pytest.mark.parametrize("overwrite", ["true", "false"])
def test_an_evaluation_leaves_the_folder_of_a_run_alone(overwrite, tiny_run, tiny_data, tmp_path, in_process):
    before = {path: path.read_bytes() for path in tiny_run[0].rglob("*") if path.is_file()}
    options = [f"ckpt={tiny_run[0]}", f"data.dir={tiny_data}", "logger=csv", f"overwrite={overwrite}"]
    result = in_process("vlabs.evaluate", [*options, f"hydra.run.dir={tiny_run[0]}"], tmp_path)
    assert_one_line_error(result, f"hydra.run.dir={tiny_run[0]}", "name another folder")
    assert {path: path.read_bytes() for path in tiny_run[0].rglob("*") if path.is_file()} == before


# --- the folders of whoever names none --------------------------------------------------------------------------------


def default_folder(config, *overrides, key="hydra.run.dir"):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        made = compose(config, list(overrides), return_hydra_config=True)
    found = OmegaConf.select(made, key)
    assert OmegaConf.select(made, key) == found  # it stays what it was
    return found


@pytest.mark.parametrize(
    ("config", "overrides", "key", "name"),
    [
        ("train", [], "run", "outputs/vqa/scenes-small_T"),
        ("train", ["experiment=scenes_retrieval", "data.size=tiny"], "run", "outputs/retrieval/scenes_captions-tiny_T"),
        ("train", ["data=vqav2", "data.dir='/x/my größe #1'"], "run", "outputs/vqa/vqav2-my-groe-1_T"),
        ("train", [], "sweep", "outputs/sweeps/vqa-scenes-small_T"),
        ("train", ["++hydra.overrides.task=['task=vqa,snli_ve']"], "sweep", "outputs/sweeps/scenes-small_T"),
        ("evaluate", ["ckpt=scenes"], "run", "outputs/evaluate/scenes-vqa-val_T"),
        ("evaluate", ["ckpt='runs/lr=0.1/checkpoints/best.ckpt'"], "run", "outputs/evaluate/lr-0.1-vqa-val_T"),
        ("evaluate", ["ckpt=user/name@v1", "split=test"], "run", "outputs/evaluate/name-v1-vqa-test_T"),
        ("evaluate", ["ckpt=a/b.safetensors", "evaluation@task=pairs"], "sweep", "outputs/evaluate/b-pairs-val_T"),
        ("evaluate", [f"ckpt={'x' * 300}"], "run", f"outputs/evaluate/{'x' * 80}-vqa-val_T"),
        ("evaluate", [], "run", "outputs/evaluate/vqa-val_T"),
    ],
)
def test_default_folders_are_new_and_say_what_they_are_of(config, overrides, key, name, tmp_path, monkeypatch):
    class Still:
        @staticmethod
        def now():
            import datetime

            return datetime.datetime(2026, 11, 27, 7, 44, 32)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "datetime", Still)
    found = [default_folder(config, *overrides, key=f"hydra.{key}.dir") for _ in range(3)]
    expected = name.replace("_T", "_2026-11-27_07-44-32")
    assert found == [expected, f"{expected}_2", f"{expected}_3"]
    assert re.fullmatch(r"[A-Za-z0-9/._-]+", found[0])


def test_a_process_that_is_not_the_first_of_a_run_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "is_rank_zero", lambda: False)
    default_folder("train")
    assert not list(tmp_path.iterdir())


def test_the_runs_of_a_sweep_share_a_folder_whatever_it_is_over(tiny_options, tmp_path):
    options = [*tiny_options[1:], "init=nowhere", "task=vqa,retrieval"]  # whose runs end before they begin
    result = command("vlabs.train", "-m", *options, cwd=tmp_path)
    assert result.stderr.count("failed: ") == 2
    (folder,) = (tmp_path / "outputs/sweeps").iterdir()
    assert re.fullmatch(r"scenes-prepared_[0-9_-]+", folder.name)
    assert {"0", "1"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["sweeps"]


def test_a_start_that_is_refused_leaves_nothing(tiny_run, tiny_options, tmp_path, in_process):
    of = f"ckpt={tiny_run[0]}"
    for module, arguments, said in (
        ("vlabs.train", [*tiny_options, "init=nowhere"], "nowhere does not exist"),
        ("vlabs.train", [*tiny_options, "data.batch_sise=2"], "data.batch_sise"),
        ("vlabs.train", [*tiny_options, "init=nowhere", "hydra.run.dir=a/b/c"], "nowhere does not exist"),
        ("vlabs.train", ["-m", *tiny_options, "seed=0,1", "plan=true"], "plan=true"),
        ("vlabs.train", ["-m", *tiny_options, "seed=0,1", "task.nonsense=1", "hydra.sweep.dir=a/b"], "task.nonsense"),
        ("vlabs.evaluate", [of, "split=nowhere"], "nowhere"),
        ("vlabs.evaluate", [of, "task=retrieval", "split=val"], "'vqa'"),
        ("vlabs.evaluate", [of, "split=val", "task.nonsense=1", "hydra.run.dir=a/b"], "task.nonsense"),
    ):
        result = in_process(module, arguments, tmp_path)
        assert_one_line_error(result, said)
        assert not list(tmp_path.iterdir()), (arguments, list(tmp_path.rglob("*")))
    # What was there stays.
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").touch()
    for folder in ("mine", "mine/run"):
        in_process("vlabs.train", [*tiny_options, "init=nowhere", f"hydra.run.dir={folder}"], tmp_path)
        assert [path.name for path in tmp_path.rglob("*")] == ["mine", "notes.txt"]


def test_a_wrong_evaluation_takes_nothing_from_the_one_that_it_would_overwrite(
    tiny_run, tiny_data, tmp_path, in_process
):
    options = [f"ckpt={tiny_run[0]}", f"data.dir={tiny_data}", "split=val", "logger=csv", "data.num_workers=0"]
    found = in_process("vlabs.evaluate", [*options, "hydra.run.dir=out"], tmp_path)
    assert found.returncode == 0, found.stderr
    before = (tmp_path / "out/metrics.json").read_bytes()
    wrong = in_process("vlabs.evaluate", [*options, "ckpt=nowhere", "hydra.run.dir=out", "overwrite=true"], tmp_path)
    assert_one_line_error(wrong, "nowhere does not exist")
    late = [options[0], "task=conditional", "task.source=gone", "hydra.run.dir=out", "overwrite=true"]
    assert_one_line_error(in_process("vlabs.evaluate", late, tmp_path), "task.source=gone")
    assert_one_line_error(in_process("vlabs.evaluate", [*options, "hydra.run.dir=out"], tmp_path), "overwrite=true")
    assert (tmp_path / "out/metrics.json").read_bytes() == before
    again = in_process("vlabs.evaluate", [*options, "hydra.run.dir=out", "overwrite=true"], tmp_path)
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_an_evaluation_at_once_and_leaves_nothing_half_written(
    number, tiny_run, tiny_data, tmp_path, in_process, monkeypatch
):
    begun = []

    def ended(*_):
        begun.append(1)
        if not (child := os.fork()):  # such as a loader process: it ends without a word
            os.kill(os.getpid(), number)
            os._exit(1)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == number
        os.kill(os.getpid(), number)
        return []

    monkeypatch.setattr("vlabs.tasks.vqa.VQATask.predict_step", ended)
    options = [f"ckpt={tiny_run[0]}", f"data.dir={tiny_data}", "data.num_workers=0", "data.eval_batch_size=2"]
    before = signal.signal(number, signal.SIG_DFL)  # which nohup and others may have changed
    try:
        result = in_process("vlabs.evaluate", [*options, "hydra.run.dir=out"], tmp_path)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert result.returncode == 128 + number, result.stderr
    assert result.stderr.count(f"stopped: {number.name}") == len(begun) == 1
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


# --- demo, make clean -------------------------------------------------------------------------------------------------


def test_a_demo_removes_what_a_demo_left_and_no_more(tmp_path):
    for name, content in (("run/config.yaml", "a run"), ("run/checkpoints/best.ckpt", "work of weeks")):
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_text(content)
    with pytest.raises(UserError, match="is not a demo's folder"), demo._demo_folder(tmp_path / "runs"):
        pass
    assert (tmp_path / "runs/run/checkpoints/best.ckpt").read_text() == "work of weeks"
    with demo._demo_folder(tmp_path / "demo") as out:
        (out / "run").mkdir()
        (out / "run/config.yaml").touch()
        (out / "thesis").write_text("of the user")
    with demo._demo_folder(tmp_path / "demo") as out:
        assert not (out / "run").exists()
        assert (out / "thesis").read_text() == "of the user"


def test_make_clean_removes_what_make_made_alone(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["outputs/vqa/run/last.ckpt", "data/scenes/manifest.json", "demo/run/config.yaml", "other/thesis"]
    for name in [*kept, ".venv/bin/python", "site/index.html"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert all((tmp_path / name).is_file() for name in kept)
    assert not (tmp_path / ".venv").exists()
    assert not (tmp_path / "site").exists()
    mark(tmp_path / "demo", "demo")
    (tmp_path / "demo/thesis").touch()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["thesis"]
    mark(tmp_path / "demo", "demo")
    (tmp_path / "demo/thesis").unlink()
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert not (tmp_path / "demo").exists()


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    Image.new("RGB", (20, 20), "red").save(tmp_path / "a.JPG", "JPEG")
    Image.new("RGB", (20, 20), "blue").save(tmp_path / "b.png")
    for name in ("paper.pdf", "film.mpg", "figure.eps", "notes.txt", "Makefile"):
        (tmp_path / name).write_bytes(b"%PDF-1.4 \x00\x00\x01\xba")
    return tmp_path


def test_what_is_no_image_by_its_name_is_left_out_and_counted(pictures, capsys):
    assert [path.name for path in list_pictures(pictures)] == ["a.JPG", "b.png"]
    said = capsys.readouterr().out
    assert "left out: 5 files that are no images by their names" in said
    assert "1 .pdf" in said


def test_the_page_leaves_out_broken_images_when_told(pictures, tmp_path_factory, capsys, monkeypatch):
    from argparse import Namespace

    from vlabs.demo_page import _searches

    (pictures / "broken.jpg").write_bytes((pictures / "paper.pdf").read_bytes())
    given = {"search_ckpt": "scenes_search", "images": [str(pictures)], "tokenizer": None, "device": "cpu"}
    given |= {"index": tmp_path_factory.mktemp("index")}
    with pytest.raises(UserError, match="broken.jpg"):
        _searches(Namespace(**given, on_bad="error"), True)
    (search_of,) = _searches(Namespace(**given, on_bad="skip"), True).values()
    assert isinstance(search_of, Search)
    assert len(search_of.pictures) == 2
    assert "broken.jpg" in capsys.readouterr().out
