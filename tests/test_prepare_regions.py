"""What part of the image a text is about: drawn to the pixel, and read from every source as it is downloaded."""

from __future__ import annotations

import csv
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_one_line_error, command
from PIL import Image

from data_prep.engine.pipeline import Options, prepare
from data_prep.engine.regions import describe_files, draw_regions
from data_prep.readers.entities import find_entities
from data_prep.readers.flickr30k import Flickr30k
from data_prep.readers.own import Table
from data_prep.readers.refcoco import RefCoco, read_plain_pickle
from data_prep.readers.vqav2 import VQAv2
from vlabs.data.prepared import load_split, read_manifest
from vlabs.errors import UserError

WIDTH, HEIGHT = 12, 8
FAST = ["--vocab-size", 0, "--num-workers", 1]
NO_TOKENIZER = Options(vocab_size=0)


def picture(width: int = WIDTH, height: int = HEIGHT) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (90, 120, 30)).save(buffer, "JPEG")
    return buffer.getvalue()


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("L"))


def drawn(regions: list[dict[str, Any]]) -> bytes:
    png, faults = draw_regions(regions, WIDTH, HEIGHT)
    assert not faults
    return png


def boxes(*rectangles: tuple[int, int, int, int], width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """White where a rectangle is: first column and row, and the column and row after the last."""
    expected = np.zeros((height, width), dtype=np.uint8)
    for left, top, right, bottom in rectangles:
        expected[top:bottom, left:right] = 255
    return expected


def gray_file(path: Path, values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def regions_of(folder: Path, split: str = "train", item: str = "caption") -> dict[int, bytes]:
    rows = load_split(folder, split)
    return {
        item_id: region
        for row in rows
        for item_id, region in zip(row[f"{item}_id"], row["region"], strict=True)
    }  # fmt: skip


# --- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0, 0, 12, 8], (0, 0, 12, 8)),
        ([2, 3, 4, 1], (2, 3, 6, 4)),
        ([1.4, 2.6, 3.2, 2.0], (1, 3, 5, 5)),  # centres 1.5 ... 4.5 and 3.5, 4.5
        ([0.5, 0.5, 1, 1], (0, 0, 1, 1)),  # a centre on the border is of the box that begins there
        ([1.5, 0.5, 1, 1], (1, 0, 2, 1)),
        ([-5, -5, 6, 7], (0, 0, 1, 2)),
        ([11, 7, 30, 30], (11, 7, 12, 8)),
        ([3.6, 2.1, 0.2, 0.2], (3, 2, 4, 3)),  # with no centre in it: the pixel that it is in
    ],
)
def test_a_box_holds_the_pixels_whose_centres_are_in_it(box: list[float], expected: tuple[int, int, int, int]) -> None:
    assert (pixels(drawn([{"box": box}])) == boxes(expected)).all()


def test_masks_take_one_bit_a_pixel_and_maps_eight(tmp_path: Path) -> None:
    with Image.open(io.BytesIO(drawn([{"box": [0, 0, 3, 3]}]))) as image:
        assert (image.mode, image.size) == ("1", (WIDTH, HEIGHT))
    file = gray_file(tmp_path / "map.png", np.arange(96).reshape(HEIGHT, WIDTH))
    with Image.open(io.BytesIO(drawn([{"maps": [[str(file), None]]}]))) as image:
        assert image.mode == "L"


def test_several_regions_are_joined() -> None:
    polygon = {"segmentation": [[8, 4, 12, 4, 12, 8, 8, 8]]}
    joined = drawn([{"box": [0, 0, 2, 2]}, {"box": [1, 1, 2, 2]}, polygon])
    assert (pixels(joined) == boxes((0, 0, 2, 2), (1, 1, 3, 3), (8, 4, 12, 8))).all()


def test_run_lengths_go_down_the_columns_and_must_have_the_size_of_the_image() -> None:
    lengths = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT + 1, 2, 96 - HEIGHT - 3]}
    assert (pixels(drawn([{"segmentation": lengths}])) == boxes((1, 1, 2, 3))).all()
    with pytest.raises(ValueError, match=r"a mask of size \[8, 12\], and the image has \[12, 8\]"):
        draw_regions([{"segmentation": lengths}], HEIGHT, WIDTH)
    with pytest.raises(ValueError, match="the run lengths add up to 5 pixels"):
        draw_regions([{"segmentation": {"size": [HEIGHT, WIDTH], "counts": [2, 3]}}], WIDTH, HEIGHT)


def test_a_box_for_an_image_of_another_size_is_refused() -> None:
    box = {"box": [0, 0, 2, 2], "size": [HEIGHT, WIDTH]}
    assert (pixels(drawn([box])) == boxes((0, 0, 2, 2))).all()
    with pytest.raises(ValueError, match=r"a box in \[8, 12\], and the image has \[16, 24\]"):
        draw_regions([box], 24, 16)


@pytest.mark.parametrize(
    ("region", "fault"),
    [
        ({"box": [12, 0, 3, 3]}, "nothing of the region is in the image"),
        ({"box": [-3, 0, 3, 3]}, "nothing of the region is in the image"),
        ({"box": [1, 1, 0, 3]}, "a box of 0 x 3 pixels"),
        ({"segmentation": [[1, 1, 4, 1]]}, "a polygon must be a list of three or more pairs"),
        ({"segmentation": [[2.65, 2.33, 2.65, 2.33, 3.68, 2.33, 3.68, 2.33]]}, "a polygon has no area"),
        ({"segmentation": []}, "nothing of the region"),
    ],
)
def test_a_region_that_cannot_be_drawn_is_left_out_alone(region: dict[str, Any], fault: str) -> None:
    png, faults = draw_regions([region], WIDTH, HEIGHT)
    assert (png, len(faults)) == (b"", 1)
    assert fault in faults[0]
    assert (pixels(draw_regions([region, {"box": [0, 0, 2, 2]}], WIDTH, HEIGHT)[0]) == boxes((0, 0, 2, 2))).all()


def test_of_an_object_of_several_polygons_the_good_ones_are_drawn_and_the_bad_ones_counted() -> None:
    polygons = {"segmentation": [[8, 4, 12, 4, 12, 8, 8, 8], [1, 1, 2, 2], [0, 0, 2, 0, float("nan"), 2]]}
    png, faults = draw_regions([polygons], WIDTH, HEIGHT)
    assert (pixels(png) == boxes((8, 4, 12, 8))).all()
    assert len(faults) == 2


def test_a_map_is_the_mean_with_its_brightest_white_whatever_its_size(tmp_path: Path) -> None:
    first = gray_file(tmp_path / "1.png", [[0, 100, 40], [0, 0, 0]])
    second = gray_file(tmp_path / "2.png", [[0, 100, 0], [20, 0, 0]])
    maps = {"maps": [[str(first), None], [str(second), None]]}
    # Means 0 100 20 / 10 0 0, times 2.55; the map keeps its own size, of the same aspect as the image.
    assert pixels(drawn([maps])).tolist() == [[0, 255, 51], [26, 0, 0]]


def test_maps_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    small, large = gray_file(tmp_path / "1.png", np.ones((2, 3))), gray_file(tmp_path / "2.png", np.ones((4, 6)))
    with pytest.raises(ValueError, match=r"1\.png and the other maps of the same text differ in size"):
        draw_regions([{"maps": [[str(small), None], [str(large), None]]}], WIDTH, HEIGHT)
    with pytest.raises(ValueError, match=r"1\.png has 3 x 2 pixels, and its image 12 x 12"):
        draw_regions([{"maps": [[str(small), None]]}], 12, 12)
    with pytest.raises(ValueError, match="cannot be joined"):
        draw_regions([{"maps": [[str(small), None]]}, {"box": [0, 0, 1, 1]}], WIDTH, HEIGHT)
    (tmp_path / "3.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"3\.png cannot be read"):
        draw_regions([{"maps": [[str(tmp_path / "3.png"), None]]}], WIDTH, HEIGHT)
    with pytest.raises(ValueError, match=r"4\.png cannot be read"):
        draw_regions([{"maps": [[str(tmp_path / "4.png"), None]]}], WIDTH, HEIGHT)
    black = gray_file(tmp_path / "5.png", np.zeros((HEIGHT, WIDTH)))
    assert draw_regions([{"maps": [[str(black), None]]}], WIDTH, HEIGHT) == (
        b"", ["nothing of the region is in the image"],
    )  # fmt: skip


def test_files_are_described_by_name_and_content(tmp_path: Path) -> None:
    for name, text in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(text)
    described = describe_files({"x": tmp_path / "a"})
    assert described["files"] == 1
    assert describe_files({"x": tmp_path / "b"}) == described
    others = [{"x": tmp_path / "c"}, {"y": tmp_path / "a"}, {"x": tmp_path / "none"}, {}]
    assert all(describe_files(files) != described for files in others)


# --- Flickr30K Entities ---------------------------------------------------------------------------------------------

SENTENCES = [
    "[/EN#1/people Two young guys] with [/EN#2/bodyparts/other shaggy hair] look at [/EN#0/other the camera] .",
    "[/EN#1/people Friends] near [/EN#3/scene a yard] .",
]
CAPTIONS = [
    "Two young guys with shaggy hair look at the camera.",
    "friends near a yard",
    "This sentence is in no file.",
]
# Object 1 has two boxes, one of which is named 2 as well; pixels count from 1, the last included.
ANNOTATION = f"""<annotation>
<filename>1000.jpg</filename><size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>
<object><name>1</name><name>2</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>3</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>5</xmin><ymin>2</ymin><xmax>5</xmax><ymax>2</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobox>0</nobox></object>
<object><name>0</name><bndbox><xmin>9</xmin><ymin>6</ymin><xmax>12</xmax><ymax>8</ymax></bndbox></object>
</annotation>"""
FIRST, SECOND = (0, 0, 2, 3), (4, 1, 5, 2)


def entities_files(annotation: str | bytes = ANNOTATION) -> dict[str, bytes]:
    content = annotation.encode() if isinstance(annotation, str) else annotation
    return {"Sentences/1000.txt": "\n".join(SENTENCES).encode(), "Annotations/1000.xml": content}


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def flickr(folder: Path, files: dict[str, bytes]) -> Path:
    """Raw Flickr30k of one image, and other files."""
    sentences = [{"raw": raw, "tokens": [], "imgid": 4, "sentid": 20 + n} for n, raw in enumerate(CAPTIONS)]
    images = [{"imgid": 4, "split": "train", "filename": "1000.jpg", "sentences": sentences}]
    table = json.dumps({"images": images, "dataset": "flickr30k"}).encode()
    return write(folder, {"dataset_flickr30k.json": table, "flickr30k-images/1000.jpg": picture(), **files})


def test_a_caption_is_about_the_boxes_of_all_phrases_of_its_sentence(tmp_path: Path) -> None:
    raw = flickr(tmp_path / "raw", {"annotations.zip": zipped(entities_files())})
    done = command("data_prep.flickr30k", "--raw-dir", raw, "--out-dir", tmp_path / "out", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 captions match no sentence of" in done.stdout
    found = regions_of(tmp_path / "out")
    assert (pixels(found[20]) == boxes(FIRST, SECOND)).all()
    assert (pixels(found[21]) == boxes(FIRST, SECOND)).all()
    assert found[22] == b""
    counts = read_manifest(tmp_path / "out")["splits"]["train"]
    assert (counts["captions"], counts["captions_with_region"]) == (3, 2)


def test_phrases_with_boxes_become_the_captions(tmp_path: Path) -> None:
    raw = flickr(tmp_path / "raw", {"annotations.zip": zipped(entities_files())})
    done = command(
        "data_prep.flickr30k", "--raw-dir", raw, "--out-dir", tmp_path / "out", "--phrases", *FAST, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (row,) = load_split(tmp_path / "out", "train")
    assert row["caption_id"] == [2001, 2002, 2101]
    assert row["caption"] == ["Two young guys", "shaggy hair", "Friends"]
    for region, expected in zip(row["region"], [(FIRST, SECOND), (FIRST,), (FIRST, SECOND)], strict=True):
        assert (pixels(region) == boxes(*expected)).all()
    again = command("data_prep.flickr30k", "--raw-dir", raw, "--out-dir", tmp_path / "out", *FAST, cwd=tmp_path)
    assert_one_line_error(again, "made from other options")


def nested(files: dict[str, bytes]) -> dict[str, bytes]:
    return {"flickr30k_entities-master.zip": zipped({"flickr30k_entities-master/annotations.zip": zipped(files)})}


@pytest.mark.parametrize(
    "pack",
    [
        lambda files: files,
        lambda files: {f"flickr30k_entities/{name}": content for name, content in files.items()},
        lambda files: {"flickr30k_entities/annotations.zip": zipped(files)},
        lambda files: {"annotations.zip": zipped({f"a/b/{name}": content for name, content in files.items()})},
        nested,
    ],
    ids=["folders", "folder", "clone", "leading folders", "zip of the repository"],
)
def test_the_entities_are_found_however_they_are_packed(tmp_path: Path, pack: Any) -> None:
    entities = find_entities(write(tmp_path, pack(entities_files())))
    assert entities is not None
    first, second = entities.sentences("1000")
    assert first.text == "Two young guys with shaggy hair look at the camera ."
    assert [len(phrase.regions) for phrase in first.phrases] == [2, 1, 0]
    assert [phrase.text for phrase in second.phrases] == ["Friends", "a yard"]
    assert entities.sentences("1001") == []


def test_other_annotations_in_a_folder_change_the_options(tmp_path: Path) -> None:
    raw = flickr(tmp_path, entities_files())
    before = Flickr30k(raw).options
    assert before["entities"]["files"] == 2
    write(raw, entities_files(ANNOTATION.replace("<xmax>2<", "<xmax>3<")))
    assert Flickr30k(raw).options != before


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_an_annotation_that_declares_entities_is_refused(tmp_path: Path, encoding: str) -> None:
    document = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY b "1">]><a><object>&b;</object></a>'
    files = entities_files(document.encode(encoding))
    done = command(
        "data_prep.flickr30k", "--raw-dir", flickr(tmp_path, files), "--out-dir", tmp_path / "out", *FAST, cwd=tmp_path
    )
    assert_one_line_error(done, "1000.xml", "DOCTYPE")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"Annotations/1000.xml": b"<annotation>"}, "1000.xml cannot be read"),
        ({"Annotations/1000.xml": ANNOTATION.replace("<xmax>2<", "<xmax>two<").encode()}, "1000.xml: .* 'two'"),
        ({"Annotations/1000.xml": ANNOTATION.replace("<xmax>2</xmax>", "").encode()}, "1000.xml: .* missing"),
        ({"Sentences/1000.txt": b"\xff\xfe\xfa"}, "1000.txt is not UTF-8"),
        ({"annotations.zip": b"PK cut off"}, "annotations.zip is not a whole zip file"),
        ({"a_entities.zip": zipped({"annotations.zip": b"PK cut off"})}, "a_entities.zip .* is not a whole zip file"),
    ],
)  # fmt: skip
def test_damaged_annotations_are_named(tmp_path: Path, change: dict[str, bytes], message: str) -> None:
    raw = flickr(tmp_path, {**entities_files(), **change})
    with pytest.raises(UserError, match=message):
        prepare(Flickr30k(raw), tmp_path / "out", NO_TOKENIZER)


def test_sentences_without_annotation_and_phrases_without_entities_are_named(tmp_path: Path) -> None:
    raw = flickr(tmp_path, {})
    with pytest.raises(UserError, match=r"--phrases needs Flickr30K Entities in .*annotations\.zip"):
        Flickr30k(raw, phrases=True)
    write(raw, {"Sentences/1000.txt": SENTENCES[0].encode()})
    with pytest.raises(UserError, match=r"Sentences/1000\.txt and no Annotations/1000\.xml"):
        prepare(Flickr30k(raw), tmp_path / "out", NO_TOKENIZER)


def test_boxes_of_an_image_of_another_size_are_bad_items(tmp_path: Path) -> None:
    raw = flickr(tmp_path, {**entities_files(), "flickr30k-images/1000.jpg": picture(2 * WIDTH, 2 * HEIGHT)})
    with pytest.raises(UserError, match="unusable region: 2"):
        prepare(Flickr30k(raw), tmp_path / "out", NO_TOKENIZER)


# --- RefCOCO --------------------------------------------------------------------------------------------------------


def ref(number: int, split: str, image_id: int, sentences: list[str]) -> dict[str, Any]:
    return {
        "ref_id": number,
        "ann_id": 70 + number,
        "image_id": image_id,
        "split": split,
        "category_id": 1,
        "file_name": f"COCO_train2014_{image_id:012d}_{number}.jpg",
        "sent_ids": [10 * number + n for n in range(len(sentences))],
        "sentences": [
            {"raw": text.upper(), "sent": text, "tokens": text.split(), "sent_id": 10 * number + n}
            for n, text in enumerate(sentences)
        ],
    }


REFS = [
    ref(1, "train", 5, ["left one", "man"]),
    ref(2, "train", 5, ["the small one"]),
    ref(3, "testA", 6, ["right"]),
    ref(4, "val", 5, ["all"]),
]
# Rectangles as polygons, by annotation id; the last is outside of its image.
RECTANGLES = {71: (0, 0, 3, 4), 72: (5, 5, 6, 6), 73: (2, 2, 12, 8), 74: (0, 0, 12, 8), 75: (40, 40, 50, 50)}


def instances(rectangles: dict[int, tuple[int, int, int, int]]) -> bytes:
    annotations = [
        {"id": key, "image_id": 5, "category_id": 1, "area": 1.5, "segmentation": [[a, b, c, b, c, d, a, d]]}
        for key, (a, b, c, d) in rectangles.items()
    ]
    return json.dumps({"images": [], "annotations": annotations, "categories": []}).encode()


def refcoco(folder: Path, dataset: str = "refcoco", split_by: str = "unc", content: Any = None) -> Path:
    content = pickle.dumps(REFS, protocol=0) if content is None else content
    pictures = {f"train2014/COCO_train2014_{image_id:012d}.jpg": picture() for image_id in (5, 6)}
    files = {f"{dataset}/refs({split_by}).p": content, f"{dataset}/instances.json": instances(RECTANGLES), **pictures}
    return write(folder, files)


def run_refcoco(raw: Path, *more: object) -> Any:
    return command("data_prep.refcoco", "--raw-dir", raw, "--out-dir", raw / "out", *FAST, *more, cwd=raw)


def check_refcoco(out: Path) -> None:
    train = load_split(out, "train")
    assert train["image_id"] == [5]
    assert train[0]["caption_id"] == [10, 11, 20]
    assert train[0]["caption"] == ["left one", "man", "the small one"]
    assert train[0]["target_instances"] == [[71], [71], [72]]
    for region, instance in zip(train[0]["region"], (71, 71, 72), strict=True):
        assert (pixels(region) == boxes(RECTANGLES[instance])).all()
    assert (pixels(regions_of(out, "testA")[30]) == boxes(RECTANGLES[73])).all()
    assert (pixels(regions_of(out, "val")[40]) == boxes(RECTANGLES[74])).all()


def test_every_expression_is_a_caption_about_its_object(tmp_path: Path) -> None:
    done = run_refcoco(refcoco(tmp_path), "--dataset", "refcoco")
    assert done.returncode == 0, done.stderr
    check_refcoco(tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert (manifest["kind"], manifest["name"], manifest["options"]["split_by"]) == ("captions", "refcoco", "unc")
    assert {entry["name"] for entry in manifest["raw_files"]} == {"refs(unc).p", "instances.json", "train2014/"}


def test_zip_files_are_read_as_they_are(tmp_path: Path) -> None:
    raw = refcoco(tmp_path / "files", "refcoco+", content=pickle.dumps(REFS, protocol=2))
    for name, pattern in (("refcoco+", "refcoco+/*"), ("train2014", "train2014/*")):
        files = {str(path.relative_to(raw)): path.read_bytes() for path in raw.glob(pattern)}
        write(tmp_path, {f"{name}.zip": zipped(files)})
    prepare(RefCoco(tmp_path, "refcoco+", "unc"), tmp_path / "out", NO_TOKENIZER)
    check_refcoco(tmp_path / "out")


def test_a_pickle_of_python_2_is_read() -> None:
    # As Python 2 writes [{'sent': 'a', u'raw': u'\xe9', 'ref_id': 7L, 'x': True}]: its str, unicode, long and bool.
    content = b"(lp0\n(dp1\nS'sent'\np2\nS'a'\np3\nsVraw\np4\nV\xe9\np5\nsS'ref_id'\np6\nL7L\nsS'x'\np7\nI01\nsa."
    assert read_plain_pickle("refs", content) == [{"sent": "a", "raw": "é", "ref_id": 7, "x": True}]


class Touch:
    """What a pickle from a stranger may do when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_that_wants_to_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    for number, protocol in enumerate((0, 2, 5)):
        with pytest.raises(UserError, match="it wants the class or function"):
            read_plain_pickle("refs", pickle.dumps([Touch(tmp_path / f"ran {number}")], protocol=protocol))
    raw = refcoco(tmp_path / "raw", content=b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    done = run_refcoco(raw, "--dataset", "refcoco")
    assert_one_line_error(done, "refs(unc).p", "it wants the class or function os.system")
    assert not list(tmp_path.glob("ran*"))
    with pytest.raises(UserError, match="it has PERSID"):
        read_plain_pickle("refs", b"Pone\n.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(REFS)[:-30], "is not read"),
        (b"", "is not read: it is cut off"),
        (pickle.dumps({"refs": REFS}), "is no list of expressions"),
        (pickle.dumps([REFS[0], 3]), "entry 1 is no dictionary"),
        (pickle.dumps([{**REFS[0], "ann_id": "71"}]), "entry 0: 'ann_id' must be a whole number"),
        (pickle.dumps([{**REFS[0], "sentences": [3]}]), "entry 0: 'sentences' must be a list of dictionaries"),
        (pickle.dumps([{**REFS[0], "split": "../x"}]), "cannot be a split's name"),
        (pickle.dumps([{**REFS[0], "ann_id": 99}]), r"instances\.json: no instance 99"),
        (pickle.dumps([{("a",): 1}]), "it has TUPLE1, which no plain data need"),
        (b"\x80\x02]r\x00\x00\x00\x10.", "it wants 268,435,456 slots"),
    ],
)
def test_bad_expressions_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    raw = RefCoco(refcoco(tmp_path, content=content), "refcoco", "unc")
    with pytest.raises(UserError, match=message):
        prepare(raw, tmp_path / "out", NO_TOKENIZER)


def test_a_region_outside_the_image_is_noted_and_its_text_kept(tmp_path: Path) -> None:
    content = pickle.dumps([*REFS, ref(5, "train", 5, ["far away"])])
    raw = RefCoco(refcoco(tmp_path, content=content), "refcoco", "unc")
    prepare(raw, tmp_path / "out", NO_TOKENIZER)
    assert regions_of(tmp_path / "out")[50] == b""
    assert read_manifest(tmp_path / "out")["dropped"] == {"degenerate region": 1}


def test_missing_files_of_refcoco_are_named_together(tmp_path: Path) -> None:
    done = run_refcoco(tmp_path, "--dataset", "refcocog")
    assert_one_line_error(done, "refcocog/ or refcocog.zip", "train2014.zip")
    refcoco(tmp_path, "refcocog", "google")
    with pytest.raises(
        UserError, match=r"missing .*refcocog/refs\(umd\)\.p; --split-by names one of refs\(google\)\.p"
    ):
        RefCoco(tmp_path, "refcocog", "umd")


# --- VQA-HAT --------------------------------------------------------------------------------------------------------


def vqa(folder: Path, instances_file: bool = False) -> Path:
    """Raw VQA v2: question 50 of train, of which the annotation names an instance, and question 60 of val."""
    files = {"instances_train2014.json": instances(RECTANGLES)} if instances_file else {}
    for subset, image_id in (("train2014", 5), ("val2014", 6)):
        question = {"image_id": image_id, "question_id": 10 * image_id, "question": "What is it?"}
        annotation = {
            "question_id": 10 * image_id,
            "image_id": image_id,
            "question_type": "what",
            "answer_type": "other",
            "multiple_choice_answer": "dog",
            "answers": [{"answer": "dog", "answer_id": n} for n in range(10)],
        }
        if image_id == 5:
            annotation["target_instances"] = [71]
        other = {"image_id": image_id, "question_id": 10 * image_id + 1, "question": "Is it?"}
        both = [annotation, {**annotation, "question_id": 10 * image_id + 1}]
        questions = {"data_subtype": subset, "questions": [question, other]}
        files[f"v2_OpenEnded_mscoco_{subset}_questions.json"] = json.dumps(questions).encode()
        files[f"v2_mscoco_{subset}_annotations.json"] = json.dumps({"annotations": both}).encode()
        files[f"{subset}/COCO_{subset}_{image_id:012d}.jpg"] = picture()
    return write(folder, files)


def hat(folder: Path, maps: dict[str, Any]) -> Path:
    for name, values in maps.items():
        gray_file(folder / name, values)
    return folder


@pytest.fixture
def human_maps(tmp_path: Path) -> tuple[Path, Path]:
    train = hat(
        tmp_path / "vqahat_train", {"50_1.png": [[0, 100, 40], [0, 0, 0]], "50_2.png": [[0, 100, 0], [20, 0, 0]]}
    )
    val = hat(tmp_path / "vqahat_val", {"60_1.png": boxes((1, 1, 3, 3)), "99_1.png": boxes((0, 0, 1, 1))})
    return train, val


def test_human_maps_replace_instances_and_others_start_anew(tmp_path: Path, human_maps: tuple[Path, Path]) -> None:
    raw, out = vqa(tmp_path / "raw", instances_file=True), tmp_path / "out"

    def run(*folders: Path) -> Any:
        options = [part for folder in folders for part in ("--human-maps", folder)]
        fast = [*FAST, "--min-answer-count", 1]
        return command("data_prep.vqav2", "--raw-dir", raw, "--out-dir", out, *fast, *options, cwd=tmp_path)

    done = run(*human_maps)
    assert done.returncode == 0, done.stderr
    assert "2 of 3 questions with human maps are prepared" in done.stdout
    train, val = regions_of(out, "train", "question"), regions_of(out, "val", "question")
    assert pixels(train[50]).tolist() == [[0, 255, 51], [26, 0, 0]]
    assert (pixels(train[51]) == boxes(RECTANGLES[71])).all()  # which has no human maps
    assert (pixels(val[60]) == boxes((1, 1, 3, 3))).all()
    assert val[61] == b""
    assert load_split(out, "train")[0]["target_instances"] == [[71], [71]]

    assert "is there already" in run(*reversed(human_maps)).stdout
    assert_one_line_error(run(human_maps[0]), "made from other options")
    gray_file(human_maps[1] / "60_1.png", boxes((1, 1, 3, 4)))
    assert_one_line_error(run(*human_maps), "made from other options")


def test_without_human_maps_the_options_say_nothing_of_them(tmp_path: Path) -> None:
    assert VQAv2(vqa(tmp_path)).options == {}


def test_a_stopped_run_does_not_continue_with_other_maps(
    tmp_path: Path, human_maps: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    raw = vqa(tmp_path / "raw")
    gray_file(human_maps[0] / "50_1.png", np.ones((5, 5)))  # of another size than the other, which stops the run

    def make() -> None:
        with_maps = VQAv2(raw, human_maps)
        prepare(with_maps, tmp_path / "out", Options(vocab_size=0))

    with pytest.raises(UserError, match="unusable region"):
        make()
    hat(human_maps[0], {"50_1.png": [[9, 0, 0], [0, 0, 0]], "50_2.png": [[9, 0, 0], [0, 0, 0]]})
    make()
    assert "starting anew" in capsys.readouterr().out
    assert pixels(regions_of(tmp_path / "out", "train", "question")[50]).tolist() == [[255, 0, 0], [0, 0, 0]]


def test_wrong_folders_of_human_maps_are_named(tmp_path: Path, human_maps: tuple[Path, Path]) -> None:
    raw = vqa(tmp_path / "raw")
    (tmp_path / "empty").mkdir()
    done = command(
        "data_prep.vqav2", "--raw-dir", raw, "--out-dir", tmp_path / "out", "--human-maps", "empty", cwd=tmp_path
    )
    assert_one_line_error(done, "empty holds no maps of VQA-HAT")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        VQAv2(raw, [tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"--human-maps: .*vqahat_train as well: name each folder once"):
        VQAv2(raw, [human_maps[0], human_maps[0]])
    other = VQAv2(raw, [hat(tmp_path / "other", {"7_1.png": [[1]], f"{2**70}_1.png": [[1]]})])
    with pytest.raises(UserError, match="none of the maps, such as those of .*other, is of a question"):
        prepare(other, tmp_path / "out", NO_TOKENIZER)


# --- own tables -----------------------------------------------------------------------------------------------------


def table(folder: Path, rows: list[dict[str, Any]], item: str = "caption") -> Path:
    """A table of rows of one image, and the image."""
    write(folder, {"photos/1.jpg": picture()})
    path = folder / "table.jsonl"
    lines = [
        json.dumps({"image": "photos/1.jpg", item: f"text {n}", "split": "train", **row}) for n, row in enumerate(rows)
    ]
    path.write_text("\n".join(lines))
    return path


def make_own(path: Path, **options: Any) -> Path:
    raw: Any = Table(path, path.parent, 0.1)
    prepare(raw, path.parent / "out", Options(vocab_size=0, **options))
    return path.parent / "out"


@pytest.mark.parametrize("item", ["caption", "question"])
def test_rows_of_json_lines_have_boxes_or_a_mask(tmp_path: Path, item: str) -> None:
    gray_file(tmp_path / "masks/a.png", np.kron([[0, 255, 0], [0, 0, 0]], np.ones((8, 8))))
    Image.fromarray(boxes((2, 2, 5, 5))).convert("1").save(tmp_path / "masks/b.png")
    rows: list[dict[str, Any]] = [
        {"boxes": [[0, 0, 3, 2], [4.0, 4, 2, 2]], "answers": "yes"},
        {"boxes": [5, 1, 2, 3]},  # not even answers, where it is a question
        {"mask": "masks/a.png", "answers": "no"},
        {"mask": "masks/b.png", "answers": ["no"]},
        {"boxes": [], "mask": "", "answers": "no"},
    ]
    if item == "question":
        rows[1]["split"] = "test"  # unanswered questions stay where none of the split has answers
    path = table(tmp_path, rows, item)
    done = command("data_prep.own", "--table", path, "--out-dir", tmp_path / "out", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    train = regions_of(tmp_path / "out", "train", item)
    second = regions_of(tmp_path / "out", "test", item) if item == "question" else train
    assert (pixels(train[1]) == boxes((0, 0, 3, 2), (4, 4, 6, 6))).all()
    assert (pixels(second[2]) == boxes((5, 1, 7, 4))).all()
    assert pixels(train[3])[::8, ::8].tolist() == [[0, 255, 0], [0, 0, 0]]
    assert (pixels(train[4]) == boxes((2, 2, 5, 5))).all()
    assert train[5] == b""


def test_rows_of_csv_have_boxes_or_a_mask(tmp_path: Path) -> None:
    write(tmp_path, {"1.jpg": picture()})
    gray_file(tmp_path / "mask.png", boxes((1, 1, 2, 2)))
    path = tmp_path / "table.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [
                ["image", "caption", "split", "boxes", "mask"],
                ["1.jpg", "two", "train", "0 0 3 2|4 4 2 2", ""],
                ["1.jpg", "one", "train", " 5 1 2.0 3 ", ""],
                ["1.jpg", "mask", "train", "", "mask.png"],
                ["1.jpg", "none", "train", "", ""],
            ]
        )
    found = regions_of(make_own(path))
    assert (pixels(found[1]) == boxes((0, 0, 3, 2), (4, 4, 6, 6))).all()
    assert (pixels(found[2]) == boxes((5, 1, 7, 4))).all()
    assert (pixels(found[3]) == boxes((1, 1, 2, 2))).all()
    assert found[4] == b""


@pytest.mark.parametrize(
    "bad",
    [[1, 2, 3], [[1, 2, 3, 4, 5]], [[]], [1, 2, "3", 4], [1, 2, True, 4], {}, [[1, 2, 3, 4], 5],
     [float("nan"), 0, 1, 1], [0, 0, 10**400, 1], 7],
)  # fmt: skip
def test_boxes_that_are_none_are_named_with_their_line(tmp_path: Path, bad: Any) -> None:
    path = table(tmp_path, [{}, {"boxes": bad}])
    with pytest.raises(UserError, match=r"table\.jsonl, line 2: a box in 'boxes' must be 4 numbers"):
        list(Table(path, path.parent, 0.1)._rows())


@pytest.mark.parametrize("bad", ["1 2 3", "1 2 3 4 5", "a b c d", "1 2 3 4|", "1,2,3,4", "inf 0 1 1"])
def test_boxes_of_csv_that_are_none_are_named_with_their_line(tmp_path: Path, bad: str) -> None:
    (tmp_path / "table.csv").write_text(f'image,caption,boxes\n1.jpg,text,"{bad}"\n')
    with pytest.raises(UserError, match=r"table\.csv, line 2: .*'boxes' must be"):
        list(Table(tmp_path / "table.csv", tmp_path, 0.1)._rows())


def test_boxes_and_a_mask_in_one_row_are_an_error(tmp_path: Path) -> None:
    path = table(tmp_path, [{"boxes": [1, 2, 3, 4], "mask": "a.png"}])
    done = command("data_prep.own", "--table", path, "--out-dir", tmp_path / "out", *FAST, cwd=tmp_path)
    assert_one_line_error(done, "table.jsonl, line 1 has both 'boxes' and a 'mask'")
    with pytest.raises(UserError, match="line 1: 'mask' must be text"):
        list(Table(table(tmp_path, [{"mask": [3]}]), tmp_path, 0.1)._rows())


def test_masks_that_cannot_be_used_are_bad_items_and_a_mended_one_is_taken(tmp_path: Path) -> None:
    path = table(tmp_path, [{"mask": "a.png"}, {}])
    with pytest.raises(UserError, match=r"unusable region.*photos/1\.jpg, text 1 .*a\.png cannot be read"):
        make_own(path)
    gray_file(tmp_path / "a.png", np.ones((5, 5)))
    with pytest.raises(UserError, match=r"a\.png has 5 x 5 pixels, and its image 12 x 8"):
        make_own(path)
    gray_file(tmp_path / "a.png", boxes((3, 3, 4, 4)))
    assert (pixels(regions_of(make_own(path))[1]) == boxes((3, 3, 4, 4))).all()
    gray_file(tmp_path / "a.png", boxes((3, 3, 5, 5)))
    with pytest.raises(UserError, match="made from other options"):
        make_own(path)
