"""Raw captions become the prepared form: whole, the same however it was made, or not at all."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from conftest import warm_python
from PIL import Image

from data_prep.engine.pipeline import Options, prepare
from data_prep.readers.flickr30k import Flickr30k
from data_prep.scenes.corpus import make_scenes
from data_prep.scenes.render import SPLITS
from data_prep.scenes.scenes_captions import ScenesCaptions
from vlabs.data.features import CAPTION_FEATURES
from vlabs.data.prepared import check_kind, load_split, read_manifest
from vlabs.errors import UserError

FLICKR_SPLITS = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
COCO_SPLITS = ["train"] * 4 + ["restval"] * 3 + ["val"] * 2 + ["test"] * 2


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number % 5, 16), (number * 37 % 256, number * 11 % 256, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


class Raw:
    """Small raw data in Karpathy's layout; what a test changes here is written by `zipped` or `unpacked`."""

    def __init__(self, name: str, splits: list[str]) -> None:
        self.name = name
        self.entries: list[dict[str, Any]] = []
        self.images: dict[str, bytes] = {}
        for number, split in enumerate(splits):
            imgid = (number * 7) % len(splits) if len(splits) % 7 else number  # not in order
            sentids = range(imgid * 5, imgid * 5 + 2 + number % 4)
            entry: dict[str, Any] = {
                "imgid": imgid,
                "split": split,
                "sentids": list(sentids),
                "sentences": [
                    {"raw": f"Picture {imgid}: 何か {i}.", "tokens": ["picture"], "imgid": imgid, "sentid": i}
                    for i in reversed(sentids)
                ],
            }
            if name == "flickr30k":
                entry["filename"] = f"{1000 + imgid}.jpg"
                folder = "flickr30k-images"
            else:
                folder = entry["filepath"] = "train2014" if split == "train" else "val2014"
                entry["cocoid"] = 300 + imgid
                entry["filename"] = f"COCO_{folder}_{300 + imgid:012d}.jpg"
            self.entries.append(entry)
            self.images[f"{folder}/{entry['filename']}"] = jpeg(imgid)

    @property
    def json(self) -> bytes:
        # The released files have the list first.
        return json.dumps({"images": self.entries, "dataset": self.name}).encode()

    def image_name(self, entry: dict[str, Any]) -> str:
        return f"{entry.get('filepath', 'flickr30k-images')}/{entry['filename']}"

    def zipped(self, folder: Path, archive: str = "caption_datasets.zip", member: str | None = None) -> Path:
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("dataset_other.json", "{")
            file.writestr(member or f"dataset_{self.name}.json", self.json)
        for place in sorted({name.split("/")[0] for name in self.images}):
            with zipfile.ZipFile(folder / f"{place}.zip", "w") as file:
                for name, image in self.images.items():
                    if name.startswith(place):
                        file.writestr(name, image)
        return folder

    def unpacked(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / f"dataset_{self.name}.json").write_bytes(self.json)
        for name, image in self.images.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(image)
        return folder


def command(module: str, *arguments: object, python: str | None = None) -> list[str]:
    return [python or warm_python(), "-m", module, *map(str, arguments)]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(module, *arguments), capture_output=True, text=True)


def run_raw(name: str, raw: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    defaults = ["--vocab-size", 300, "--num-workers", 1, "--shard-size", 3]
    return run(f"data_prep.{name}", "--raw-dir", raw, "--out-dir", out, *defaults, *more)


def prepared(name: str, raw: Path, out: Path, *more: object) -> Path:
    done = run_raw(name, raw, out, *more)
    assert done.returncode == 0, done.stderr
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def without_manifest(folder: Path) -> dict[str, bytes]:
    found = content(folder)
    del found["manifest.json"]
    return found


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The line that a failed command ends with."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def flickr(tmp_path_factory: pytest.TempPathFactory) -> tuple[Raw, Path, Path]:
    """Raw data, the folder with its zip files, and the prepared folder (in shards of 3 images)."""
    folder = tmp_path_factory.mktemp("flickr")
    raw = Raw("flickr30k", FLICKR_SPLITS)
    return raw, raw.zipped(folder / "raw"), prepared("flickr30k", folder / "raw", folder / "out")


def test_rows_hold_what_the_raw_files_say(flickr: tuple[Raw, Path, Path]) -> None:
    raw, _, out = flickr
    for split in ("train", "val", "test"):
        rows = load_split(out, split)
        assert rows.features == CAPTION_FEATURES
        entries = sorted((e for e in raw.entries if e["split"] == split), key=lambda e: e["imgid"])
        assert rows["image_id"] == [entry["imgid"] for entry in entries]
        for row, entry in zip(rows, entries, strict=True):
            assert row["image"] == raw.images[raw.image_name(entry)]
            assert row["caption_id"] == entry["sentids"]
            by_id = {sentence["sentid"]: sentence["raw"] for sentence in entry["sentences"]}
            assert row["caption"] == [by_id[i] for i in row["caption_id"]]
            assert row["target_instances"] == [[]] * len(by_id)


def test_manifest_says_what_it_is_and_counts(flickr: tuple[Raw, Path, Path]) -> None:
    raw, zipped, out = flickr
    manifest = read_manifest(out)
    assert (manifest["kind"], manifest["name"]) == ("captions", "flickr30k")
    assert set(manifest["splits"]) == {"train", "val", "test"}
    train = manifest["splits"]["train"]
    assert set(train) == {"images", "captions", "captions_with_region", "sha256"}
    assert (train["images"], train["captions"]) == (6, sum(len(e["sentids"]) for e in raw.entries[:6]))
    assert manifest["options"] == {"vocab_size": 300, "on_bad": "error", "shard_size": 3}
    assert "vocabulary" not in manifest
    assert not (out / "answers.json").exists()
    sizes = {entry["name"]: entry["size"] for entry in manifest["raw_files"]}
    assert sizes == {path.name: path.stat().st_size for path in zipped.iterdir()}
    assert str(zipped.parent) not in (out / "manifest.json").read_text()


def test_tokenizer_knows_the_train_captions_and_every_other_text(flickr: tuple[Raw, Path, Path]) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(flickr[2] / "tokenizer" / "tokenizer.json"))
    assert "Picture" in tokenizer.get_vocab()
    for text in ("Picture 3: 何か", "a 🦓"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_unpacked_files_give_the_same_splits(flickr: tuple[Raw, Path, Path], tmp_path: Path) -> None:
    raw, _, out = flickr
    other = prepared("flickr30k", raw.unpacked(tmp_path / "raw"), tmp_path / "out")
    assert without_manifest(other) == without_manifest(out)
    assert read_manifest(other)["splits"] == read_manifest(out)["splits"]


def test_flickr30k_as_others_have_packed_it_gives_the_same_splits(
    flickr: tuple[Raw, Path, Path], tmp_path: Path
) -> None:
    raw, _, out = flickr
    folder = raw.zipped(tmp_path / "raw", archive="flickr30k.zip", member="flickr30k/dataset.json")
    (folder / "flickr30k-images.zip").unlink()
    with zipfile.ZipFile(folder / "flickr30k_images.zip", "w") as archive:
        for name, image in raw.images.items():
            archive.writestr(name.split("/")[1], image)
    assert without_manifest(prepared("flickr30k", folder, tmp_path / "a")) == without_manifest(out)

    unpacked = raw.unpacked(tmp_path / "unpacked")
    (unpacked / "flickr30k-images").rename(unpacked / "flickr30k_images")
    assert without_manifest(prepared("flickr30k", unpacked, tmp_path / "b")) == without_manifest(out)


def test_number_of_workers_changes_nothing(flickr: tuple[Raw, Path, Path], tmp_path: Path) -> None:
    _, zipped, out = flickr
    assert content(prepared("flickr30k", zipped, tmp_path / "out", "--num-workers", 2)) == content(out)


def test_finished_folder_is_left_alone(flickr: tuple[Raw, Path, Path]) -> None:
    _, zipped, out = flickr
    before = content(out)
    again = run_raw("flickr30k", zipped, out)
    assert again.returncode == 0
    assert "is there already" in again.stdout
    assert "other options" in error_line(run_raw("flickr30k", zipped, out, "--vocab-size", 400))
    assert content(out) == before


def test_killed_run_continues_and_ends_the_same(tmp_path: Path) -> None:
    zipped = Raw("coco", ["train", "restval", "val", "test"] * 100).zipped(tmp_path / "raw")
    out, partial = tmp_path / "out", tmp_path / "out.vlabs-partial"
    options = ["--raw-dir", zipped, "--vocab-size", 0, "--shard-size", 4, "--num-workers", 2]
    process = subprocess.Popen(
        command("data_prep.coco_captions", *options, "--out-dir", out, python=sys.executable),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(partial.glob("*/*.arrow")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert 0 < len(list(partial.glob(".vlabs-work/pipeline/records/*.json"))) < 100
    resumed = run("data_prep.coco_captions", *options, "--out-dir", out)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing in" in resumed.stdout
    assert not partial.exists()
    whole = run("data_prep.coco_captions", *options, "--out-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert content(out) == content(tmp_path / "whole")


def test_restval_is_training_and_its_images_are_those_of_val2014(tmp_path: Path) -> None:
    raw = Raw("coco", COCO_SPLITS)
    out = prepared("coco_captions", raw.zipped(tmp_path / "zips"), tmp_path / "out")
    counts = {split: counted["images"] for split, counted in read_manifest(out)["splits"].items()}
    assert counts == {"train": 7, "val": 2, "test": 2}
    images = {row["image_id"]: row["image"] for row in load_split(out, "train")}
    assert images == {e["cocoid"]: raw.images[raw.image_name(e)] for e in raw.entries[:7]}

    # Half of the downloads unpacked: the same.
    folder = raw.unpacked(tmp_path / "half")
    for path in (folder / "val2014").iterdir():
        path.unlink()
    (folder / "val2014").rmdir()
    (tmp_path / "zips" / "val2014.zip").rename(folder / "val2014.zip")
    assert without_manifest(prepared("coco_captions", folder, tmp_path / "other")) == without_manifest(out)


def test_cocos_own_captions_are_read_zipped_or_not(tmp_path: Path) -> None:
    raw = tmp_path / "mine"
    for first, subset in enumerate(("train2017", "val2017")):
        (raw / subset).mkdir(parents=True)
        Image.new("RGB", (8, 6), "red").save(raw / subset / "1.jpg")
        (raw / "annotations").mkdir(exist_ok=True)
        captions = [{"id": 2 * first + n, "image_id": 7 + first, "caption": f"Box {n}."} for n in range(2)]
        content = {"images": [{"id": 7 + first, "file_name": "1.jpg"}], "annotations": captions}
        (raw / f"annotations/captions_{subset}.json").write_text(json.dumps(content))
    out = prepared("coco2017", raw, tmp_path / "out")
    [row] = load_split(out, "val")
    assert (row["image_id"], row["caption_id"], row["caption"]) == (8, [2, 3], ["Box 0.", "Box 1."])
    assert read_manifest(out)["name"] == "mine"  # not COCO's numbers
    for folder in ("annotations", "train2017", "val2017"):
        shutil.make_archive(str(raw / folder), "zip", raw, folder)
        shutil.rmtree(raw / folder)
    (raw / "annotations.zip").rename(raw / "annotations_trainval2017.zip")
    assert without_manifest(prepared("coco2017", raw, tmp_path / "zipped")) == without_manifest(out)
    (raw / "val2017.zip").unlink()
    assert "val2017.zip (or the folder val2017/)" in error_line(run_raw("coco2017", raw, tmp_path / "no"))


def test_scenes_captions_carry_the_instances_they_are_about(tmp_path: Path) -> None:
    make_scenes("tiny", tmp_path / "raw", num_workers=1)
    out = prepared("scenes_captions", tmp_path / "raw", tmp_path / "out")
    assert set(read_manifest(out)["splits"]) == set(SPLITS)
    content_of_json = json.loads((tmp_path / "raw" / "dataset_scenes.json").read_text())
    said = {
        (image["split"], image["cocoid"], s["sentid"]): (s["raw"], [target for (target,) in s["target_instances"]])
        for image in content_of_json["images"]
        for s in image["sentences"]
    }
    found = {
        (split, row["image_id"], caption_id): (caption, targets)
        for split in SPLITS
        for row in load_split(out, split)
        for caption_id, caption, targets in zip(row["caption_id"], row["caption"], row["target_instances"], strict=True)
    }
    assert found == said

    prepare(ScenesCaptions(tmp_path / "raw"), tmp_path / "from code", Options(vocab_size=300, shard_size=3))
    assert content(tmp_path / "from code") == content(out)


def test_bad_items_are_all_named_and_leave_no_trace_when_skipped(tmp_path: Path) -> None:
    raw = Raw("flickr30k", FLICKR_SPLITS)
    missing, unreadable, silent, twice, again, said = raw.entries[:6]
    del raw.images[raw.image_name(missing)]
    raw.images[raw.image_name(unreadable)] = b"no image"
    silent["sentences"] = []
    twice["sentences"][0]["raw"] = " \n"
    again["sentences"][0]["sentid"] = twice["sentences"][1]["sentid"]
    raw.entries.append({**said, "split": "test", "sentences": [{"raw": "Leaked.", "sentid": 999}]})
    folder = raw.unpacked(tmp_path / "raw")
    done = run_raw("flickr30k", folder, tmp_path / "out")
    assert "6 bad items" in error_line(done)
    for named in (
        f"train: missing image: {raw.image_name(missing)}",
        f"train: unreadable image: {raw.image_name(unreadable)}",
        f"train: image without captions: image {silent['imgid']} ({raw.image_name(silent)})",
        f"train: empty caption: caption {twice['sentences'][0]['sentid']}",
        f"train: duplicate caption id: caption {twice['sentences'][1]['sentid']}",
        f"test: duplicate image id: image {said['imgid']} ({raw.image_name(said)})",
    ):
        assert f"bad: {named}" in done.stderr
    assert not (tmp_path / "out").exists()

    out = prepared("flickr30k", folder, tmp_path / "out", "--on-bad", "skip")
    manifest = read_manifest(out)
    reasons = ("duplicate caption id", "duplicate image id", "empty caption", "image without captions")
    assert manifest["dropped"] == dict.fromkeys((*reasons, "missing image", "unreadable image"), 1)
    assert len(manifest["dropped_items"]) == 6
    assert manifest["splits"]["train"]["images"] == 3
    assert load_split(out, "test")["image_id"] == sorted(e["imgid"] for e in raw.entries[8:10])
    # Nothing of the run is in it, such as an address in an image library's message.
    assert content(prepared("flickr30k", folder, tmp_path / "more", "--on-bad", "skip")) == content(out)


def test_a_single_bad_image_is_named_in_the_error_and_can_be_mended(tmp_path: Path) -> None:
    raw = Raw("flickr30k", FLICKR_SPLITS)
    name = raw.image_name(raw.entries[2])
    folder = raw.unpacked(tmp_path / "raw")
    (folder / name).write_bytes(raw.images[name][:-60])
    assert name in error_line(run_raw("flickr30k", folder, tmp_path / "out"))
    (folder / name).write_bytes(raw.images[name])
    done = run_raw("flickr30k", folder, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "continuing in" in done.stdout
    assert read_manifest(tmp_path / "out")["splits"]["train"]["images"] == 6


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"split": None}, "'split' must be text"),
        ({"split": "../up"}, "cannot be a split's name"),
        ({"imgid": "x"}, "'imgid' must be a whole number"),
        ({"imgid": 2**70}, "image 10 cannot be stored"),
        ({"sentences": {}}, "'sentences' must be a list"),
        ({"sentences": [{"sentid": 999}]}, "image 10 has no 'raw'"),
        ({"sentences": [{"raw": 3, "sentid": 999}]}, "'caption' must be text"),
        ({"sentences": [{"raw": "a", "sentid": 999, "target_instances": 3}]}, "'target_instances' must be a list"),
        ({"sentences": [{"raw": "a", "sentid": 999, "target_instances": [3, [4]]}]}, "pass one list for each phrase"),
        ({"filename": 5}, "'filename' must be text"),
    ],
)
def test_an_entry_of_the_wrong_form_is_named(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    raw = Raw("flickr30k", FLICKR_SPLITS)
    raw.entries.append({**raw.entries[0], "imgid": 77, **entry})
    with pytest.raises(UserError) as raised:
        prepare(Flickr30k(raw.unpacked(tmp_path / "raw")), tmp_path / "out", Options(vocab_size=0))
    assert message in str(raised.value)
    assert "dataset_flickr30k.json, image 10" in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    assert "there is no folder" in error_line(run_raw("flickr30k", tmp_path / "nowhere", tmp_path / "out"))
    (tmp_path / "empty").mkdir()
    line = error_line(run_raw("flickr30k", tmp_path / "empty", tmp_path / "out"))
    for name in ("dataset_flickr30k.json", "flickr30k.zip", "caption_datasets.zip", "flickr30k-images.zip"):
        assert name in line
    line = error_line(run_raw("coco_captions", tmp_path / "empty", tmp_path / "out"))
    for name in ("dataset_coco.json", "train2014.zip", "val2014.zip"):
        assert name in line
    assert "vlabs prepare scenes " in error_line(run_raw("scenes_captions", tmp_path / "empty", tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    raw = Raw("flickr30k", FLICKR_SPLITS)
    folder = raw.unpacked(tmp_path / "json")
    captions = folder / "dataset_flickr30k.json"
    captions.write_bytes(raw.json[:-400])
    assert captions.name in error_line(run_raw("flickr30k", folder, tmp_path / "out", "--on-bad", "skip"))
    captions.write_text('{"annotations": []}')
    assert "has no 'images'" in error_line(run_raw("flickr30k", folder, tmp_path / "out"))
    for name in ("flickr30k-images.zip", "caption_datasets.zip"):
        zipped = raw.zipped(tmp_path / f"with broken {name}")
        (zipped / name).write_bytes((zipped / name).read_bytes()[:-100])
        assert f"{name} is not a whole zip file" in error_line(run_raw("flickr30k", zipped, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_the_other_kind_is_refused_with_the_command_to_make_one(
    flickr: tuple[Raw, Path, Path], tiny_data: Path, tmp_path: Path
) -> None:
    check_kind(flickr[2], "captions")
    check_kind(tiny_data, "vqa")
    with pytest.raises(UserError, match=r"holds captions, not questions: .*vlabs prepare vqav2"):
        check_kind(flickr[2], "vqa")
    with pytest.raises(UserError, match=r"holds questions, not captions: .*vlabs prepare flickr30k"):
        check_kind(tiny_data, "captions")
    with pytest.raises(UserError, match=r"no prepared data.*coco_captions"):
        check_kind(tmp_path, "captions")


# --- tables of your own -------------------------------------------------------------------------------------------

OWN: list[dict[str, Any]] = [
    {"image": "a.jpg", "caption": "Ein Zebra, \"gestreift\""},
    {"image": "sub/ü.png", "caption": "斑马"},
    {"image": "a.jpg", "caption": "a\nzebra" + " again" * 10_000},
    {"image": "c.jpg", "caption": "no zebra"},
]  # fmt: skip


@pytest.fixture
def own_images(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for number, name in enumerate(("a.jpg", "sub/ü.png", "c.jpg")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name)
    return tmp_path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def run_own(table: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    options = ["--vocab-size", 300, "--num-workers", 1]
    return run("data_prep.own", "--table", table, "--out-dir", out, *options, *more)


def test_own_captions_of_one_image_are_one_row(own_images: Path) -> None:
    done = run_own(write_jsonl(own_images / "c.jsonl", OWN), own_images / "out", "--val-fraction", 0)
    assert done.returncode == 0, done.stderr
    rows = load_split(own_images / "out", "train")
    assert rows.features == CAPTION_FEATURES
    assert rows["image_id"] == [1, 2, 3]
    assert rows["caption_id"] == [[1, 3], [2], [4]]
    assert rows[0]["caption"] == [OWN[0]["caption"], OWN[2]["caption"]]
    assert rows[0]["image"] == (own_images / "a.jpg").read_bytes()
    manifest = read_manifest(own_images / "out")
    assert manifest["kind"] == "captions"
    assert "min_answer_count" not in manifest["options"]
    assert not (own_images / "out" / "answers.json").exists()


def test_own_captions_in_csv_give_the_same_as_in_json_lines(own_images: Path) -> None:
    with (own_images / "c.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "caption", "split", "caption_id"])
        for row in OWN:
            writer.writerow([row["image"], "", row["caption"], "", ""])
    from_csv = run_own(own_images / "c.csv", own_images / "csv")
    from_jsonl = run_own(write_jsonl(own_images / "c.jsonl", OWN), own_images / "jsonl")
    assert from_csv.returncode == from_jsonl.returncode == 0, from_csv.stderr + from_jsonl.stderr
    assert without_manifest(own_images / "csv") == without_manifest(own_images / "jsonl")
    splits = read_manifest(own_images / "csv")["splits"]
    assert (splits["train"]["images"], splits["val"]["images"]) == (2, 1)


def test_own_caption_ids_and_splits_are_the_tables(own_images: Path) -> None:
    rows = [
        {**row, "split": split, "caption_id": 9 - i} for i, (row, split) in enumerate(zip(OWN, "abab", strict=True))
    ]
    done = run_own(write_jsonl(own_images / "c.jsonl", rows), own_images / "out")
    assert done.returncode == 0, done.stderr
    assert load_split(own_images / "out", "a")["caption_id"] == [[7, 9]]
    assert load_split(own_images / "out", "b")["caption_id"] == [[8], [6]]
    assert not (own_images / "out" / "tokenizer").exists()  # nothing is in train


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "a.jpg", "question": "What?"}', "line 2 has a 'question' where the rows before it have"),
        ('{"image": "a.jpg", "question": "What?", "caption": "x"}', "line 2 has both a 'question' and a 'caption'"),
        ('{"image": "a.jpg"}', "empty caption: "),
        ('{"image": "a.jpg", "caption": 3}', "'caption' must be text"),
        ('{"image": "a.jpg", "caption": " "}', "line 2; all are listed"),
        ('{"image": "a.jpg", "caption": "x", "caption_id": 1}', "either all rows have a caption_id or none has"),
        ('{"image": "absent.jpg", "caption": "x"}', "missing image: absent.jpg"),
    ],
)  # fmt: skip
def test_own_names_the_row_that_is_wrong(own_images: Path, row: str, message: str) -> None:
    (own_images / "c.jsonl").write_text(f"{json.dumps(OWN[0])}\n{row}\n")
    assert message in error_line(run_own(own_images / "c.jsonl", own_images / "out"))
    assert not (own_images / "out").exists()


def test_own_tables_of_nothing_and_ids_given_twice_are_refused(own_images: Path) -> None:
    table = write_jsonl(own_images / "c.jsonl", [])
    assert "has no rows" in error_line(run_own(table, own_images / "out"))
    write_jsonl(table, [{**row, "caption_id": 5, "split": split} for row, split in zip(OWN[:2], "ab", strict=True)])
    assert "duplicate caption id: caption 5" in error_line(run_own(table, own_images / "out"))
