"""Pictures with a class a pixel: PASCAL VOC 2012, Cityscapes, ADE20K, from their archives as downloaded, and instances.

    python -m data_prep.segmentation --layout voc --raw-dir RAW --out-dir data/voc
    python -m data_prep.segmentation --layout cityscapes --raw-dir RAW --out-dir data/cityscapes
    python -m data_prep.segmentation --layout ade20k --raw-dir RAW --out-dir data/ade20k
    python -m data_prep.segmentation --layout instances --raw-dir RAW --out-dir data/mine

    voc          VOCtrainval_11-May-2012.tar; with benchmark.tgz (SBD) beside it the usual 10,582 training images
    cityscapes   leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip; the 19 classes of the benchmark
    ade20k       ADEChallengeData2016.zip; with release_test.zip beside it the test images
    instances    annotations.zip of COCO instances and a zip file of images a subset: a class is a category, what is no
                 object is background, and of objects that overlap the smaller one counts

Label values become 0, 1, … in the order of `classes.json`; what does not count is 255: VOC's borders, all but the 19
classes of Cityscapes, and ADE20K's 0. A picture without its mask, a mask of another size than its picture and a value
that the data set does not have are named, and stop the preparation unless --on-bad skip leaves them out. Nothing is
unpacked; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image
from tqdm import tqdm

from data_prep.engine.images import members, open_tar, open_zip
from data_prep.engine.pipeline import check_split_name, is_made, name_of_rendered, say_ready, write_datasets_files
from vlabs.data.decoding import open_picture
from vlabs.data.instances import list_annotations, list_categories
from vlabs.data.prepared import FORMAT_VERSION, IGNORED, MASK_FEATURES
from vlabs.errors import UserError, one_line, run_cli, show
from vlabs.utils.files import WORK, clear, new_folder, write_json, write_text

_SHARD = 256  # pictures a file

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip
# Cityscapes' label ids of the classes that its benchmark counts, in the order of its train ids.
CITYSCAPES = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17, "traffic light": 19,
    "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27,
    "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_CITYSCAPES_LABELS = 34


class Pair(NamedTuple):
    """A picture and its mask, read when they are wanted.

    Attributes:
        name: of the picture.
        image: gives its file's bytes.
        mask: gives the raw label values (rows, columns), uint8; None where masks of the split are kept back.
    """

    name: str
    image: Callable[[], bytes]
    mask: Callable[[], np.ndarray] | None


class Layout(NamedTuple):
    """A data set.

    Attributes:
        classes: their names.
        labels: (256,), the class of every raw label value; -1 for a value that the data set does not have.
        splits: by name, what gives their pairs; it may keep something in the folder that it is given, meanwhile.
        files: what is read.
    """

    classes: Sequence[str]
    labels: np.ndarray
    splits: Mapping[str, Callable[[Path], Iterator[Pair]]]
    files: Sequence[Path]


def _label_map(known: dict[int, int]) -> np.ndarray:
    labels = np.full(256, -1, dtype=np.int16)
    for value, label in known.items():
        labels[value] = label
    return labels


def _find(raw_dir: Path, name: str, required: bool = True) -> Path | None:
    path = raw_dir / name
    if path.is_file():
        return path
    if required:
        raise UserError(f"{raw_dir} lacks {name}: download it there, nothing needs unpacking")
    return None


def _png_labels(content: bytes) -> np.ndarray:
    with open_picture(content) as picture:
        values = np.asarray(picture)
    if values.ndim != 2:
        raise ValueError("not one channel of labels")
    return values.astype(np.uint8)


# --- PASCAL VOC -------------------------------------------------------------------------------------------------------


def voc(raw_dir: Path) -> Layout:
    """PASCAL VOC 2012, with SBD's masks for training where they are there.

    SBD's masks are kept meanwhile: its archive is compressed and can be read from its start only.
    """
    archive = _find(raw_dir, "VOCtrainval_11-May-2012.tar")
    assert archive is not None
    places: dict[str, tuple[int, int]] = {}
    with open_tar(archive) as tar:
        for member in members(tar, archive):
            if member.isfile() and ("JPEGImages" in member.name or "Segmentation" in member.name):
                places["/".join(PurePosixPath(member.name).parts[-2:])] = (member.offset_data, member.size)

    def read(name: str) -> bytes:
        offset, size = places[name]
        with archive.open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def names(split: str) -> list[str]:
        try:
            return read(f"Segmentation/{split}.txt").decode().split()
        except KeyError:
            raise UserError(f"{archive} lacks ImageSets/Segmentation/{split}.txt: download it again") from None

    def pair(name: str, more: Path | None) -> Pair:
        if more is not None and f"SegmentationClass/{name}.png" not in places:
            return Pair(name, lambda: read(f"JPEGImages/{name}.jpg"), lambda: np.load(more / f"{name}.npy"))
        return Pair(
            name, lambda: read(f"JPEGImages/{name}.jpg"), lambda: _png_labels(read(f"SegmentationClass/{name}.png"))
        )

    val = names("val")
    sbd = _find(raw_dir, "benchmark.tgz", required=False)
    train = names("train")

    def training(work: Path) -> Iterator[Pair]:
        if sbd is None:
            return (pair(name, None) for name in train)
        more = work / "sbd"
        extra = set(_unpack_sbd(sbd, more)) - set(val)
        every = sorted(set(train) | {name for name in extra if f"JPEGImages/{name}.jpg" in places})
        return (pair(name, more) for name in every)

    labels = _label_map({n: n for n in range(len(VOC_CLASSES))} | {IGNORED: IGNORED})
    splits: dict[str, Callable[[Path], Iterator[Pair]]] = {
        "train": training,
        "val": lambda work: (pair(name, None) for name in val),
    }
    return Layout(VOC_CLASSES, labels, splits, [archive, *([sbd] if sbd else [])])


def _unpack_sbd(path: Path, folder: Path) -> list[str]:
    """SBD's class masks, one file each, and their names; what an earlier run unpacked is kept."""
    from scipy.io import loadmat

    done = folder / "done.json"
    if done.is_file():
        found: list[str] = json.loads(done.read_text())
        return found
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in tqdm(archive, unit="file", desc=path.name):
                parts = PurePosixPath(member.name).parts
                if len(parts) > 1 and parts[-2] == "cls" and parts[-1].endswith(".mat"):
                    file = archive.extractfile(member)
                    assert file is not None
                    segmentation = loadmat(io.BytesIO(file.read()), squeeze_me=True, struct_as_record=False)["GTcls"]
                    name = parts[-1].removesuffix(".mat")
                    np.save(folder / f"{name}.npy", np.asarray(segmentation.Segmentation, dtype=np.uint8))
                    names.append(name)
    except (tarfile.TarError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not SBD's whole archive ({one_line(str(error))}): download it again") from None
    done.write_text(json.dumps(names))
    return names


# --- Cityscapes and ADE20K --------------------------------------------------------------------------------------------


def _zip_reader(path: Path) -> tuple[list[str], Callable[[str], bytes]]:
    """The names in a zip file, and what reads one of them."""
    archive = open_zip(path)
    names = archive.namelist()

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"the zip file is damaged here ({error})") from None

    return names, read


def cityscapes(raw_dir: Path) -> Layout:
    """Cityscapes, fine annotations; the masks of test are kept back."""
    pictures, masks = (_find(raw_dir, f"{name}_trainvaltest.zip") for name in ("leftImg8bit", "gtFine"))
    assert pictures is not None
    assert masks is not None
    image_names, read_image = _zip_reader(pictures)
    mask_names, read_mask = _zip_reader(masks)
    there = set(mask_names)

    def pairs(split: str) -> Iterator[Pair]:
        for path in sorted(one for one in image_names if f"/{split}/" in one and one.endswith("_leftImg8bit.png")):
            name = PurePosixPath(path).name.removesuffix("_leftImg8bit.png")
            mask = f"gtFine/{split}/{PurePosixPath(path).parent.name}/{name}_gtFine_labelIds.png"

            def labels(mask: str = mask) -> np.ndarray:
                if mask not in there:
                    raise ValueError(f"{mask} is missing")
                return _png_labels(read_mask(mask))

            yield Pair(name, lambda path=path: read_image(path), None if split == "test" else labels)  # type: ignore[misc]

    train_ids = {label: n for n, label in enumerate(CITYSCAPES.values())}
    labels = _label_map({n: train_ids.get(n, IGNORED) for n in range(_CITYSCAPES_LABELS)} | {IGNORED: IGNORED})
    splits = {split: lambda work, split=split: pairs(split) for split in ("train", "val", "test")}  # type: ignore[misc]
    return Layout(tuple(CITYSCAPES), labels, splits, [pictures, masks])


def ade20k(raw_dir: Path) -> Layout:
    """ADE20K's scene parsing, 150 classes."""
    path, test = _find(raw_dir, "ADEChallengeData2016.zip"), _find(raw_dir, "release_test.zip", required=False)
    assert path is not None
    names, read = _zip_reader(path)
    there = set(names)
    listed = next((one for one in names if one.endswith("objectInfo150.txt")), None)
    if listed is None:
        raise UserError(f"{path} lacks objectInfo150.txt: download it again")
    lines = read(listed).decode().splitlines()[1:]
    classes = [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]

    def pairs(folder: str) -> Iterator[Pair]:
        for image in sorted(one for one in names if f"/images/{folder}/" in one and one.endswith(".jpg")):
            mask = image.replace("/images/", "/annotations/").removesuffix(".jpg") + ".png"

            def labels(mask: str = mask) -> np.ndarray:
                if mask not in there:
                    raise ValueError(f"{mask} is missing")
                return _png_labels(read(mask))

            yield Pair(PurePosixPath(image).stem, lambda image=image: read(image), labels)  # type: ignore[misc]

    def unlabelled(path: Path) -> Iterator[Pair]:
        found, read_test = _zip_reader(path)
        for image in sorted(one for one in found if one.endswith(".jpg")):
            yield Pair(PurePosixPath(image).stem, lambda image=image: read_test(image), None)  # type: ignore[misc]

    splits: dict[str, Callable[[Path], Iterator[Pair]]] = {
        "train": lambda work: pairs("training"),
        "val": lambda work: pairs("validation"),
    }
    if test is not None:
        splits["test"] = lambda work: unlabelled(test)
    labels = _label_map({0: IGNORED} | {n + 1: n for n in range(len(classes))})
    return Layout(classes, labels, splits, [path, *([test] if test else [])])


# --- instances --------------------------------------------------------------------------------------------------------


def instances(raw_dir: Path) -> Layout:
    """COCO instances as semantic maps: those of the embedded corpus, or of one's own."""
    annotations = _find(raw_dir, "annotations.zip")
    assert annotations is not None
    categories = list_categories(annotations)
    label_of = {category: n for n, category in enumerate(sorted(categories), start=1)}
    with open_zip(annotations) as archive:
        subsets = [PurePosixPath(name).stem.removeprefix("instances_") for name in archive.namelist()]
        images = {
            subset: json.loads(archive.read(name))["images"]
            for subset, name in zip(subsets, archive.namelist(), strict=True)
        }
    of_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in list_annotations(annotations):
        of_image.setdefault(int(annotation["image_id"]), []).append(annotation)

    def mask(image: dict[str, Any]) -> np.ndarray:
        from vlabs.data.instances import decode_run_lengths, fill_polygons

        height, width = int(image["height"]), int(image["width"])
        labels = np.zeros((height, width), dtype=np.uint8)
        for one in sorted(of_image.get(image["id"], []), key=lambda one: -float(one["area"])):
            shape = one["segmentation"]
            inside = (
                decode_run_lengths(shape["counts"], height, width)
                if isinstance(shape, dict)
                else fill_polygons(shape, height, width)
            )
            labels[inside] = IGNORED if one.get("iscrowd") else label_of[one["category_id"]]
        return labels

    def pairs(subset: str) -> Iterator[Pair]:
        path = _find(raw_dir, f"{subset}.zip")
        assert path is not None
        _, read = _zip_reader(path)
        for image in images[subset]:
            name = image["file_name"]
            yield Pair(
                PurePosixPath(name).stem,
                lambda name=name: read(f"{subset}/{name}"),  # type: ignore[misc]
                lambda image=image: mask(image),  # type: ignore[misc]
            )

    splits = {
        subset.rstrip("0123456789"): lambda work, subset=subset: pairs(subset)  # type: ignore[misc]
        for subset in subsets
    }
    files = [annotations, *(raw_dir / f"{subset}.zip" for subset in subsets if (raw_dir / f"{subset}.zip").is_file())]
    labels = _label_map({n: n for n in range(len(categories) + 1)} | {IGNORED: IGNORED})
    return Layout(("background", *(categories[one] for one in sorted(categories))), labels, splits, files)


LAYOUTS: dict[str, Callable[[Path], Layout]] = {
    "voc": voc, "cityscapes": cityscapes, "ade20k": ade20k, "instances": instances,
}  # fmt: skip


# --- what is written --------------------------------------------------------------------------------------------------


def prepare_masks(layout: str, raw_dir: Path, out_dir: Path, on_bad: str = "error", name: str | None = None) -> None:
    """Write the prepared folder `out_dir`, or go on writing it.

    Args:
        layout: a key of `LAYOUTS`.
        on_bad: `error`, or `skip` to leave out pairs that cannot be used.
        name: of the data set; that of the layout, or of what was rendered, or of `out_dir` if not given.

    Raises:
        UserError: files are missing or damaged, a pair cannot be used, or `out_dir` holds something else.
    """
    if not raw_dir.is_dir():
        raise UserError(f"--raw-dir {raw_dir}: there is no such folder")
    out_dir = out_dir.absolute()
    options = {"layout": layout, "on_bad": on_bad}
    found = LAYOUTS[layout](raw_dir)
    raw_files = [{"name": path.name, "size": path.stat().st_size} for path in found.files]
    if is_made(out_dir, {"raw_files": raw_files, "options": options}):
        return
    with new_folder(out_dir, "--out-dir", resumable=True) as partial:
        work = partial / WORK
        inputs, identity = work / "inputs.json", json.dumps([raw_files, options])
        if not inputs.is_file() or inputs.read_text() != identity:
            clear(partial)
            work.mkdir()
            write_text(inputs, identity)
        counts: dict[str, dict[str, Any]] = {}
        dropped: list[str] = []
        image_id = 0
        for split, pairs in found.splits.items():
            counts[split], image_id = _write_split(split, pairs(work), found, partial, image_id, on_bad, dropped)
            if not counts[split]["images"]:
                raise UserError(f"{raw_dir} has no pictures of {split}: is it the archive of {layout}?")
        write_json(partial / "classes.json", list(found.classes))
        called = name or name_of_rendered(raw_dir) or (out_dir.name if layout == "instances" else layout)
        manifest = {
            "format": FORMAT_VERSION, "kind": "masks", "name": called, "layout": layout, "splits": counts,
            "dropped_items": dropped, "options": options, "raw_files": raw_files,
        }  # fmt: skip
        write_json(partial / "manifest.json", manifest)
    if dropped:
        show(f"left out {len(dropped):,}, the first: {dropped[0]}")
    say_ready(out_dir, counts)


def _write_split(
    split: str, pairs: Iterator[Pair], found: Layout, partial: Path, image_id: int, on_bad: str, dropped: list[str]
) -> tuple[dict[str, Any], int]:
    """Write the pairs of a split in files of so many, of which those that are there are kept."""
    import hashlib

    folder = partial / check_split_name(split, "the archive")
    folder.mkdir(exist_ok=True)
    schema = MASK_FEATURES.arrow_schema
    count = {"images": 0, "sha256": ""}
    names = []
    with tqdm(unit="image", desc=split) as progress:
        for number in range(10**6):
            chosen = list(islice(pairs, _SHARD))
            if not chosen:
                break
            file, record = folder / f"data-{number:05d}.arrow", partial / WORK / f"{split}-{number:05d}.json"
            if not (file.is_file() and record.is_file()):
                bad: list[str] = []
                rows = []
                for place, pair in enumerate(chosen):
                    try:
                        image, mask = _checked(pair, found.labels)
                    except ValueError as error:
                        if on_bad != "skip":
                            raise UserError(
                                f"{split}: {pair.name}: {error}: mend it, or leave it out with --on-bad skip"
                            ) from None
                        bad.append(f"{split}: {pair.name}: {error}")
                        continue
                    rows.append({"image_id": image_id + place, "name": pair.name, "image": image, "mask": mask})
                    progress.update()
                part = file.with_suffix(".part")
                with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
                digest = hashlib.sha256(part.read_bytes()).hexdigest()
                part.rename(file)
                record.write_text(json.dumps({"images": len(rows), "sha256": digest, "bad": bad}))
            else:
                progress.update(len(chosen))
            image_id += len(chosen)
            kept = json.loads(record.read_text())
            count["images"] += kept["images"]
            count["sha256"] = hashlib.sha256((str(count["sha256"]) + kept["sha256"]).encode()).hexdigest()
            dropped += kept["bad"]
            names.append(file.name)
    write_datasets_files(folder, names, str(count["sha256"]), MASK_FEATURES)
    return count, image_id


def _checked(pair: Pair, labels: np.ndarray) -> tuple[bytes, bytes]:
    """A picture's bytes, and its mask as the PNG that is kept.

    Raises:
        ValueError: what is wrong with them.
    """
    try:
        image = pair.image()
        with open_picture(image) as picture:
            picture.load()
            size = picture.size
    except KeyError:
        raise ValueError("the picture is missing") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise ValueError(f"the picture cannot be read ({one_line(str(error))})") from None
    if pair.mask is None:
        return image, b""
    try:
        raw = pair.mask()
    except (KeyError, FileNotFoundError):
        raise ValueError("the mask is missing") from None
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the mask cannot be read ({one_line(str(error))})") from None
    if raw.shape != size[::-1]:
        raise ValueError(f"the mask has {raw.shape[1]} x {raw.shape[0]} pixels and the picture {size[0]} x {size[1]}")
    mapped = labels[raw]
    if (mapped < 0).any():
        values = sorted(set(raw[mapped < 0].tolist()))
        raise ValueError(f"the mask has the label value {values[0]}, which the data set does not have")
    file = io.BytesIO()
    Image.fromarray(mapped.astype(np.uint8)).save(file, "PNG")
    return image, file.getvalue()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.segmentation", description=__doc__.splitlines()[0])
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the archives")
    parser.add_argument("--out-dir", type=Path, required=True, help="folder to make")
    parser.add_argument("--on-bad", choices=("error", "skip"), default="error", help="pairs that cannot be used")
    arguments = parser.parse_args()
    prepare_masks(arguments.layout, arguments.raw_dir, arguments.out_dir, arguments.on_bad)


if __name__ == "__main__":
    run_cli(main)
