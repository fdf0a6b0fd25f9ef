"""Damaged and hostile files: readers answer with one sentence or a right result, never a crash and never a hang."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlabs.checkpoints.checkpoint import load_checkpoint, read_tensors
from vlabs.data.instances import count_instances
from vlabs.data.prepared import load_split, read_answers, read_manifest
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError
from vlabs.metrics.vqa import vqa_accuracy
from vlabs.utils.json_file import JsonFile

OFFSETS = 200
FEW = settings(max_examples=50, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def answer(read, *arguments):
    """What a reader returns, and the sentence with which it refuses; any other exception fails the test."""
    try:
        return read(*arguments), ""
    except UserError as error:
        return None, str(error)


def cuts(data):
    """The beginnings of a file, up to 200 of them, all shorter than the file."""
    return [data[:n] for n in sorted({int(n) for n in np.linspace(0, len(data) - 1, OFFSETS)})]


@pytest.fixture(scope="module")
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    return {kind: encode(pixels, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP")}


def encode(pixels, kind):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_a_truncated_image_is_refused_or_whole(kind, picture):
    whole = np.asarray(decode_image(picture[kind], "whole"))
    refused = 0
    for part in cuts(picture[kind]):
        decoded, message = answer(decode_image, part, "picture 7")
        # The last bytes of a file may say nothing that a decoder needs.
        assert "picture 7" in message or np.array_equal(np.asarray(decoded), whole)
        refused += bool(message)
    assert refused > 0.8 * len(cuts(picture[kind]))


@FEW
@given(data=st.binary(max_size=200))
def test_bytes_that_are_no_image_are_refused(data):
    with pytest.raises(UserError, match="picture 7"):
        decode_image(data, "picture 7")


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded():
    header = b"\x00\x00\x00\rIHDR" + (60000).to_bytes(4, "big") + (60000).to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    import zlib

    bomb = b"\x89PNG\r\n\x1a\n" + header + zlib.crc32(header[4:]).to_bytes(4, "big")
    with pytest.raises(UserError, match="picture 7"):
        decode_image(bomb, "picture 7")


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_truncated_checkpoint_is_refused(kind, tiny_run, tmp_path):
    small = {"state_dict": {"weight": torch.randn(50)}, "vlabs": {"format": 1}}
    path = tmp_path / f"small.{kind}"
    if kind == "ckpt":
        torch.save(small, path)
    else:
        safetensors.torch.save_file(small["state_dict"], path)
    data = path.read_bytes()
    read_tensors(path)
    for part in cuts(data):
        path.write_bytes(part)
        with pytest.raises(UserError, match=str(path)):
            read_tensors(path)


@pytest.fixture(scope="module")
def header(tiny_run):
    """A whole checkpoint, as plain data."""
    return torch.load(tiny_run[0] / "checkpoints/best.ckpt", weights_only=True)


@FEW
@given(value=JSON, place=st.integers(0, 10_000))
def test_a_header_that_was_tampered_with_is_refused(value, place, header, tmp_path):
    """One value somewhere in the architecture or the preprocessing is replaced by another."""
    content = json.loads(json.dumps(header["vlabs"]))
    spots = [spot for spot in places(content) if spot[-1] not in ("data", "task")]
    path = spots[place % len(spots)]
    owner = content
    for key in path[:-1]:
        owner = owner[key]
    before = owner[path[-1]]
    owner[path[-1]] = value
    file = tmp_path / "tampered.ckpt"
    torch.save({"state_dict": header["state_dict"], "vlabs": content}, file)
    _, message = answer(load_checkpoint, file)
    assert str(file) in message or path[0] != "format" or value == before


def places(value, path=()):
    """Where every value in nested dictionaries and lists is."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def test_an_architecture_that_asks_for_more_memory_than_it_has_weights_for_gets_none(header, tmp_path):
    text = json.dumps(header["vlabs"])
    content = json.loads(text)
    content["architecture"]["text"]["vocab_size"] = 10**12
    file = tmp_path / "huge.ckpt"
    torch.save({"state_dict": header["state_dict"], "vlabs": content}, file)
    with pytest.raises(UserError, match="does not fit the architecture"):
        load_checkpoint(file)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "v2_Questions.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("questions.json", json.dumps({"questions": [{"question_id": n} for n in range(40)]}))
        file.writestr("instances.json", json.dumps({"annotations": [{"id": n} for n in range(40)]}))
    return path


def test_a_truncated_archive_is_refused(archive, tmp_path):
    assert len(list(JsonFile(archive, "questions.json").entries("questions"))) == 40
    path = tmp_path / "cut.zip"
    for part in cuts(archive.read_bytes()):
        path.write_bytes(part)
        with pytest.raises(UserError, match=str(path)):
            list(JsonFile(path, "questions.json").entries("questions"))
        with pytest.raises(UserError, match=str(path)):
            count_instances(path)


def test_a_truncated_json_file_is_refused(tmp_path):
    data = json.dumps({"questions": [{"question_id": n} for n in range(40)]}).encode()
    path = tmp_path / "cut.json"
    for part in cuts(data):
        path.write_bytes(part)
        with pytest.raises(UserError, match=str(path)):
            list(JsonFile(path).entries("questions"))


@FEW
@given(content=JSON)
def test_any_json_in_the_place_of_a_datasets_files_is_refused_or_read(content, tmp_path):
    for name in ("manifest.json", "answers.json"):
        (tmp_path / name).write_text(json.dumps(content))
    for read in (read_manifest, read_answers, lambda folder: load_split(folder, "train")):
        _, message = answer(read, tmp_path)
        assert not message or str(tmp_path) in message


@FEW
@given(annotations=JSON, results=JSON)
def test_any_json_in_the_place_of_annotations_and_results_is_refused_or_read(annotations, results):
    _, message = answer(vqa_accuracy, annotations, results)
    assert "\n" not in message


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/outside.jpg", "a/../../outside.jpg"])
def test_a_path_in_an_archive_cannot_leave_its_folder(name, tmp_path):
    """Nothing is unpacked: a member is read where it lies, and its name is only what a question asks for."""
    from data_prep.engine.places import ImageStore

    outside = tmp_path / "outside.jpg"
    outside.write_bytes(b"secret")
    folder = tmp_path / "images"
    folder.mkdir()
    with zipfile.ZipFile(folder / "train2014.zip", "w") as file:
        file.writestr(name, "not a picture")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    list(ImageStore((folder / "train2014.zip",)).locate([(1, name), (2, "outside.jpg")]))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert Path(tmp_path / "outside.jpg").read_bytes() == b"secret"
