"""Prepare images with a class per pixel: PASCAL VOC 2012, Cityscapes, ADE20K, COCO instances, or your own masks.

    vlabs prepare segmentation --layout voc --raw-dir RAW --out-dir data/voc

Download: what the layout names, to RAW; nothing needs unpacking.

    voc          VOCtrainval_11-May-2012.tar; with benchmark.tgz (SBD) beside it the usual 10,582 training images
    cityscapes   leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip; the 19 classes of the benchmark
    ade20k       ADEChallengeData2016.zip; with release_test.zip beside it the test images
    instances    COCO instances, in annotations*.zip or instances_SUBSET.json, and the images of a subset in SUBSET.zip
                 or a folder: a class is a category, pixels without an object are background, and of overlapping
                 objects the smaller one counts
    folders      your own: images/SPLIT/NAME.jpg (or .png), masks/SPLIT/NAME.png, whose values are 0, 1, …, and
                 classes.txt with the name of each, one per line; 255 does not count. A split without masks is a test

Label values become 0, 1, … in the order of `classes.json`. Ignored pixels are 255 (65535 with more than 254 classes):
VOC's borders, all but the 19 classes of Cityscapes, and ADE20K's 0. An image without its mask, a mask of another size
than its image, and a value that the dataset does not have are bad.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data_prep.engine.folder import NOT_DROPPED, BadItem, describe_raw, name_of_rendered
from data_prep.engine.places import Listing, json_files, read_file
from data_prep.engine.reader import new_parser
from data_prep.engine.regions import Degenerate, draw_shape
from data_prep.engine.tables import split_name
from data_prep.engine.tars import read_packed
from data_prep.engine.units import Batches, Folder, Row, Unit, prepare_units
from vlabs.data.decoding import read_labels, size_of
from vlabs.data.features import MASK_FEATURES
from vlabs.data.instances import list_annotations, list_categories
from vlabs.data.prepared import CITYSCAPES, IGNORED
from vlabs.errors import UserError, one_line, run_cli
from vlabs.utils.files import write_json
from vlabs.utils.plain import read_text

_PAIRS_A_UNIT = 256
_LARGEST_ARCHIVE = 16 * 2**30
_INSTANCES = re.compile(r"instances_(.+)\.json")

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
_CITYSCAPES_LABELS = 34


class Pair(NamedTuple):
    """An image and its mask, read when they are wanted.

    Attributes:
        name: of the image.
        image: gives its file's bytes.
        mask: gives the raw label values (rows, columns); None where masks of the split are kept back.
        faults: what was left out of the mask alone, once it is read.
    """

    name: str
    image: Callable[[], bytes]
    mask: Callable[[], np.ndarray] | None
    faults: Sequence[str] = ()


class Layout(NamedTuple):
    """A dataset.

    Attributes:
        classes: their names.
        labels: the class of every raw label value that the dataset has; `IGNORED` for what does not count.
        splits: by name, their pairs, in parts that are read and kept at once.
        files: what is read.
    """

    classes: Sequence[str]
    labels: Mapping[int, int]
    splits: Mapping[str, Sequence[Iterable[Pair]]]
    files: Sequence[Path]


def _find(raw_dir: Path, name: str) -> Path:
    path = next((path for path in (raw_dir / name, *sorted(raw_dir.glob(f"*/{name}"))) if path.is_file()), None)
    if path is None:
        raise UserError(f"{raw_dir} lacks {name}: download it there, nothing needs unpacking")
    return path


def _chunks(pairs: Sequence[Pair]) -> list[Sequence[Pair]]:
    return [pairs[start : start + _PAIRS_A_UNIT] for start in range(0, len(pairs), _PAIRS_A_UNIT)]


def _read(listing: Listing, name: str) -> bytes:
    """A file of an archive.

    Raises:
        ValueError: it is not there, or damaged.
    """
    image = listing.find(name)
    if image is None:
        there = next(iter(listing.files), None)
        raise ValueError(f"{name} is missing; {listing.location.name} has {f'{there}, say' if there else 'no files'}")
    return read_file(image)


def _pair(name: str, pictures: Listing, picture: str, mask: str | None, masks: Listing | None = None) -> Pair:
    """An image and its mask by their names in archives; None for a mask that is kept back."""
    labels = None if mask is None else lambda: read_labels(_read(masks or pictures, mask))
    return Pair(name, partial(_read, pictures, picture), labels)


# --- the datasets ----------------------------------------------------------------------------------------------------


def voc(raw_dir: Path) -> Layout:
    """PASCAL VOC 2012, with SBD's masks for training where they are there, which are read as their archive comes."""
    archive = _find(raw_dir, "VOCtrainval_11-May-2012.tar")
    listing, lists = Listing(archive), "ImageSets/Segmentation"
    root = next((name.partition(lists)[0] for name in listing.files if lists in name), "")

    def picture(name: str) -> str:
        return f"{root}JPEGImages/{name}.jpg"

    names = {}
    for split in ("train", "val"):
        try:
            names[split] = _read(listing, f"{root}{lists}/{split}.txt").decode().split()
        except ValueError:
            raise UserError(f"{archive} lacks {lists}/{split}.txt: download it again") from None
    splits: dict[str, Sequence[Iterable[Pair]]] = {
        split: _chunks([_pair(one, listing, picture(one), f"{root}SegmentationClass/{one}.png") for one in of_split])
        for split, of_split in names.items()
    }

    def of_sbd(path: Path, known: set[str]) -> Iterator[Pair]:
        for file, content in read_packed(path, _LARGEST_ARCHIVE):
            name = PurePosixPath(file).stem
            if file.endswith(".mat") and "/cls/" in file and name not in known and picture(name) in listing.files:
                yield Pair(name, partial(_read, listing, picture(name)), partial(_sbd_labels, path, content))

    files = [archive]
    if (sbd := raw_dir / "benchmark.tgz").is_file():
        files.append(sbd)
        splits["train"] = [*splits["train"], of_sbd(sbd, {*names["train"], *names["val"]})]
    labels = {n: n for n in range(len(VOC_CLASSES))} | {255: IGNORED}
    return Layout(VOC_CLASSES, labels, splits, files)


def _sbd_labels(path: Path, content: bytes) -> np.ndarray:
    from scipy.io import loadmat

    try:
        found = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=False)["GTcls"].Segmentation
        return np.asarray(found, dtype=np.int64)
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise UserError(f"{path} is not SBD's whole archive ({one_line(str(error))}): download it again") from None


def cityscapes(raw_dir: Path) -> Layout:
    """Cityscapes, fine annotations; the masks of test are kept back."""
    files = [_find(raw_dir, f"{name}_trainvaltest.zip") for name in ("leftImg8bit", "gtFine")]
    pictures, masks = map(Listing, files)

    def pair(path: str, split: str) -> Pair:
        name = PurePosixPath(path).name.removesuffix("_leftImg8bit.png")
        mask = path.replace("leftImg8bit", "gtFine").removesuffix(".png") + "_labelIds.png"
        return _pair(name, pictures, path, None if split == "test" else mask, masks)

    splits = {
        split: _chunks([
            pair(path, split) for path in sorted(pictures.files)
            if f"/{split}/" in f"/{path}" and path.endswith("_leftImg8bit.png")
        ])
        for split in ("train", "val", "test")
    }  # fmt: skip
    train_ids = {label: n for n, label in enumerate(CITYSCAPES.values())}
    labels = {n: train_ids.get(n, IGNORED) for n in range(_CITYSCAPES_LABELS)} | {255: IGNORED}
    return Layout(tuple(CITYSCAPES), labels, splits, files)


def ade20k(raw_dir: Path) -> Layout:
    """ADE20K's scene parsing, 150 classes."""
    path = _find(raw_dir, "ADEChallengeData2016.zip")
    files, listing = [path], Listing(path)
    listed = next((one for one in listing.files if one.endswith("objectInfo150.txt")), None)
    try:
        lines = _read(listing, str(listed)).decode().splitlines()[1:]
        classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} lacks a whole objectInfo150.txt ({one_line(str(error))}): download it again") from None

    def pairs(of: Listing, folder: str = "") -> list[Sequence[Pair]]:
        names = sorted(one for one in of.files if folder in one and one.endswith(".jpg"))
        masks = [name.replace("images/", "annotations/").removesuffix(".jpg") + ".png" for name in names]
        each = zip(names, masks, strict=True)
        return _chunks([_pair(PurePosixPath(one).stem, of, one, mask if folder else None) for one, mask in each])

    splits = {"train": pairs(listing, "images/training/"), "val": pairs(listing, "images/validation/")}
    if (test := raw_dir / "release_test.zip").is_file():
        files.append(test)
        splits["test"] = pairs(Listing(test))
    return Layout(classes, {0: IGNORED} | {n + 1: n for n in range(len(classes))}, splits, files)


def instances(raw_dir: Path) -> Layout:
    """COCO instances as semantic maps: COCO's own, those of the embedded corpus, or of your own."""
    found = [(file, _INSTANCES.fullmatch(file.name)) for file in json_files(raw_dir, "annotations*.zip")]
    subsets = [(file, match[1]) for file, match in found if match]
    if not subsets:
        raise UserError(f"{raw_dir} holds no COCO instances: no instances_*.json, in an annotations*.zip or unpacked")
    categories: dict[int, str] = {}
    for file, _ in subsets:
        categories |= list_categories(file)
    label_of = {category: n for n, category in enumerate(sorted(categories), start=1)}

    def mask(image: dict[str, Any], there: Sequence[dict[str, Any]], faults: list[str]) -> np.ndarray:
        height, width = int(image["height"]), int(image["width"])
        labels = np.zeros((height, width), dtype=np.int64)
        shapes: list[tuple[float, np.ndarray, int]] = []
        for one in there:
            if one.get("category_id") not in label_of and not one.get("iscrowd"):
                raise ValueError(f"instance {one['id']} has a category without a name, {one.get('category_id')!r}")
            found: list[str] = []
            try:
                inside = draw_shape(one["segmentation"], width, height, found)
                label = IGNORED if one.get("iscrowd") else label_of[one["category_id"]]
                shapes.append((float(one.get("area") or inside.sum()), inside, label))
            except Degenerate as error:
                found.append(str(error))
            except ValueError as error:
                raise ValueError(f"the segmentation of instance {one['id']} cannot be read: {error}") from None
            faults += [f"instance {one['id']}: {fault}" for fault in found]
        for _, inside, label in sorted(shapes, key=lambda shape: -shape[0]):
            labels[inside] = label
        return labels

    def pair(listing: Listing, subset: str, image: dict[str, Any], there: Sequence[dict[str, Any]]) -> Pair:
        name = str(image["file_name"])
        inside = next((one for one in (f"{subset}/{name}", name) if listing.find(one)), f"{subset}/{name}")
        faults: list[str] = []
        return Pair(
            PurePosixPath(name).stem, lambda: _read(listing, inside), lambda: mask(image, there, faults), faults
        )

    splits: dict[str, list[Iterable[Pair]]] = {}
    files = []
    for file, subset in subsets:
        unpacked = raw_dir / subset
        location = unpacked if unpacked.is_dir() else _find(raw_dir, f"{subset}.zip")
        files += [file.path, location]
        listing = Listing(location)
        of_image: dict[int, list[dict[str, Any]]] = {}  # of this file: another's may have the same ids
        for annotation in list_annotations(file):
            of_image.setdefault(annotation["image_id"], []).append(annotation)
        pairs = []
        for image in file.entries("images"):
            if lacking := {"id", "file_name", "height", "width"} - image.keys():
                raise UserError(f"{file}: an image has no '{min(lacking)}'")
            pairs.append(pair(listing, subset, image, of_image.get(image["id"], [])))
        splits.setdefault(split_name(subset.rstrip("0123456789"), str(file)), []).extend(_chunks(pairs))
    labels = {n: n for n in range(len(categories) + 1)} | {IGNORED: IGNORED}
    return Layout(("background", *(categories[one] for one in sorted(categories))), labels, splits, files)


def folders(raw_dir: Path) -> Layout:
    """Your own images and masks, in folders of splits."""
    listed = _find(raw_dir, "classes.txt")
    classes = [line.strip() for line in read_text(listed).splitlines() if line.strip()]
    listing = Listing(listed.parent)
    splits: dict[str, list[Pair]] = {}
    masks = {name.rpartition(".")[0]: name for name in listing.files if re.fullmatch(r"masks/.+\.png", name)}
    labeled = {PurePosixPath(name).parts[1] for name in masks}
    for path in sorted(name for name in listing.files if re.fullmatch(r"images/.+/.+", name)):
        folder, name = path.split("/", 2)[1:]
        stem = name.rpartition(".")[0]
        own = f"masks/{folder}/{stem}"
        mask = masks.get(own, f"{own}.png") if folder in labeled else None
        splits.setdefault(split_name(folder, str(raw_dir)), []).append(_pair(stem, listing, path, mask))
    if not splits:
        raise UserError(f"{listed.parent} has no images/SPLIT/NAME.jpg beside classes.txt")
    labels = {n: n for n in range(len(classes))} | {255: IGNORED}
    places = sorted(path for one in ("images", "masks") for path in (listed.parent / one).glob("*") if path.is_dir())
    return Layout(classes, labels, {split: _chunks(pairs) for split, pairs in splits.items()}, [listed, *places])


LAYOUTS: dict[str, Callable[[Path], Layout]] = {
    "voc": voc, "cityscapes": cityscapes, "ade20k": ade20k, "instances": instances, "folders": folders,
}  # fmt: skip


# --- what is written --------------------------------------------------------------------------------------------------


def prepare_masks(layout: str, raw_dir: Path, out_dir: Path, on_bad: str = "error", name: str | None = None) -> None:
    """Write the prepared folder `out_dir`, see `prepare_units`.

    Args:
        layout: a key of `LAYOUTS`.
        name: of the dataset; that of the layout, or of what was rendered, or of `raw_dir` if not given.

    Raises:
        UserError: files are missing or damaged, a pair cannot be used, or `out_dir` holds something else.
    """
    if not raw_dir.is_dir():
        raise UserError(f"--raw-dir {raw_dir}: there is no such folder")
    found = LAYOUTS[layout](raw_dir)
    units = []
    for split, parts in found.splits.items():
        if not any(parts):
            raise UserError(f"{raw_dir} has no images of {split}: is it the archive of {layout}?")
        units += [Unit(split, f"{split} {n}", partial(_rows, split, part, found)) for n, part in enumerate(parts)]

    def place(read: Callable[[], Batches]) -> Batches:
        number = 0
        for split, rows in read():
            for row in rows:
                row["image_id"] = number = number + 1
            yield split, rows

    def finish(folder: Path, counts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        write_json(folder / "classes.json", list(found.classes))
        return {"layout": layout}

    called = (
        name or name_of_rendered(raw_dir) or (raw_dir.resolve().name if layout in ("instances", "folders") else layout)
    )
    raw_files = [describe_raw(path) for path in found.files]
    folder = Folder("masks", called, MASK_FEATURES, units, raw_files, {"layout": layout}, place=place, finish=finish)
    prepare_units(folder, out_dir, on_bad)


def _rows(split: str, pairs: Iterable[Pair], layout: Layout) -> Iterator[Row | BadItem]:
    for pair in pairs:
        try:
            image, mask = _checked(pair, layout)
        except ValueError as error:
            yield BadItem("unusable pair", split, f"{pair.name} ({error})")
        else:
            yield from (BadItem(NOT_DROPPED, split, f"{pair.name}, {fault}") for fault in pair.faults)
            yield {"image_id": 0, "name": pair.name, "image": image, "mask": mask}


def _checked(pair: Pair, layout: Layout) -> tuple[bytes, bytes]:
    """An image's bytes, and its mask as the PNG that is kept.

    Raises:
        ValueError: what is wrong with them.
    """
    try:
        image = pair.image()
        size = size_of(image)
    except (OSError, ValueError) as error:
        raise ValueError(f"the image cannot be read: {one_line(str(error))}") from None
    if pair.mask is None:
        return image, b""
    try:
        raw = pair.mask()
    except (OSError, ValueError) as error:
        raise ValueError(f"the mask cannot be read: {one_line(str(error))}") from None
    if raw.shape != size[::-1]:
        raise ValueError(f"the mask has {raw.shape[1]} x {raw.shape[0]} pixels and the image {size[0]} x {size[1]}")
    values, places = np.unique(raw, return_inverse=True)
    if unknown := [value for value in values.tolist() if value not in layout.labels]:
        raise ValueError(f"the mask has the label value {unknown[0]}, which the dataset does not have")
    classes = np.array([layout.labels[value] for value in values.tolist()])
    wide = len(layout.classes) > 254
    kept = np.where(classes == IGNORED, IGNORED if wide else 255, classes).astype(np.uint16 if wide else np.uint8)
    file = io.BytesIO()
    Image.fromarray(kept[places].reshape(raw.shape)).save(file, "PNG")
    return image, file.getvalue()


def main() -> None:
    """Run the command line."""
    parser = new_parser("segmentation", __doc__, "pairs that cannot be used")
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the archives")
    arguments = parser.parse_args()
    prepare_masks(arguments.layout, arguments.raw_dir, arguments.out_dir, arguments.on_bad, arguments.name)


if __name__ == "__main__":
    run_cli(main)
