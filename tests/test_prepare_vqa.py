"""Raw VQA data becomes the prepared form: whole, the same however it was made, or not at all."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pytest
import tokenizers
from conftest import warm_python
from PIL import Image

from data_prep.engine.texts import SoftScores
from vlabs.data.features import VQA_FEATURES
from vlabs.data.prepared import load_split, read_answers, read_manifest
from vlabs.metrics.vqa import answer_accuracy, vqa_accuracy

ANSWERS = [
    "red",
    "Red",
    "blue.",
    "two",
    "2",
    "a dog",
    "dog",
    "yes",
    "no",
    "dont",
    "1,000",
    "t-shirt",
    "t shirt",
    "",
    "a",
]
YEARS = {"train": "train2014", "val": "val2014", "test": "test2015"}


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number % 5, 16), (number * 37 % 256, number * 11 % 256, 90)).save(buffer, "JPEG")
    return buffer.getvalue()


class Raw:
    """Small raw data in VQA v2's layout; what a test changes here is written by `zipped` or `unpacked`."""

    def __init__(self, images: int = 12, splits: tuple[str, ...] = ("train", "val", "test")) -> None:
        draw = random.Random(0)
        self.json: dict[str, dict[str, Any]] = {}
        self.images: dict[str, bytes] = {}
        for place, split in enumerate(splits):
            subset = YEARS[split]
            questions, annotations = [], []
            for number in range(images):
                image_id = 1000 * (place + 1) + (number * 7) % images  # not in order
                self.images[f"{subset}/COCO_{subset}_{image_id:012d}.jpg"] = jpeg(image_id)
                for position in range(1 + number % 4):
                    question_id = image_id * 10 + position
                    text = draw.choice(["What colour is it?", "How many dogs?", "Is it red?", "何色ですか"])
                    questions.append({"image_id": image_id, "question_id": question_id, "question": text})
                    answers = draw.choices(ANSWERS, k=10) if position else [draw.choice(ANSWERS)] * 10
                    annotations.append(
                        {
                            "image_id": image_id,
                            "question_id": question_id,
                            "question_type": "what",
                            "answer_type": draw.choice(["yes/no", "number", "other"]),
                            "multiple_choice_answer": max(answers, key=answers.count),
                            "answers": [
                                {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
                                for i, answer in enumerate(answers)
                            ],
                        }
                    )
            self.json[f"v2_OpenEnded_mscoco_{subset}_questions.json"] = {
                "info": {},
                "data_subtype": subset,
                "questions": questions,
            }
            if split != "test":
                self.json[f"v2_mscoco_{subset}_annotations.json"] = {
                    "info": {},
                    "data_subtype": subset,
                    "annotations": annotations,
                }

    def questions(self, split: str) -> list[dict[str, Any]]:
        return self.json[f"v2_OpenEnded_mscoco_{YEARS[split]}_questions.json"]["questions"]

    def annotations(self, split: str) -> list[dict[str, Any]]:
        return self.json[f"v2_mscoco_{YEARS[split]}_annotations.json"]["annotations"]

    def zipped(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        members: dict[str, dict[str, bytes]] = {}
        for name, content in self.json.items():
            kind = "Questions" if "questions" in name else "Annotations"
            split = next(s for s in ("train", "val", "test") if f"mscoco_{s}" in name).capitalize()
            members.setdefault(f"v2_{kind}_{split}_mscoco.zip", {})[name] = json.dumps(content).encode()
        for name, image in self.images.items():
            members.setdefault(f"{name.split('/')[0]}.zip", {})[name] = image
        for number, (archive, files) in enumerate(members.items()):
            method = zipfile.ZIP_DEFLATED if archive.startswith("v2_") or number % 2 else zipfile.ZIP_STORED
            with zipfile.ZipFile(folder / archive, "w", method) as file:
                for name, content_bytes in files.items():
                    file.writestr(name, content_bytes)
        return folder

    def unpacked(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name, content in self.json.items():
            (folder / name).write_text(json.dumps(content))
        for name, image in self.images.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(image)
        return folder


def command(module: str, *arguments: object, python: str | None = None) -> list[str]:
    return [python or warm_python(), "-m", module, *map(str, arguments)]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(module, *arguments), capture_output=True, text=True)


def run_vqav2(raw: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    defaults = ["--min-answer-count", 1, "--vocab-size", 300, "--num-workers", 1]
    return run("data_prep.vqav2", "--raw-dir", raw, "--out-dir", out, *defaults, *more)


def prepared(raw: Path, out: Path, *more: object) -> Path:
    done = run_vqav2(raw, out, *more)
    assert done.returncode == 0, done.stderr
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The line that a failed command ends with."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Raw, Path, Path]:
    """Raw data, the folder with its zip files, and the prepared folder (in shards of 5 images)."""
    folder = tmp_path_factory.mktemp("vqa")
    raw = Raw()
    raw.annotations("train")[3]["target_instances"] = [77, 5]
    subset = copy_of_test_questions(raw)
    raw.json["v2_OpenEnded_mscoco_test-dev2015_questions.json"] = subset
    zipped = raw.zipped(folder / "raw")
    return raw, zipped, prepared(zipped, folder / "out", "--shard-size", 5)


def copy_of_test_questions(raw: Raw) -> dict[str, Any]:
    test = raw.json["v2_OpenEnded_mscoco_test2015_questions.json"]
    return {**test, "questions": test["questions"][:6]}


@pytest.mark.parametrize("packed", [True, False])
def test_the_files_of_vqa_v1_are_read_alike(tmp_path: Path, packed: bool) -> None:
    raw = Raw(images=4, splits=("train", "val"))
    newer = prepared(raw.unpacked(tmp_path / "v2"), tmp_path / "out2")
    raw.json = {name.removeprefix("v2_"): value for name, value in raw.json.items()}
    raw.json["MultipleChoice_mscoco_val2014_questions.json"] = {"questions": []}  # lies beside them, and is not read
    if packed:
        folder = raw.zipped(tmp_path / "v1")
        for path in folder.glob("v2_*"):
            path.rename(folder / path.name.removeprefix("v2_"))
    else:
        folder = raw.unpacked(tmp_path / "v1")
    older = prepared(folder, tmp_path / "out1")
    for split in ("train", "val"):
        assert load_split(older, split).to_list() == load_split(newer, split).to_list()


def test_rows_hold_what_the_raw_files_say(example: tuple[Raw, Path, Path]) -> None:
    raw, _, out = example
    for split in ("train", "val", "test", "test-dev"):
        rows = datasets.load_from_disk(str(out / split))
        assert rows.features == VQA_FEATURES
        assert rows["image_id"] == sorted(rows["image_id"])
        questions = raw.questions("test")[:6] if split == "test-dev" else raw.questions(split)
        annotations = raw.annotations(split) if split in ("train", "val") else []
        by_id = {entry["question_id"]: entry for entry in annotations}
        seen = []
        for row in rows:
            assert row["question_id"] == sorted(row["question_id"])
            subset = YEARS[split.removesuffix("-dev")]
            assert row["image"] == raw.images[f"{subset}/COCO_{subset}_{row['image_id']:012d}.jpg"]
            for position, question_id in enumerate(row["question_id"]):
                seen.append((question_id, row["image_id"], row["question"][position]))
                annotation = by_id.get(question_id)
                answers = [answer["answer"] for answer in annotation["answers"]] if annotation else []
                assert row["answers"][position] == answers
                assert row["answer_type"][position] == (annotation["answer_type"] if annotation else "")
                targets = annotation.get("target_instances", []) if annotation else []
                assert row["target_instances"][position] == targets
        expected = [(entry["question_id"], entry["image_id"], entry["question"]) for entry in questions]
        assert sorted(seen) == sorted(expected)


def test_soft_scores_are_the_official_accuracy_of_every_vocabulary_answer(example: tuple[Raw, Path, Path]) -> None:
    raw, _, out = example
    vocabulary = read_answers(out)
    scores = {
        question_id: dict(zip(row["answer_ids"][position], row["answer_scores"][position], strict=True))
        for row in load_split(out, "val")
        for position, question_id in enumerate(row["question_id"])
    }
    annotations = raw.json["v2_mscoco_val2014_annotations.json"]
    for index, answer in enumerate(vocabulary):
        results = [{"question_id": question_id, "answer": answer} for question_id in scores]
        for question_id, accuracy in vqa_accuracy(annotations, results)["per_question"].items():
            assert 100 * scores[question_id].get(index, 0) == pytest.approx(accuracy, abs=1e-4)
    assert all(score > 0 for question in scores.values() for score in question.values())


def test_soft_scores_of_any_strings_are_the_official_accuracy() -> None:
    draw = random.Random(1)
    strings = [*ANSWERS, "." * 40, "." * 8, "0", "none", "", "can't", "cant", " red ", "red\n", "ten", "10."]
    scores = SoftScores(list(dict.fromkeys(strings)))
    for _ in range(500):
        answers = draw.choices(draw.choices(strings, k=draw.randint(1, 6)), k=10)
        ids, values = scores(answers)
        expected = {i: a for i, s in enumerate(dict.fromkeys(strings)) if (a := answer_accuracy(s, answers)) > 0}
        assert dict(zip(ids, values, strict=True)) == pytest.approx(expected)


def test_vocabulary_is_in_order_of_first_appearance_train_before_val(tmp_path: Path) -> None:
    raw = Raw(images=3, splits=("train", "val"))
    majors = {"train": ["Zebra", "a cat"], "val": ["cat", "apple", "apple", "zebra"]}
    for split, answers in majors.items():
        for number, entry in enumerate(raw.annotations(split)):
            entry["multiple_choice_answer"] = answers[number] if number < len(answers) else f"{split}{number}"
    out = prepared(raw.zipped(tmp_path / "raw"), tmp_path / "out", "--min-answer-count", 2)
    assert read_answers(out) == ["zebra", "cat", "apple"]
    refused = run_vqav2(tmp_path / "raw", tmp_path / "none", "--min-answer-count", 9)
    assert "--min-answer-count" in error_line(refused)


def test_manifest_counts_and_names_no_place_and_no_time(example: tuple[Raw, Path, Path]) -> None:
    raw, zipped, out = example
    manifest = read_manifest(out)
    assert manifest["kind"] == "vqa"
    train = manifest["splits"]["train"]
    assert (train["images"], train["questions"]) == (12, len(raw.questions("train")))
    assert train["answers"] == 10 * train["questions"]
    assert manifest["splits"]["test"]["answers"] == 0
    assert manifest["vocabulary"] == len(read_answers(out))
    sizes = {entry["name"]: entry["size"] for entry in manifest["raw_files"]}
    assert sizes == {path.name: path.stat().st_size for path in zipped.iterdir()}
    assert str(zipped.parent) not in (out / "manifest.json").read_text()


def test_tokenizer_is_roberta_in_form_and_knows_every_text(example: tuple[Raw, Path, Path]) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(example[2] / "tokenizer" / "tokenizer.json"))
    assert [tokenizer.token_to_id(token) for token in ("<s>", "<pad>", "</s>", "<unk>", "<mask>")] == [0, 1, 2, 3, 4]
    for text in ("What colour is it?", "ما هذا؟ 🦓 là gì\x00", "  spaces\n", "x"):
        encoded = tokenizer.encode(text)
        assert encoded.ids[0] == 0
        assert encoded.ids[-1] == 2
        assert 3 not in encoded.ids
        assert tokenizer.decode(encoded.ids) == text
    assert not (example[2] / "tokenizer" / "vocab.json").exists()


def test_unpacked_files_give_the_same_splits(example: tuple[Raw, Path, Path], tmp_path: Path) -> None:
    raw, _, out = example
    other = prepared(raw.unpacked(tmp_path / "raw"), tmp_path / "out", "--shard-size", 5)
    ours, theirs = content(out), content(other)
    del ours["manifest.json"], theirs["manifest.json"]
    assert ours == theirs
    assert read_manifest(out)["splits"] == read_manifest(other)["splits"]


def test_number_of_workers_changes_nothing(example: tuple[Raw, Path, Path], tmp_path: Path) -> None:
    _, zipped, out = example
    other = prepared(zipped, tmp_path / "out", "--shard-size", 5, "--num-workers", 2)
    assert content(other) == content(out)


def test_killed_run_continues_and_ends_the_same(tmp_path: Path) -> None:
    zipped = Raw(images=400, splits=("train", "val")).zipped(tmp_path / "raw")
    out, partial = tmp_path / "out", tmp_path / "out.vlabs-partial"
    options = ["--raw-dir", zipped, "--min-answer-count", 1, "--vocab-size", 0, "--shard-size", 4, "--num-workers", 2]
    process = subprocess.Popen(
        command("data_prep.vqav2", *options, "--out-dir", out, python=sys.executable),
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
    finished = {path: path.stat().st_mtime_ns for path in partial.glob(".vlabs-work/pipeline/records/*.json")}
    assert 0 < len(finished) < 200
    resumed = run("data_prep.vqav2", *options, "--out-dir", out)
    assert resumed.returncode == 0, resumed.stderr
    assert "continuing in" in resumed.stdout
    assert not partial.exists()
    whole = run("data_prep.vqav2", *options, "--out-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert content(out) == content(tmp_path / "whole")


def test_finished_folder_is_left_alone(example: tuple[Raw, Path, Path]) -> None:
    _, zipped, out = example
    before = content(out)
    again = run_vqav2(zipped, out, "--shard-size", 5)
    assert again.returncode == 0
    assert "is there already" in again.stdout
    assert "other options" in error_line(run_vqav2(zipped, out, "--shard-size", 6))
    assert content(out) == before


def test_folder_of_something_else_is_left_alone(example: tuple[Raw, Path, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds no prepared data" in error_line(run_vqav2(example[1], tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_truncated_image_is_named_and_can_be_mended_or_dropped(tmp_path: Path) -> None:
    raw = Raw(splits=("train",))
    name = "train2014/COCO_train2014_000000001004.jpg"
    good, raw.images[name] = raw.images[name], raw.images[name][:-60]
    folder = raw.unpacked(tmp_path / "raw")
    out = tmp_path / "out"
    assert name in error_line(run_vqav2(folder, out, "--shard-size", 5))
    assert not out.exists()
    listed = tmp_path / "out.vlabs-partial/.vlabs-work/pipeline/bad_items.jsonl"
    bad = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [item["reason"] for item in bad] == ["unreadable image"]

    dropped = read_manifest(prepared(folder, tmp_path / "skipped", "--on-bad", "skip"))
    assert dropped["dropped"] == {"unreadable image": 1}
    assert name in dropped["dropped_items"][0]["item"]
    assert dropped["splits"]["train"]["images"] == 11
    assert 1004 not in load_split(tmp_path / "skipped", "train")["image_id"]

    (folder / name).write_bytes(good)
    mended = run_vqav2(folder, out, "--shard-size", 5)
    assert "continuing in" in mended.stdout
    assert load_split(out, "train")[4]["image"] == good
    assert read_manifest(out)["dropped"] == {}


def test_every_kind_of_bad_item_is_counted(tmp_path: Path) -> None:
    raw = Raw(splits=("train",))
    questions, annotations = raw.questions("train"), raw.annotations("train")
    questions.append({**questions[0], "question": "again?"})
    questions[1]["question"] = " \n"
    without_question = {**annotations[0], "question_id": 5}
    annotations.append(without_question)
    annotations.remove(next(entry for entry in annotations if entry["question_id"] == questions[-2]["question_id"]))
    annotations[5]["answers"] = []
    del raw.images["train2014/COCO_train2014_000000001000.jpg"]
    raw.images["train2014/COCO_train2014_000000001002.jpg"] = b"no image"
    folder = raw.zipped(tmp_path / "raw")
    done = run_vqav2(folder, tmp_path / "out")
    assert "7 bad items" in error_line(done)
    assert done.stderr.count("bad: train: ") == 7
    out = prepared(folder, tmp_path / "out", "--on-bad", "skip")
    manifest = read_manifest(out)
    assert manifest["dropped"] == {
        "annotation without question": 1,
        "duplicate question id": 1,
        "empty question": 1,
        "missing image": 1,
        "question without annotation": 1,
        "question without answers": 1,
        "unreadable image": 1,
    }
    assert manifest["splits"]["train"]["images"] <= 10
    assert all(question.strip() for row in load_split(out, "train") for question in row["question"])


def test_damaged_zip_member_is_a_bad_item(tmp_path: Path) -> None:
    folder = Raw(splits=("train",)).zipped(tmp_path / "raw")
    with zipfile.ZipFile(folder / "train2014.zip") as archive:
        member = archive.infolist()[2]
    damaged = bytearray((folder / "train2014.zip").read_bytes())
    damaged[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 255
    (folder / "train2014.zip").write_bytes(damaged)
    assert member.filename in error_line(run_vqav2(folder, tmp_path / "out"))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    folder = Raw(images=3, splits=("train",)).unpacked(tmp_path / "json")
    annotations = folder / "v2_mscoco_train2014_annotations.json"
    annotations.write_text(annotations.read_text()[:-40])
    assert annotations.name in error_line(run_vqav2(folder, tmp_path / "out", "--on-bad", "skip"))

    for name in ("train2014.zip", "v2_Annotations_Train_mscoco.zip"):
        zipped = Raw(images=3, splits=("train",)).zipped(tmp_path / f"with broken {name}")
        (zipped / name).write_bytes((zipped / name).read_bytes()[:-100])
        assert name in error_line(run_vqav2(zipped, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "v2_Questions_Train_mscoco.zip" in error_line(run_vqav2(tmp_path / "empty", tmp_path / "out"))
    folder = Raw(images=3).zipped(tmp_path / "raw")
    for name in ("test2015.zip", "v2_Annotations_Train_mscoco.zip", "v2_Questions_Val_mscoco.zip"):
        (folder / name).unlink()
    line = error_line(run_vqav2(folder, tmp_path / "out"))
    for name in ("test2015.zip", "v2_Annotations_Train_mscoco.zip", "v2_Questions_Val_mscoco.zip"):
        assert name in line
    assert not list(tmp_path.glob("out*"))


def test_changed_tables_start_anew(tmp_path: Path) -> None:
    raw = Raw(images=3, splits=("train",))
    image = raw.images.pop("train2014/COCO_train2014_000000001001.jpg")
    folder = raw.unpacked(tmp_path / "raw")
    error_line(run_vqav2(folder, tmp_path / "out"))
    raw.questions("train")[0]["question"] = "Something else?"
    (folder / "v2_OpenEnded_mscoco_train2014_questions.json").write_text(
        json.dumps(raw.json["v2_OpenEnded_mscoco_train2014_questions.json"])
    )
    # The image is there now, with the suffix that VQA's abstract scenes have.
    (folder / "train2014" / "COCO_train2014_000000001001.png").write_bytes(image)
    done = run_vqav2(folder, tmp_path / "out")
    assert "starting anew" in done.stdout
    assert "Something else?" in [text for row in load_split(tmp_path / "out", "train") for text in row["question"]]


OWN: list[dict[str, Any]] = [
    {"image": "a.jpg", "question": "Was ist das für ein Tier?", "answers": ["Zebra", "zebra", "Pferd"]},
    {"image": "sub/ü.png", "question": "斑马在哪里？", "answers": "A"},
    {"image": "a.jpg", "question": "Wie viele, | und 'warum'?" + " sehr" * 40_000, "answers": ["Two"]},
    {"image": "c.jpg", "question": "is it\nred?", "answers": ["Yes."]},
]


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


def test_own_table_of_json_lines(own_images: Path) -> None:
    done = run_own(write_jsonl(own_images / "q.jsonl", OWN), own_images / "out", "--val-fraction", 0)
    assert done.returncode == 0, done.stderr
    rows = load_split(own_images / "out", "train")
    assert rows["image_id"] == [1, 2, 3]
    assert rows[0]["question_id"] == [1, 3]
    assert rows[0]["question"] == [OWN[0]["question"], OWN[2]["question"]]
    assert rows[0]["image"] == (own_images / "a.jpg").read_bytes()
    assert rows[0]["answers"] == [["zebra", "zebra", "pferd"], ["2"]]
    assert rows[1]["answers"] == [["a"]]
    assert rows[0]["answer_type"] == ["other", "number"]
    assert rows[2]["answer_type"] == ["yes/no"]
    assert rows[0]["question_type"] == ["was ist", "wie viele,"]
    vocabulary = read_answers(own_images / "out")
    assert vocabulary == ["zebra", "a", "2", "yes"]
    scores = [
        answer_accuracy(vocabulary[ids[0]], a)
        for row in rows
        for ids, a in zip(row["answer_ids"], row["answers"], strict=True)
    ]
    assert scores == [1.0] * 4


def test_own_csv_gives_the_same_as_json_lines(own_images: Path) -> None:
    import csv

    with (own_images / "q.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer", "split"])  # or answers, as there
        for row in OWN:
            answers = row["answers"] if isinstance(row["answers"], list) else [row["answers"]]
            writer.writerow([row["image"], row["question"], "|".join(answers), ""])
    from_csv = run_own(own_images / "q.csv", own_images / "csv")
    from_jsonl = run_own(write_jsonl(own_images / "q.jsonl", OWN), own_images / "jsonl")
    assert from_csv.returncode == from_jsonl.returncode == 0, from_csv.stderr + from_jsonl.stderr
    ours, theirs = content(own_images / "csv"), content(own_images / "jsonl")
    del ours["manifest.json"], theirs["manifest.json"]
    assert ours == theirs
    splits = read_manifest(own_images / "csv")["splits"]
    assert splits["train"]["images"] == 2
    assert splits["val"]["images"] == 1


def test_a_table_without_answers_says_that_nothing_can_be_trained_on_it(own_images: Path) -> None:
    rows = [{name: value for name, value in row.items() if name != "answers"} for row in OWN]
    done = run_own(write_jsonl(own_images / "q.jsonl", rows), own_images / "out")
    assert "0 answers in the vocabulary: no question has answers, so nothing can be trained" in done.stdout
    folders = [f"data.dir={own_images / 'out'}", f"hydra.run.dir={own_images / 'run'}"]
    line = error_line(run("vlabs.train", "data=vqav2", *folders, "data.image_size=32", "logger=csv"))
    assert "out has no answers to train on: prepare it again" in line
    assert not (own_images / "run").exists()


def test_own_splits_and_missing_answers(own_images: Path) -> None:
    rows = [{**row, "split": "train", "question_id": 7 + i} for i, row in enumerate(OWN)]
    rows.append({"image": "c.jpg", "question": "What?", "split": "demo", "question_id": 1})
    rows.append({"image": "a.jpg", "question": "And now?", "split": "train", "question_id": 2})
    table = write_jsonl(own_images / "q.jsonl", rows)
    line = error_line(run_own(table, own_images / "out"))
    assert "question without annotation" in line
    assert "question 2" in line
    done = run_own(table, own_images / "out", "--on-bad", "skip")
    assert done.returncode == 0, done.stderr
    assert load_split(own_images / "out", "demo")[0]["answers"] == [[]]
    assert load_split(own_images / "out", "demo")[0]["image_id"] == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "a.jpg"}', "empty question: 1), the first: train: empty question: "),
        ('{"image": "a.jpg", "question": 3}', "line 2"),
        ('{"image": "a.jpg", "question": "x", "answers": [{}]}', "'answers' must be"),
        ('{"image": "a.jpg", "question": "x", "split": "../../up"}', "cannot be a split's name"),
        ('{"image": "a.jpg", "question": "x", "question_id": [1]}', "'question_id'"),
        ('{"image": null, "question": "x"}', "empty image: 1"),
        ('{"image": "no\\u0000.jpg", "question": "x", "answers": "y"}', "missing image"),
        ('{"image": "absent.jpg", "question": "x", "answers": "y"}', "absent.jpg"),
        ('{"image": "a.jpg", ', "line 2 is not JSON"),
    ],
)
def test_own_names_the_row_that_is_wrong(own_images: Path, row: str, message: str) -> None:
    first = json.dumps({"image": "a.jpg", "question": "What?", "answers": ["x"]})
    (own_images / "q.jsonl").write_text(f"{first}\n{row}\n")
    assert message in error_line(run_own(own_images / "q.jsonl", own_images / "out"))
    assert not (own_images / "out").exists()


@pytest.mark.parametrize("number", [1, 2, 3])
def test_few_answers_of_a_question_are_as_good_as_ten_of_the_same(number: int) -> None:
    scores = SoftScores(["red", "blue"])
    assert scores(["red"] * number) == scores(["red"] * 10) == ([0], [1.0])
    assert answer_accuracy("red", ["red"] * number) == 1.0
    assert answer_accuracy("blue", ["red"] * number) == 0.0


@pytest.mark.parametrize("said", ["test-dev2015", "test2015"])
def test_the_images_of_test_dev_are_those_of_test_whatever_its_file_says(tmp_path: Path, said: str) -> None:
    raw = Raw(images=2, splits=("test",))
    test = raw.json.pop("v2_OpenEnded_mscoco_test2015_questions.json")
    raw.json["v2_OpenEnded_mscoco_test-dev2015_questions.json"] = {**test, "data_subtype": said}
    assert len(load_split(prepared(raw.unpacked(tmp_path / "raw"), tmp_path / "out"), "test-dev")) == 2


def test_ids_of_questions_may_be_texts_and_are_kept_to_the_file_of_results(tmp_path: Path, tiny_run: Any) -> None:
    raw = Raw(images=2, splits=("train", "val"))
    for entries in (*map(raw.questions, ("train", "val")), *map(raw.annotations, ("train", "val"))):
        for entry in entries:
            entry["question_id"] = f"0{entry['question_id']}"
    out = prepared(raw.unpacked(tmp_path / "raw"), tmp_path / "out")
    wanted = sorted(entry["question_id"] for entry in raw.questions("val"))
    assert sorted(one for ids in load_split(out, "val")["question_id"] for one in ids) == wanted
    done = run(
        "vlabs.evaluate", f"ckpt={tiny_run[0]}", f"data.dir={out}", "split=val", "data.num_workers=0",
        f"hydra.run.dir={tmp_path / 'evaluated'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "evaluated").rglob("results.json")
    assert sorted(entry["question_id"] for entry in json.loads(results.read_text())) == wanted


@pytest.mark.parametrize("ids", [["7", "8"], [7, "08"], ["07", "7"]])
def test_ids_of_a_table_are_what_it_says(own_images: Path, ids: list[Any]) -> None:
    rows = [{"image": "a.jpg", "caption": "x", "caption_id": one, "split": "train"} for one in ids]
    table = write_jsonl(own_images / "c.jsonl", rows)
    assert run_own(table, own_images / "out").returncode == 0
    assert sorted(load_split(own_images / "out", "train")[0]["caption_id"]) == sorted(map(str, ids))


def test_a_number_and_a_text_that_are_written_alike_are_one_id(own_images: Path) -> None:
    rows = [{"image": "a.jpg", "question": "x", "question_id": one, "split": "train"} for one in (7, "7", "x")]
    table = write_jsonl(own_images / "q.jsonl", rows)
    assert "duplicate question id: 1" in error_line(run_own(table, own_images / "out"))
    assert run_own(table, own_images / "out", "--on-bad", "skip").returncode == 0
    assert load_split(own_images / "out", "train")[0]["question_id"] == ["7", "x"]


def test_what_was_to_be_done_about_bad_items_does_not_matter_where_there_are_none(own_images: Path) -> None:
    table = write_jsonl(own_images / "q.jsonl", OWN)
    assert run_own(table, own_images / "out").returncode == 0
    again = run_own(table, own_images / "out", "--on-bad", "skip")
    assert "is there already" in again.stdout


def test_prepare_lists_every_dataset_with_what_to_download(capsys: pytest.CaptureFixture[str]) -> None:
    from data_prep.__main__ import commands

    known = commands()
    assert {"vqav2", "gqa", "own", "classes", "segmentation", "scenes"} <= known.keys()
    rooms = [*Path("data_prep/readers").glob("*.py"), *Path("data_prep/scenes").glob("*.py")]
    runnable = {path.stem for path in rooms if "run_cli(main)" in path.read_text() and path.stem != "__main__"}
    assert runnable - {"question_only"} <= known.keys()
