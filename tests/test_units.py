"""Prepared folders of images from files as people have them: what is bad is named, counted and left out alone."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.engine.folder import NOT_DROPPED
from data_prep.engine.pipeline import Options, prepare
from data_prep.readers.classes import dataset_units, folder_units, prepare_classes, table_units
from data_prep.readers.own import Table
from data_prep.readers.segmentation import prepare_masks
from vlabs.data.prepared import load_split, read_classes, read_manifest
from vlabs.errors import UserError


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10), color).save(file, "PNG")
    return file.getvalue()


def put(path: Path, content: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if content is None else content)
    return path


def dropped(folder: Path) -> dict[str, int]:
    found: dict[str, int] = read_manifest(folder)["dropped"]
    return found


def test_an_empty_file_is_no_image_of_a_class_folder_or_tar(tmp_path: Path) -> None:
    put(tmp_path / "raw/train/cat/1.png")
    put(tmp_path / "raw/train/cat/2.png", b"")
    (tmp_path / "raw/val").mkdir()
    with tarfile.open(tmp_path / "raw/val.tar", "w") as archive:
        for name, content in (("dog/1.png", png()), ("dog/2.png", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    units, files = folder_units(tmp_path / "raw")
    with pytest.raises(UserError, match="2 bad items.*the first: train: empty image: .*2.png"):
        prepare_classes(units, files, tmp_path / "out", "raw")
    prepare_classes(units, files, tmp_path / "out", "raw", on_bad="skip")
    assert dropped(tmp_path / "out") == {"empty image": 2}
    assert [len(load_split(tmp_path / "out", split)) for split in ("train", "val")] == [1, 1]


def test_minus_one_is_no_class_in_a_table_either(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    table = put(tmp_path / "mine.csv", b"image, class\na.png, -1\na.png, 0\na.png, 10\na.png, 2\n")
    prepare_classes(*table_units(table), tmp_path / "out", "mine", on_bad="skip")
    assert dropped(tmp_path / "out") == {"no class": 1}
    assert read_classes(tmp_path / "out") == ["0", "2", "10"]


def test_a_path_in_a_dataset_that_leads_nowhere_is_a_bad_row_and_one_that_leads_out_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "set/pics/1.png")
    put(tmp_path / "out.png")

    def rows(*names: str | None) -> str:
        lines = (json.dumps({"image": name, "label": "a"}) + "\n" for name in names)
        put(tmp_path / "set/data/train.jsonl", "".join(lines).encode())
        return str(tmp_path / "set")

    units, files, names = dataset_units(rows("pics/1.png", "pics/2.png", None), "image", "label")
    prepare_classes(units, files, tmp_path / "out", "set", names, "skip")
    assert dropped(tmp_path / "out") == {"empty image": 1, "missing image": 1}
    (tmp_path / "set/pics/link.png").symlink_to(tmp_path / "out.png")
    for name in ("../out.png", "/etc/hostname", "pics/link.png"):
        units, files, names = dataset_units(rows(name), "image", "label")
        with pytest.raises(UserError, match=f"names the image {name}, which is not in the folder"):
            prepare_classes(units, files, tmp_path / "none", "set", names, "skip")


def test_an_image_is_one_by_whatever_path_a_table_names_it(tmp_path: Path) -> None:
    for name in "abc":
        put(tmp_path / f"in/{name}.png", png({"a": "red", "b": "blue", "c": "green"}[name]))
    paths = [form.format(one) for one in "abc" for form in ("{}.png", "./{}.png", "../in/{}.png", "..\\in\\{}.png")]
    paths += [str(tmp_path / f"in/{one}.png") for one in "abc"]
    lines = "".join(json.dumps({"image": path, "caption": "it"}) + "\n" for path in paths)
    table = put(tmp_path / "in/mine.jsonl", lines.encode())
    prepare(Table(table, table.parent, 0.3), tmp_path / "out", Options(vocab_size=0))
    counts = read_manifest(tmp_path / "out")["splits"]
    assert {split: (one["images"], one["captions"]) for split, one in counts.items()} == {
        "train": (2, 10),
        "val": (1, 5),
    }


def test_a_degenerate_shape_takes_neither_its_object_nor_its_image_along(tmp_path: Path) -> None:
    good = [2, 2, 10, 2, 10, 8, 2, 8]
    of_split: dict[str, list[Any]] = {
        # No area in the file, a polygon in a line beside a good one; two corners; no shape; outside.
        "train": [[[1, 1, 3, 3, 5, 5], good], [[5, 5, 6, 6]], None, [[100, 100, 120, 100, 120, 120]]],
        "val": [[good]],  # with the ids of train
    }
    with zipfile.ZipFile(put(tmp_path / "raw/annotations.zip", b""), "w") as archive:
        archive.writestr("__MACOSX/annotations/._instances_train.json", b"\0")
        archive.writestr("annotations/captions_train.json", b"{}")
        for split, shapes in of_split.items():
            found = [
                {"id": n, "image_id": 1, "category_id": 7, "segmentation": shape} for n, shape in enumerate(shapes, 1)
            ]
            content = {
                "images": [{"id": 1, "file_name": "1.png", "height": 10, "width": 20}],
                "annotations": found, "categories": [{"id": 7, "name": "thing"}],
            }  # fmt: skip
            archive.writestr(f"annotations/instances_{split}.json", json.dumps(content))
    for split in of_split:
        with zipfile.ZipFile(tmp_path / f"raw/{split}.zip", "w") as archive:
            archive.writestr(f"{split}/1.png", png())
    prepare_masks("instances", tmp_path / "raw", tmp_path / "out")
    assert dropped(tmp_path / "out") == {NOT_DROPPED: 4}
    for split in of_split:
        mask = np.asarray(Image.open(io.BytesIO(load_split(tmp_path / "out", split)[0]["mask"])))
        assert mask.sum() == mask[2:8, 2:10].sum() == 48
