"""Datasets of `datasets` as prepared folders: whatever their columns are called, streamed, and resumed."""

import io
import json

import datasets
import pytest
from conftest import assert_one_line_error, command
from PIL import Image

from data_prep.readers.own import Source, write_table
from vlabs.data.prepared import load_split, read_manifest
from vlabs.errors import UserError

COLORS = ["red", "blue", "green", "white", "black", "yellow"]


def png(color):
    file = io.BytesIO()
    Image.new("RGB", (24, 16), color).save(file, "PNG")
    return file.getvalue()


def vqa_rows(colors):
    """As VQA v2 lies on the hub: a row a question, its image with each, answers as a list of dictionaries."""
    rows = [
        {
            "picture": {"bytes": png(color), "path": None},
            "asked": asked,
            "people": [{"answer": answer, "answer_id": n} for n, answer in enumerate([color, color, "dark"])],
        }
        for color in colors
        for asked in ("What color is it?", f"Is it {color}?")
    ]
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "asked": datasets.Value("string"),
            "people": datasets.List({"answer": datasets.Value("string"), "answer_id": datasets.Value("int64")}),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture(scope="module")
def vqa_folder(tmp_path_factory):
    """Parquet files, as downloaded from the hub."""
    folder = tmp_path_factory.mktemp("hub") / "colors"
    (folder / "data").mkdir(parents=True)
    vqa_rows(COLORS[:4]).to_parquet(folder / "data/train-00000-of-00001.parquet")
    vqa_rows(COLORS[4:]).to_parquet(folder / "data/validation-00000-of-00001.parquet")
    return folder


MAPPED = ["--columns", "image=picture", "question=asked", "answers=people.answer"]


def test_questions_with_columns_of_other_names_are_prepared_and_trained_on(vqa_folder, tmp_path):
    made = ["--dataset", vqa_folder, *MAPPED, "--out-dir", "out", "--vocab-size", 300, "--num-workers", 1]
    result = command("data_prep.own", *made, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["out"]
    train, val = load_split(tmp_path / "out", "train"), load_split(tmp_path / "out", "val")
    # An image of several questions is one row.
    assert [len(train), len(val)] == [4, 2]
    asked = {
        question: answers for row in train for question, answers in zip(row["question"], row["answers"], strict=True)
    }
    assert len(asked) == 5
    assert asked["Is it red?"] == ["red", "red", "dark"]
    assert {row["image"] for row in train} == {png(color) for color in COLORS[:4]}
    manifest = read_manifest(tmp_path / "out")
    assert manifest["name"] == "colors"
    assert manifest["options"]["source"]["columns"]["answers"] == "people.answer"
    again = command("data_prep.own", *made, cwd=tmp_path)
    assert again.returncode == 0
    assert "there already" in again.stdout
    other = command("data_prep.own", *made[:2], "--columns", "image=picture", "caption=asked", *made[6:], cwd=tmp_path)
    assert_one_line_error(other, "holds something else")


def test_a_list_of_captions_in_a_row_is_as_many_captions_and_one_split_is_divided(tmp_path):
    rows = [{"image": {"bytes": png(c), "path": None}, "caption": [f"A {c} square.", f"All {c}"]} for c in COLORS]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "captions")
    result = command("data_prep.own", "--dataset", "captions", "--out-dir", "out", "--vocab-size", 300,
                     "--val-fraction", 0.3, "--num-workers", 1, cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    train, val = load_split(tmp_path / "out", "train"), load_split(tmp_path / "out", "val")
    assert [len(train), len(val)] == [4, 2]
    captions = sorted(caption for rows in (train, val) for row in rows for caption in row["caption"])
    assert captions == sorted(text for color in COLORS for text in (f"A {color} square.", f"All {color}"))


def test_a_stream_that_was_cut_off_continues_after_the_last_whole_row(vqa_folder, tmp_path, monkeypatch):
    from data_prep.engine import hub

    source = Source(str(vqa_folder), {"image": "picture", "question": "asked", "answers": "people.answer"})
    whole = write_table(source, tmp_path / "whole").read_bytes()

    begun = []

    def stopped(stream, initial, **options):
        begun.append(initial)
        for number, row in enumerate(stream):
            if len(begun) == 1 and number == 5:
                raise OSError("connection lost")
            yield row

    monkeypatch.setattr(hub, "tqdm", stopped)
    with pytest.raises(UserError, match="connection lost.*continues from there"):
        write_table(source, tmp_path / "parts")
    with (tmp_path / "parts/rows.jsonl").open("ab") as file:
        file.write(b'{"row": ["tra')  # half a line, as of a machine that went down
    assert write_table(source, tmp_path / "parts").read_bytes() == whole
    assert begun[:2] == [0, 5]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ([], ["which columns hold", "picture, asked, people"]),
        (["--columns", "image=photo"], ["no column photo", "picture, asked, people"]),
        (["--columns", "imag=picture"], ["--columns imag=picture", "choose of image, question"]),
        (["--columns", "image"], ["--columns image", "NAME=VALUE"]),
        ([*MAPPED, "--splits", "train=training"], ["no split training", "train, validation"]),
        ([*MAPPED, "--config", "v2"], ["holds no dataset that can be read", "v2"]),
    ],
    ids=lambda value: " ".join(map(str, value))[:40],
)
def test_what_does_not_fit_is_one_line(options, parts, vqa_folder, tmp_path, monkeypatch, capsys):
    import sys

    from data_prep.readers import own
    from vlabs.errors import run_cli

    monkeypatch.chdir(tmp_path)
    arguments = ["own", "--dataset", str(vqa_folder), "--out-dir", "out", *options]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as left:
        run_cli(own.main)
    assert left.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    for part in parts:
        assert part in errors[0]
    assert not (tmp_path / "out").exists()


def test_a_dataset_that_is_not_there_says_what_to_download(tmp_path):
    result = command("data_prep.own", "--dataset", "nobody/nothing", "--out-dir", "out", cwd=tmp_path)
    assert_one_line_error(result, "nobody/nothing cannot be had", "hf download nobody/nothing --repo-type dataset")


def test_options_of_a_dataset_are_not_of_a_table(tmp_path):
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "a.png", "caption": "b"}) + "\n")
    result = command("data_prep.own", "--table", "t.jsonl", "--columns", "a=b", "--out-dir", "out", cwd=tmp_path)
    assert_one_line_error(result, "--columns", "--table")
