"""What prepares data removes nothing of the user's, works alone in its folder, and calls data by their own name."""

import json
import subprocess
import sys

import datasets
import pytest
from PIL import Image
from test_prepare_vqa import Raw

from data_prep.readers import classes, own, segmentation, vqav2, webdataset
from data_prep.scenes import corpus as scenes
from data_prep.scenes import objects
from vlabs.checkpoints.checkpoint import history_of, load_checkpoint, packaged_starts
from vlabs.data import embedded
from vlabs.data.prepared import read_manifest
from vlabs.errors import UserError

HOLD = """
import sys, time
from vlabs.utils.files import new_folder
with new_folder(sys.argv[1], "--out-dir", resumable=True) as partial:
    (partial / "half").touch()
    print("ready", flush=True)
    time.sleep(60)
"""
QUICK = ["--vocab-size", "0", "--num-workers", "1"]
MADE = {
    "own table": (own, ["--table", "raw/table.jsonl", *QUICK], "out"),
    "own dataset": (own, ["--dataset", "raw/colors", *QUICK], "colors"),
    "classes": (classes, ["--raw-dir", "raw/classes"], "classes"),
    "webdataset": (webdataset, ["--shards", "raw/shard.tar"], "out"),
    "vqav2": (
        vqav2,
        ["--raw-dir", "raw/vqa", "--min-answer-count", "1", *QUICK],
        "vqa",
    ),
    "segmentation": (segmentation, ["--layout", "instances", "--raw-dir", "SCENES"], "scenes"),
    "scenes": (scenes, ["--size", "tiny", "--num-workers", "1", "--train-images", "1"], None),
    "objects": (objects, ["--size", "tiny", "--several", "2"], None),
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    import tarfile

    folder = tmp_path_factory.mktemp("preparations") / "raw"
    rows = [{"image": f"{n}.png", "caption": f"Number {n}"} for n in range(4)]
    for kind in ("train", "val"):
        (folder / "classes" / kind / "a").mkdir(parents=True)
    for n in range(4):
        picture = folder / f"{n}.png"
        Image.new("RGB", (9, 9), (60 * n, 0, 0)).save(picture)
        picture.with_suffix(".txt").write_text(f"Number {n}")
        for kind in ("train", "val"):
            (folder / "classes" / kind / "a" / f"{n}.png").write_bytes(picture.read_bytes())
    (folder / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with tarfile.open(folder / "shard.tar", "w") as archive:
        for name in [name for n in range(4) for name in (f"{n}.png", f"{n}.txt")]:
            archive.add(folder / name, name)
    captions = {"image": [str(folder / row["image"]) for row in rows], "caption": [row["caption"] for row in rows]}
    datasets.Dataset.from_dict(captions).cast_column("image", datasets.Image()).save_to_disk(str(folder / "colors"))
    Raw(images=3, splits=("train", "val")).zipped(folder / "vqa")
    return folder


def prepare(module, arguments, monkeypatch):
    monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
    module.main()


@pytest.mark.parametrize("kind", MADE)
def test_one_works_in_a_folder_at_a_time_and_leaves_what_is_the_users(kind, raw, tiny_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").symlink_to(raw)
    for name in ("out.partial", "out.source", "out-raw"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("of the user")
    (tmp_path / "out.lock").write_text("of the user")
    module, arguments, name = MADE[kind]
    arguments = [one.replace("SCENES", str(tiny_data.parent / "raw")) for one in arguments]
    other = subprocess.Popen([sys.executable, "-c", HOLD, "out"], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "ready\n"
    try:
        with pytest.raises(UserError, match="out is being made by another process"):
            prepare(module, [*arguments, "--out-dir", "out"], monkeypatch)
        assert (tmp_path / "out.vlabs-partial" / "half").exists()
    finally:
        other.kill()
        other.wait()
    prepare(module, [*arguments, "--out-dir", "out"], monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out", "out-raw", "out.lock", "out.partial", "out.source", "raw",
    ]  # fmt: skip
    assert not {".vlabs", ".vlabs-lock", ".vlabs-work", "half"} & {path.name for path in (tmp_path / "out").iterdir()}
    for theirs in (*tmp_path.glob("*/thesis"), tmp_path / "out.lock"):
        assert theirs.read_text() == "of the user"
    assert len(list(tmp_path.glob("*/thesis"))) == 3
    if name is not None:
        assert read_manifest(tmp_path / "out")["name"] == name


def test_a_dataset_of_the_hub_is_read_within_the_folder_of_the_work_and_continues_there(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw").symlink_to(raw)
    arguments = [*MADE["own dataset"][1], "--out-dir", "out"]
    with monkeypatch.context() as stopped:
        stopped.setattr(own, "prepare_in", lambda *given: sys.exit(9))
        with pytest.raises(SystemExit):
            prepare(own, arguments, monkeypatch)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.vlabs-partial", "raw"]
    (table,) = (tmp_path / "out.vlabs-partial").rglob("table.jsonl")
    before = table.stat().st_mtime_ns
    seen = []
    monkeypatch.setattr(own, "raw_files_of", lambda of: seen.append(of.path.stat().st_mtime_ns) or [])
    prepare(own, arguments, monkeypatch)
    assert seen == [before]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_data_are_called_as_they_are_and_not_as_their_layout(tmp_path, tiny_data):
    from data_prep.readers.snli_ve import SNLIVE
    from data_prep.readers.vqav2 import VQAv2

    assert read_manifest(tiny_data)["name"] == "scenes"
    raw = Raw(images=2, splits=("train",))
    assert VQAv2(raw.zipped(tmp_path / "doors")).called({}) == "doors"
    questions = next(content for name, content in raw.json.items() if "questions" in name)
    questions["info"] = {"description": "This is v2.0 of the VQA dataset."}
    assert VQAv2(raw.zipped(tmp_path / "downloads")).called({}) == "vqav2"
    (tmp_path / "snli_ve_dev.jsonl").write_text("{}\n")
    assert SNLIVE(tmp_path).called({"dev": 17_858}) == "snli_ve"
    assert SNLIVE(tmp_path).called({"dev": 1}) == tmp_path.name
    (tmp_path / "scenes.json").write_text("{}")
    assert SNLIVE(tmp_path).called({"dev": 1}) == "scenes"


def test_the_models_that_come_with_vlabs_say_that_they_saw_scenes_alone():
    for name in packaged_starts():
        checkpoint = load_checkpoint(name)
        assert {one["data"]["name"] for one in history_of(checkpoint.task, checkpoint.data)} == {"scenes"}, name


@pytest.mark.parametrize("split", ["../../elsewhere", "a/b", ".vlabs-work", ""])
def test_a_split_in_a_table_of_classes_is_no_path(split, raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    rows = [{"image": str(raw / "0.png"), "class": "a", "split": "train"}]
    rows += [{"image": str(raw / "1.png"), "class": "a", "split": split}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--table", "t.jsonl", "--out-dir", "inner/out"]
    if split:
        with pytest.raises(UserError, match="cannot be a split's name"):
            prepare(classes, arguments, monkeypatch)
    else:
        prepare(classes, arguments, monkeypatch)  # a row without one is of train
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "t.jsonl"]


def test_of_two_trainings_the_second_waits_for_the_corpus_of_the_first(tmp_path):
    code = """
import sys, time
from pathlib import Path
from vlabs.utils.files import locked
folder = Path(sys.argv[1])
with locked(folder, ""):
    print("ready", flush=True)
    time.sleep(0.5)
    (folder / "scenes").mkdir()
    (folder / "scenes/manifest.json").touch()
"""
    first = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "ready\n"
    with embedded._alone(tmp_path / "scenes", "manifest.json") as there:
        assert there, "it is made twice"
    first.wait()
    assert {path.name for path in tmp_path.iterdir()} - {".vlabs-lock"} == {"scenes"}
