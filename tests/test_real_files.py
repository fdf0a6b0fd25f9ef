"""Files as people have them: phones' photographs, Macs' archives, tables of any program, and damage at every byte."""

import contextlib
import csv
import io
import json
import os
import struct
import tarfile
import tracemalloc
import unicodedata
import zipfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import assert_one_line_error, command
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from data_prep.engine.places import ImageStore, NamedImages, is_picture, read_file
from data_prep.engine.regions import describe_files, draw_regions
from data_prep.engine.tables import as_text, is_empty, read_rows, split_name
from data_prep.engine.tars import members, open_tar
from data_prep.readers.refcoco import read_plain_pickle
from vlabs.data.decoding import as_shown, decode, read_gray, read_labels, size_of
from vlabs.data.images import path_of
from vlabs.data.masks import MaskDataModule
from vlabs.data.prepared import IGNORED, load_split, read_classes, read_manifest
from vlabs.errors import UserError
from vlabs.prediction.predictor import open_image
from vlabs.prediction.search import list_pictures
from vlabs.utils import json_file
from vlabs.utils.archives import entries, is_clutter, open_zip, read_member, same_name, walk
from vlabs.utils.json_file import JsonFile

OWN = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(color="red", size=(12, 8), form="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, form, **options)
    return file.getvalue()


def saved(image: Image.Image, form="PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


# --- one decoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_upright_and_its_size_too(orientation):
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(Image.fromarray(pixels), "JPEG", exif=exif, quality=100, subsampling=0)
    shown = decode(content)
    turns = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1),
             7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90}  # fmt: skip
    expected = turns[orientation](pixels)
    assert np.abs(np.asarray(shown).astype(int) - expected).mean() < 2
    assert size_of(content) == shown.size == expected.shape[1::-1]
    assert (
        decode(content, at_least=4).size[0] * expected.shape[0]
        == decode(content, at_least=4).size[1] * expected.shape[1]
    )


def test_sixteen_bits_and_floats_are_scaled_to_what_a_viewer_shows():
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    wide = ramp.astype(np.uint16) * 257
    for content in (
        saved(Image.fromarray(wide)),
        saved(Image.fromarray(wide), "TIFF"),
        saved(Image.fromarray(ramp.astype(np.float32) / 255), "TIFF"),
        saved(Image.fromarray(wide.astype(np.float32)), "TIFF"),
    ):
        assert (np.asarray(decode(content))[..., 0] == ramp).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1-tRNS"])
def test_what_is_transparent_is_white(mode):
    disc = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    disc.putpixel((1, 1), (0, 0, 0, 255))
    if mode == "1-tRNS":
        content = saved(Image.fromarray(np.array([[9, 0], [9, 9]], dtype=np.uint8)), transparency=9)
        assert np.asarray(decode(content))[..., 0].tolist() == [[255, 0], [255, 255]]
        return
    shown = np.asarray(decode(saved(disc if mode == "RGBA" else disc.convert(mode))))
    assert (shown[1, 1] == 0).all()
    assert (shown[3, 3] == 255).all()


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"qoif" + b"\0\0\0\x04" * 2 + b"\4\0\xff",
     b"II*\0\x08\0\0\0\xff\xff" + b"x" * 90, picture(size=(90, 90))[:-40], picture(form="JPEG")[:-9]],
    ids=["empty", "html", "png", "qoi", "tiff", "cut png", "cut jpeg"],
)  # fmt: skip
def test_what_is_no_image_is_one_line_without_an_address(content):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        decode(content)
    said = str(raised.value)
    assert said
    assert "\n" not in said
    assert "0x" not in said


def test_a_large_text_beside_an_image_does_not_matter():
    about = PngImagePlugin.PngInfo()
    about.add_text("prompt", "x" * 3_000_000)
    assert decode(picture(pnginfo=about)).size == (12, 8)


def test_labels_keep_their_values_and_masks_their_own_pixels():
    wide = np.array([[0, 257], [300, 65535]], dtype=np.uint16)
    assert (read_labels(saved(Image.fromarray(wide))) == wide).all()
    palette = Image.fromarray(np.array([[0, 3], [7, 255]], dtype=np.uint8), "P")
    palette.putpalette([n % 256 for n in range(768)])
    assert read_labels(saved(palette)).tolist() == [[0, 3], [7, 255]]
    gray = Image.fromarray(np.array([[0, 3], [7, 9]], dtype=np.uint8))
    assert read_labels(saved(gray.convert("RGB"))).tolist() == [[0, 3], [7, 9]]
    with pytest.raises(ValueError, match="colors, not labels"):
        read_labels(picture("red"))
    half = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    half.putpixel((1, 0), (0, 0, 0, 255))
    assert read_gray(saved(half)).tolist() == [[1, 0]]
    drawn = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    drawn.putpixel((0, 0), (255, 0, 0, 255))
    assert read_gray(saved(drawn)).tolist() == [[1, 0]]


def test_boxes_are_of_the_upright_image(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "phone.JPG").write_bytes(picture(size=(12, 8), form="JPEG", exif=exif))
    (tmp_path / "t.jsonl").write_text(json.dumps(
        {"image": "phone.JPG", "caption": "below", "boxes": [0, 9, 8, 3], "split": "train"}
    ))  # fmt: skip
    made = command("data_prep.own", "--table", "t.jsonl", "--out-dir", "out", "--vocab-size", 0, cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    region = read_gray(load_split(tmp_path / "out", "train")[0]["region"][0])
    assert region.shape == (12, 8)
    assert (region.nonzero()[0].min(), region.sum()) == (9, 24)


@pytest.mark.parametrize("count", [254, 255, 300])
def test_masks_of_many_classes_keep_them_all(count, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    squares = [
        {"id": n, "image_id": 1, "category_id": n, "area": 1, "iscrowd": int(n == 2),
         "segmentation": [[n % 20, n // 20, n % 20 + 1, n // 20, n % 20 + 1, n // 20 + 1, n % 20, n // 20 + 1]]}
        for n in range(1, count)
    ]  # fmt: skip
    content = {"images": [{"id": 1, "file_name": "a.png", "width": 20, "height": 20}], "annotations": squares,
               "categories": [{"id": n, "name": f"c{n}"} for n in range(1, count)]}  # fmt: skip
    with zipfile.ZipFile(raw / "annotations.zip", "w") as archive:
        archive.writestr("annotations/instances_train.json", json.dumps(content))
        archive.writestr("__MACOSX/annotations/._instances_train.json", b"\0\5\x16")
        archive.writestr("annotations/captions_train.json", "{}")
    with zipfile.ZipFile(raw / "train.zip", "w") as archive:
        archive.writestr("train/a.png", picture(size=(20, 20)))
    done = command(
        "data_prep.segmentation", "--layout", "instances", "--raw-dir", "raw", "--out-dir", "out", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len(read_classes(tmp_path / "out")) == count
    data = MaskDataModule(tmp_path / "out", image_size=32, batch_size=1, num_workers=0)
    mask = data.dataset(data.rows("train"), False).whole(0).mask
    assert mask[(count - 1) // 20, (count - 1) % 20] == count - 1
    assert mask[0, 2] == IGNORED


# --- one walk and one list of names -----------------------------------------------------------------------------------

NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12
)


@given(NAMES)
@OWN
def test_one_spelling_of_a_name_is_its_own_and_that_of_all_others(name):
    one = same_name(name)
    assert same_name(one) == one
    assert same_name("./" + name.replace("/", "//")) == same_name(name.lstrip("/")) or name.startswith(("/", "\\"))
    assert same_name(unicodedata.normalize("NFD", name)) == one


def test_a_walk_follows_links_once_and_leaves_clutter_out(tmp_path):
    for name in ("a/1.png", "a/._1.png", ".DS_Store", "__MACOSX/a/1.png", "a/Thumbs.db", "b/.hidden/2.png", "3.JPeG"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/4.png").write_bytes(b"x")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/a/loop").symlink_to(tmp_path / "set")
    (tmp_path / "set/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "set/pipe.png")
    found = [path.relative_to(tmp_path / "set").as_posix() for path in walk(tmp_path / "set")]
    assert sorted(found) == ["3.JPeG", "a/1.png", "linked/4.png"]
    assert all(map(is_picture, found))


@pytest.mark.parametrize(
    "wanted", ["photos/caf\u00e9.png", "photos/cafe\u0301.png", "photos\\caf\u00e9.png", "./photos//caf\u00e9.png"]
)
@pytest.mark.parametrize(
    "stored",
    ["photos/caf\u00e9.png", "photos/cafe\u0301.png", "photos\\caf\u00e9.png", "Archive/photos/cafe\u0301.png"],
)
@pytest.mark.parametrize("place", ["folder", "zip", "tar"])
def test_an_image_is_found_in_whatever_spelling(wanted, stored, place, tmp_path):
    content = picture()
    if place == "folder":
        location = tmp_path / "images"
        (location / stored).parent.mkdir(parents=True)
        (location / stored).write_bytes(content)
    elif place == "zip":
        location = tmp_path / "a.zip"
        with zipfile.ZipFile(location, "w") as archive:
            archive.writestr(stored, content)
    else:
        location = tmp_path / "a.tar"
        with tarfile.open(location, "w") as archive:
            member = tarfile.TarInfo(stored)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    ((_, found),) = ImageStore((location,)).locate([(1, wanted)])
    assert not isinstance(found, str), found
    assert read_file(found) == content
    ((_, like),) = ImageStore((location,)).locate([(1, "photos/cafe.png")])
    assert "caf" in like  # a name that is there


def test_names_that_are_no_utf8_are_read_in_folders_and_tar_files(tmp_path):
    (tmp_path / "train").mkdir()
    folder = os.fsencode(tmp_path / "train") + b"/caf\xe9"
    os.mkdir(folder)
    with open(folder + b"/\xfc.png", "wb") as file:
        file.write(picture())
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        member = tarfile.TarInfo(os.fsdecode(b"caf\xe9/\xfc.png"))
        member.size = len(picture())
        archive.addfile(member, io.BytesIO(picture()))
    done = command("data_prep.classes", "--raw-dir", ".", "--out-dir", "../made", cwd=tmp_path / "train" / "..")
    assert done.returncode == 0, done.stderr
    out = tmp_path.parent / "made"
    for split in ("train", "val"):
        (row,) = load_split(out, split)
        with open(path_of(row["path"]), "rb") as file:
            file.seek(row["offset"])
            assert file.read(row["size"]) == picture()


def test_an_image_that_is_named_twice_is_one_image(tmp_path):
    for n in range(4):
        (tmp_path / f"{n}.png").write_bytes(picture(size=(8 + n, 8)))
    rows = [{"image": f"{start}{n}.png", "caption": f"text {start}"} for n in range(4) for start in ("", "./", "x/../")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = command(
        "data_prep.own",
        "--table",
        "t.jsonl",
        "--out-dir",
        "out",
        "--vocab-size",
        0,
        "--val-fraction",
        0.5,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    splits = [load_split(tmp_path / "out", split) for split in ("train", "val")]
    assert [len(rows) for rows in splits] == [2, 2]
    assert all(len(row["caption"]) == 3 for rows in splits for row in rows)


# --- archives ---------------------------------------------------------------------------------------------------------


def tar_of(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in (("a/1.png", picture()), ("a/1.txt", b"one"), ("b/2.png", picture("blue"))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("b/hard.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a/1.png"
        archive.addfile(link)
        soft = tarfile.TarInfo("b/soft.png")
        soft.type, soft.linkname = tarfile.SYMTYPE, "../a/1.png"
        archive.addfile(soft)
    return path


def listed(path: Path) -> list[tuple[str, bytes]]:
    with open_tar(path) as archive, path.open("rb") as file:
        found = []
        for member in members(archive, path):
            file.seek(member.offset_data)
            found.append((member.name, file.read(member.size)))
        return found


def test_links_in_a_tar_file_are_what_they_point_to(tmp_path):
    found = dict(listed(tar_of(tmp_path / "a.tar")))
    assert found["b/hard.png"] == found["b/soft.png"] == found["a/1.png"] == picture()


def test_a_tar_file_that_is_cut_off_anywhere_is_refused(tmp_path):
    whole = tar_of(tmp_path / "a.tar").read_bytes()
    ends = whole.rstrip(b"\0")
    for cut in {*range(0, len(ends), 37), *range(512 - 3, 512 + 3), 1024, 1536, 2048}:
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"cut\.tar"):
            listed(path)


@given(st.data())
@OWN
def test_a_damaged_byte_of_a_tar_file_is_noticed_or_changes_that_member_alone(tmp_path, data):
    path = tmp_path / "d.tar"
    whole = tar_of(path).read_bytes()
    right = listed(path)
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    try:
        found = listed(path)
    except UserError:
        return
    # A tar file has checksums of its headers alone: what differs then is the content of one member and of its links.
    assert [name for name, _ in found] == [name for name, _ in right]


@given(st.data())
@OWN
def test_a_damaged_byte_of_a_zip_file_is_noticed(tmp_path, data):
    path = tmp_path / "d.zip"
    with zipfile.ZipFile(path, "w", data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))) as archive:
        for name in ("a/1.png", "a/2.png"):
            archive.writestr(zipfile.ZipInfo(name), picture(name == "a/1.png" and "red" or "blue"), archive.compression)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    try:
        located = list(NamedImages((path,)).locate([(1, "1.png"), (2, "2.png")]))
    except UserError:
        return
    for image_id, image in located:
        if not isinstance(image, str):
            with contextlib.suppress(ValueError, OSError):  # noticed, and named by who asked
                assert read_file(image) == picture("red" if image_id == 1 else "blue")
    assert len(located) == 2


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_images_in_zip_files_of_other_compression_are_read(method, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as archive:
        archive.writestr("x/1.png", picture())
    ((_, image),) = NamedImages((tmp_path / "a.zip",)).locate([(1, "1.png")])
    assert read_file(image) == picture()


@pytest.mark.parametrize("kind", ["bomb", "encrypted", "method"])
def test_odd_members_of_zip_files_are_one_line_that_names_them(kind, tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.json", b"0" * 50_000_000 if kind == "bomb" else b"{}")
    content = bytearray(path.read_bytes())
    central = content.rindex(b"PK\x01\x02")
    if kind == "bomb":  # says that it has 100 bytes
        struct.pack_into("<I", content, 22, 100)
        struct.pack_into("<I", content, central + 24, 100)
    elif kind == "encrypted":
        content[6] |= 1
        content[central + 8] |= 1
    else:
        struct.pack_into("<H", content, 8, 99)
        struct.pack_into("<H", content, central + 10, 99)
    path.write_bytes(content)
    with open_zip(path) as archive, pytest.raises(UserError, match=r"a\.zip \(1\.json\)"):
        read_member(path, archive, "1.json")
    ((_, image),) = NamedImages((path,)).locate([(1, "1.json")])
    with pytest.raises((ValueError, OSError)):
        read_file(image)


def test_a_macs_zip_file_has_names_in_utf8_and_shadows_that_are_nothing(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(unicodedata.normalize("NFD", "Fotos/\u00fc.png"), picture())
        archive.writestr("__MACOSX/Fotos/._\u00fc.png", b"x")
        archive.writestr("Fotos/.DS_Store", b"x")
    content = (tmp_path / "a.zip").read_bytes()
    flagged = content.replace(struct.pack("<H", 0x800), b"\0\0")  # which a Mac does not set
    (tmp_path / "b.zip").write_bytes(flagged)
    for name in ("a.zip", "b.zip"):
        with open_zip(tmp_path / name) as archive:
            assert [one for one, _ in entries(archive)] == ["Fotos/\u00fc.png"]


def test_a_link_in_a_tar_file_is_followed_as_far_as_it_goes_and_what_is_not_there_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw/train.tar", "w") as archive:
        for name, kind, link in (
            ("a/1.png", tarfile.REGTYPE, ""), ("b/2.png", tarfile.SYMTYPE, "../a/1.png"),
            ("c/3.png", tarfile.SYMTYPE, "../b/2.png"), ("d/4.png", tarfile.LNKTYPE, "b/2.png"),
            ("e", tarfile.SYMTYPE, "a"), ("f/5.png", tarfile.SYMTYPE, "../e/1.png"),
            ("g/6.png", tarfile.SYMTYPE, "/gone.png"), ("h/7.png", tarfile.FIFOTYPE, ""),
            ("i/8.png", tarfile.SYMTYPE, "8.png"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, 0 if link or "h" in name else len(picture())
            archive.addfile(member, io.BytesIO(picture()))
    found = dict(listed(tmp_path / "raw/train.tar"))
    there = ["a/1.png", "b/2.png", "c/3.png", "d/4.png", "e/1.png", "f/5.png"]
    assert found == dict.fromkeys(there, picture()) | dict.fromkeys(["g/6.png", "h/7.png", "i/8.png"], b"")
    made = ["data_prep.classes", "--raw-dir", "raw", "--out-dir", "out"]
    assert_one_line_error(command(*made, cwd=tmp_path), "3 bad items", "g/6.png")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [2**31, -1000])
def test_a_name_of_gigabytes_in_a_tar_file_takes_no_memory(kind, size, tmp_path):
    member = tarfile.TarInfo("long")
    member.type, member.size = kind, size
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(member.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**31 + 10240)  # a hole
    with pytest.raises(UserError, match=r"a\.tar is not a whole tar file \(a name of"):
        listed(tmp_path / "a.tar")


def test_a_tar_file_that_is_compressed_says_so_whatever_it_is_called(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("1.png"))
    with pytest.raises(UserError, match=r"a\.tar is compressed"):
        listed(tmp_path / "a.tar")


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_of_members_of_one_name_the_last_is_taken_as_unpacking_does(form, tmp_path):
    path = tmp_path / f"a.{form}"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("1.png", picture())
            archive.writestr("./1.png", picture("blue"))
    else:
        with tarfile.open(path, "w") as tar:
            for name, color in (("1.png", "red"), ("./1.png", "blue")):
                member = tarfile.TarInfo(name)
                member.size = len(picture(color))
                tar.addfile(member, io.BytesIO(picture(color)))
    ((_, image),) = ImageStore((path,)).locate([(1, "1.png")])
    assert read_file(image) == picture("blue")


def test_a_zip_file_with_names_in_latin1_is_read_by_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("set/cafX.png", picture())
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content.replace(b"cafX", b"caf\xe9"))
    for store, name in ((ImageStore, "set/caf\u00e9.png"), (NamedImages, "other/caf\u00e9.png")):
        ((_, image),) = store((tmp_path / "a.zip",)).locate([(1, name)])
        assert read_file(image) == picture()


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_bomb_takes_no_more_memory_than_it_says(method, tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("1.json", bytes(100_000_000))
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.rindex(b"PK\x01\x02") + 24, 100)  # says that it has 100 bytes
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with open_zip(path) as archive, pytest.raises(UserError, match=r"a\.zip \(1\.json\)"):
            read_member(path, archive, "1.json")
        with pytest.raises(UserError, match=r"a\.zip \(1\.json\)"):
            list(JsonFile(path, "1.json").entries("a"))
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_links_to_nothing_and_pipes_in_a_class_folder_are_bad_items(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "raw/train" / name).mkdir(parents=True)
        (tmp_path / "raw/train" / name / "1.png").write_bytes(picture())
    (tmp_path / "raw/train/cat/2.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "raw/train/dog/3.png")
    made = ["data_prep.classes", "--raw-dir", "raw", "--out-dir", "out"]
    assert_one_line_error(command(*made, cwd=tmp_path), "2 bad items", "link to nothing", "2.png")
    assert command(*made, "--on-bad", "skip", cwd=tmp_path).returncode == 0
    assert len(load_split(tmp_path / "out", "train")) == 2


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_never_read(kind, tmp_path):
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(UserError, match=r"odd cannot be read: .* not a file"):
        open_image(path)
    with pytest.raises(ValueError, match=r"odd cannot be read"):
        draw_regions([{"maps": [[str(path), None]]}], 4, 4)
    assert describe_files({"a": path}) == describe_files({"a": tmp_path / "nowhere"})


@pytest.mark.parametrize(
    "region",
    [
        {"box": [0, 0, 10**400, 5]}, {"box": [0, 0, float("inf"), 5]}, {"box": [float("nan"), 0, 5, 5]},
        {"box": [10**400, 0, 5, 5]}, {"box": ["x", 0, 5, 5]}, {"box": [0, 0, 5]},
        {"segmentation": [[10**400, 0, 1, 1, 2, 2]]},
    ],
)  # fmt: skip
def test_a_region_of_numbers_beyond_all_measure_is_left_out_alone(region):
    drawn, faults = draw_regions([region, {"box": [1, 1, 3, 3]}], 8, 8)
    assert drawn == draw_regions([{"box": [1, 1, 3, 3]}], 8, 8)[0]
    assert len(faults) == 1


def test_a_search_follows_links_to_folders_and_leaves_clutter_out(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/1.png").write_bytes(picture())
    (tmp_path / "set").mkdir()
    (tmp_path / "set/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/again").symlink_to(tmp_path / "set")
    (tmp_path / "set/._2.png").write_bytes(b"x")
    assert list_pictures(tmp_path / "set") == [tmp_path / "set/linked/1.png"]


# --- tables and JSON --------------------------------------------------------------------------------------------------

ROWS = [
    {"image": "1.png", "class": "0"},
    {"image": "2.png", "class": 'a "b", c;d'},
    {"image": "3.png", "class": "\u00e9"},
]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-mark", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_table_is_read_as_any_program_saves_it(encoding, delimiter, end, tmp_path):
    file = io.StringIO()
    writer = csv.DictWriter(file, ["image", "class"], delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    text = file.getvalue()
    content = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-mark" else text.encode(encoding)
    (tmp_path / "t.csv").write_bytes(content)
    assert [row for _, row in read_rows(tmp_path / "t.csv")] == ROWS


CELLS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20).filter(
    lambda cell: cell == cell.lstrip(" ")
)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), st.sampled_from([",", ";", "\t"]))
@OWN
def test_what_is_written_into_a_table_comes_out_of_it(tmp_path, rows, delimiter):
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL)
        writer.writerows([("one", "two"), *rows])
    assert [(row["one"], row["two"]) for _, row in read_rows(tmp_path / "t.csv")] == rows


def test_long_fields_and_lists_are_read_and_odd_tables_are_one_line(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("image,class\n1.png," + "x" * 500_000 + "\n")
    assert len(next(read_rows(path))[1]["class"]) == 500_000
    (tmp_path / "t.json").write_text('\ufeff[{"image": "1.png", "size": 1.5}]', encoding="utf-8")
    assert next(read_rows(tmp_path / "t.json"))[1] == {"image": "1.png", "size": 1.5}
    for content, said in (
        ("a,a\n1,2\n", "two columns are called 'a'"), ("a,b\n1,2,3\n", "line 2 has more columns"),
        ('a,b\n"1"x,2\n', "line 2 is not CSV"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            list(read_rows(path))
    path.write_bytes("a,b\ncaf\u00e9,1\n".encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        list(read_rows(path))


def test_values_mean_what_people_mean():
    assert [split_name(one, "") for one in ("Train", "TRAIN", "validation", "valid", "Test", "testA")] == [
        "train", "train", "val", "val", "test", "testA",
    ]  # fmt: skip
    assert [is_empty(one) for one in (None, float("nan"), " ", 0, "0", False)] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert [as_text("", "x", one) for one in (3, 3.0, "3", 0)] == ["3", "3", "3", "0"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"a": [' + b"[" * 10**6 + b"]" * 10**6 + b"]}", "nested more than"),
        (b'{"a": [{"b": ' + b"1" * 10**6 + b"}]}", "a number of more than"),
        (b'{"a": [{"b": "' + b"x" * (70 * 2**20) + b'"}]}', "a text or a number of more than 64 MiB"),
        (b'{"a": [{"b": NaN}]}', "has NaN or Infinity"),
        (b'{"a": [{"b": 1}', "is not a whole JSON file"),
        (b"<html>", "is not JSON"),
    ],
    ids=["depth", "digits", "text", "nan", "cut", "html"],
)  # fmt: skip
def test_json_that_nobody_writes_is_one_line_and_no_crash(content, said, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=said):
        list(JsonFile(tmp_path / "a.json").entries("a"))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_json_with_a_mark_is_read(encoding, tmp_path):
    (tmp_path / "a.json").write_bytes('{"a": [{"b": "\u00e9\U0001f600"}]}'.encode(encoding))
    assert list(JsonFile(tmp_path / "a.json").entries("a")) == [{"b": "\u00e9\U0001f600"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", b"sep=;\r\nimage;class\r\n1.png;0\r\n"),
        ("t.csv", b"image,class\n1.png,0,\n"),
        ("t.csv", "image,class\n1.png,0\n".encode("utf-16-le")),
        ("t.csv", "image,class\n1.png,0\n".encode("utf-16-be")),
        ("t.json", b'{"image": "1.png", "class": "0"}\n'),
        ("t.jsonl", b' [\n{"image": "1.png", "class": "0"}]'),
        ("t.json", '[{"image": "1.png", "class": "0"}]'.encode("utf-16-le")),
        ("t.json", '[{"image": "1.png", "class": "0"}]'.encode("utf-32")),
    ],
)
def test_a_table_is_read_by_what_is_in_it(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_rows(tmp_path / name)] == [{"image": "1.png", "class": "0"}]


def test_texts_are_not_taken_for_numbers_and_levels(tmp_path):
    text = "1" * 5000 + "[" * 5000 + '\\"]"' + "\\"
    (tmp_path / "a.json").write_text(json.dumps({"a": [{"b": text, "c": [1]}] * 400}))
    assert [entry["b"] for entry in JsonFile(tmp_path / "a.json").entries("a")] == [text] * 400


JSON_TEXTS = st.text(st.sampled_from('\\"[]{}1,: x'), max_size=12)


@given(st.lists(st.dictionaries(JSON_TEXTS, JSON_TEXTS, max_size=3), min_size=1, max_size=8), st.integers(1, 40))
@OWN
def test_json_is_read_alike_in_chunks_of_any_size(tmp_path, rows, size):
    content = json.dumps({"a": rows, "z": "end"}).encode()
    bounded = json_file._Bounded(io.BytesIO(content), "a.json")
    while chunk := bounded.read(size):
        assert chunk
    assert not bounded.in_text
    (tmp_path / "a.json").write_bytes(content)
    assert list(JsonFile(tmp_path / "a.json").entries("a")) == rows


def test_halves_of_characters_are_not_what_a_table_fails_on(tmp_path):
    for name, content in (("t.jsonl", '{"a": "x \\uD83D y"}'), ("t.json", '[{"a": "x \\ud83d y"}]')):
        (tmp_path / name).write_text(content)
        assert [row for _, row in read_rows(tmp_path / name)] == [{"a": "x ? y"}]


@pytest.mark.parametrize("content", ['{"b": []}', '{"a": {"b": 1}}', '{"a": null, "b": 1}', "[1]"])
def test_a_list_that_is_not_there_is_said_with_what_is(content, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"has no 'a' that is a list, but ('|nothing)"):
        list(JsonFile(tmp_path / "a.json").entries("a"))


def test_pickles_of_python_2_are_utf8_and_what_is_in_them_many_times_is_refused():
    old = b"(lp1\n(dp2\nS'sent'\np3\nS'caf\\xc3\\xa9 \\xe9'\np4\nsa."
    assert read_plain_pickle("refs", old) == [{"sent": "caf\u00e9 \u00e9"}]
    laughs = b"\x80\x02]q\x00Na" + b"".join(b"]q%c(%se" % (n, b"h%c" % (n - 1) * 10) for n in range(1, 40)) + b"."
    for content in (laughs, b"\x80\x02]q\x00h\x00a."):
        with pytest.raises(UserError, match="refs is not read"):
            read_plain_pickle("refs", content)


# --- bad rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [{"label": -1}, {"label": None}, {"image": None}])
@pytest.mark.parametrize("names", [None, ["no", "yes"]])
def test_rows_without_an_image_or_a_class_are_named_and_can_be_left_out(bad, names, tmp_path):
    rows = [{"image": {"bytes": picture(), "path": None}, "label": n % 2} for n in range(4)]
    rows[1] |= bad
    label = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": label})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "set"))
    made = ["data_prep.classes", "--dataset", "set", "--out-dir", "out"]
    assert_one_line_error(command(*made, cwd=tmp_path), "1 bad item", "train", "row 1", "--on-bad skip")
    assert not (tmp_path / "out").exists()
    done = command(*made, "--on-bad", "skip", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert load_split(tmp_path / "out", "train")["label"] == [0, 0, 1]
    assert sum(read_manifest(tmp_path / "out")["dropped"].values()) == 1


def test_folders_as_they_are_downloaded_are_taken_and_numbers_are_in_their_order(tmp_path):
    rows = {"image": [picture()] * 3, "label": [10, 2, 1]}
    (tmp_path / "set/data").mkdir(parents=True)
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "set/data/train-00000-of-00001.parquet"))
    done = command("data_prep.classes", "--dataset", "set", "--out-dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_classes(tmp_path / "out") == ["1", "2", "10"]
    assert load_split(tmp_path / "out", "train")["label"] == [2, 1, 0]


def test_classes_that_only_look_like_numbers_are_texts(tmp_path):
    for name in ("--5", "10", "2"):
        (tmp_path / "raw/train" / name).mkdir(parents=True)
        (tmp_path / "raw/train" / name / "a.png").write_bytes(picture())
    done = command("data_prep.classes", "--raw-dir", "raw", "--out-dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read_classes(tmp_path / "out") == ["--5", "10", "2"]


def test_a_name_says_what_is_clutter():
    assert all(map(is_clutter, (".DS_Store", "a/._b.png", "__MACOSX/a.png", "x/Thumbs.db", "a\\.b\\c.png")))
    assert not any(map(is_clutter, ("a.png", "./a.png", "a.b/c.png", "../a.png")))


def test_an_image_that_is_given_in_memory_is_turned_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(io.BytesIO(picture(form="JPEG", exif=exif))) as image:
        assert as_shown(image).size == (8, 12)
