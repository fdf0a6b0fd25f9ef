"""Benchmarks of conditional retrieval in the files of their authors: CORE and GeneCIS."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError, one_line
from vlabs.utils.archives import read_regular, walk
from vlabs.utils.json_file import JsonFile, check_value, get_objects, get_value

_DILATION = 0.7  # of GeneCIS's boxes


class Query(NamedTuple):
    """An image and a text, and the images of which one should be the nearest under this text.

    Attributes:
        id: what the image is called.
        text: the text.
        reference: the image.
        gallery: images to be ranked.
        right: those that hold what was asked for.
        excluded: those of the gallery that are not ranked, such as the image itself.
    """

    id: int | str
    text: str
    reference: int
    gallery: np.ndarray
    right: np.ndarray
    excluded: Sequence[int]


@dataclass
class Gallery:
    """Images by number, and what is asked of them.

    Attributes:
        count: number of images.
        read: reads one.
        queries: what is asked.
        ranks: the k of recall at k; precision at 1 is recall at 1.
        notes: what was left out.
    """

    count: int
    read: Callable[[int], Any]
    queries: list[Query] = field(default_factory=list)
    ranks: tuple[int, ...] = (1,)
    notes: list[str] = field(default_factory=list)


def read_benchmark(source: str | Path, pictures: Sequence[str | Path]) -> Gallery:
    """CORE, of a folder with its parquet files, or GeneCIS, of one of its JSON files.

    Args:
        source: folder or file.
        pictures: folders with the images of GeneCIS.

    Raises:
        UserError: something is missing, or not as its authors have it.
    """
    source = Path(source)
    if source.suffix.lower() == ".json":
        return _genecis(source, [Path(one) for one in pictures])
    return _core(source)


def _core(folder: Path) -> Gallery:
    """CORE: rows of `image`, `image_id` (the image that an object was put into), `scene`, `object`, `prompt`.

    Under the prompt of an object, the nearest image of the same scene should have it too. Variants of the same image
    are not ranked, and an object that no other image has is not asked for, as in the authors' evaluation.
    """
    if not folder.is_dir():
        raise UserError(f"task.source={folder}: there is no such folder, and it is no JSON file of GeneCIS")
    files = [path for path in walk(folder) if path.suffix.lower() == ".parquet"]
    files = [path for path in files if path.name.startswith("test")] or files
    splits = sorted({found[0] for path in files if (found := re.match("train|val|dev", path.name))})
    if len(splits) > 1:
        raise UserError(
            f"task.source={folder} has parquet files of {' and '.join(splits)}, and none of test: name a folder with "
            "those of one split"
        )
    if not files:
        raise UserError(f"task.source={folder} has no parquet files: download CORE (the dataset, not its code)")
    places: list[tuple[Path, int, int]] = []
    rows: list[dict[str, str]] = []
    known: dict[tuple[str, str, str], str] = {}
    for path in files:
        for group in range(_parquet(path).num_row_groups):
            part = _group(path, group, ["image_id", "scene", "object", "prompt"]).to_pylist()
            for n, row in enumerate(part):
                where = f"{path}, row {n} of row group {group}"
                for name, value in row.items():
                    check_value(where, name, value, str)
                same_row = (row["scene"], row["object"], row["image_id"])
                if (before := known.setdefault(same_row, where)) != where:
                    raise UserError(f"{where}: {'/'.join(same_row)} is {before} too: leave one out")
                rows.append(row)
                places.append((path, group, n))
    last: dict[tuple[Path, int], pa.Table] = {}

    def read(number: int) -> Image.Image:
        path, group, n = places[number]
        if (path, group) not in last:
            last.clear()
            last[path, group] = _group(path, group, ["image"])
        image = last[path, group]["image"][n].as_py()
        content = image.get("bytes") if isinstance(image, dict) else None
        if not content:
            raise UserError(f"{path}: image {n} of row group {group} is not in the file: download CORE again")
        return decode_image(content, f"{path}, image {rows[number]['image_id']}")

    gallery = Gallery(len(rows), read)
    scenes, same, alike = defaultdict(list), defaultdict(list), defaultdict(list)
    prompts: dict[tuple[str, str], str] = {}
    for n, row in enumerate(rows):
        if not row["prompt"].strip():
            raise UserError(f"{folder}: the prompt of image {row['image_id']} is empty")
        scene, key = row["scene"], (row["scene"], row["object"])
        if prompts.setdefault(key, row["prompt"]) != row["prompt"]:
            raise UserError(f"{folder}: {key[1]} in {scene} has two prompts: '{prompts[key]}' and '{row['prompt']}'")
        scenes[scene].append(n)
        same[scene, row["image_id"]].append(n)
        alike[key].append(n)
    alone = 0
    for (scene, name), members in sorted(alike.items()):
        everything, right = np.array(scenes[scene]), np.array(members)
        for n in members:
            variants = same[scene, rows[n]["image_id"]]
            if np.isin(right, variants).all():
                alone += 1
                continue
            text = prompts[scene, name]
            gallery.queries.append(Query(f"{scene}/{name}/{rows[n]['image_id']}", text, n, everything, right, variants))
    if alone:
        gallery.notes.append(f"{alone:,} images are not asked about: no other image of their scene has their object")
    return gallery


def _parquet(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet ({one_line(str(error))}): download it again") from None


def _group(path: Path, group: int, columns: Sequence[str]) -> pa.Table:
    file = _parquet(path)
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise UserError(f"{path} has no column '{missing[0]}', so it is not CORE: {', '.join(file.schema_arrow.names)}")
    try:
        return file.read_row_group(group, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged ({one_line(str(error))}): download it again") from None


def _genecis(file: Path, folders: Sequence[Path]) -> Gallery:
    """GeneCIS: templates of `reference`, `condition`, `target` and `gallery`; images by `val_image_id` of COCO, or by
    `image_id` and `instance_bbox` of Visual Genome. The target is to be found among the gallery.
    """
    if not file.is_file():
        raise UserError(f"task.source={file}: there is no such file")
    if not folders:
        raise UserError(f"task.source={file} names images of COCO or Visual Genome: pass task.pictures=[FOLDER,...]")
    found: dict[tuple[str, tuple[float, ...]], int] = {}

    def number(entry: dict[str, Any], where: str) -> int:
        return found.setdefault(_picture(entry, where), len(found))

    def named(number: int) -> str:
        name, box = list(found)[number]
        return f"{name}, box {list(box)}," if box else name

    gallery = Gallery(0, lambda n: None, ranks=(1, 2, 3))
    repeated: list[str] = []
    for n, entry in enumerate(JsonFile(file).entries(floats=True)):
        where = f"{file}: template {n}"
        text = get_value(entry, "condition", where, str)
        if not text.strip():
            raise UserError(f"{where}: its 'condition' is empty")
        reference, target = (number(get_value(entry, key, where, dict), where) for key in ("reference", "target"))
        others = [number(one, where) for one in get_objects(entry, "gallery", where)]
        if not others:
            raise UserError(f"{where}: its 'gallery' is empty, so its target has nothing to be ranked among")
        if reference == target:
            raise UserError(f"{where}: {named(target)} is its 'reference' and its 'target', so nothing is searched for")
        once = [one for one in dict.fromkeys(others) if one not in (reference, target)]
        if len(once) < len(others):
            repeated.append(where)
        if not once:
            raise UserError(f"{where}: its 'gallery' has no image but its 'reference' and 'target'")
        gallery.queries.append(Query(n, text, reference, np.array([target, *once]), np.array([target]), ()))
    if not gallery.queries:
        raise UserError(f"{file} has no templates")
    if repeated:
        gallery.notes.append(
            f"{len(repeated):,} templates have an image twice, which is ranked once; the first is {repeated[0]}"
        )
    paths: list[Path | None] = []
    for name, _ in found:
        paths.append(next((folder / name for folder in folders if (folder / name).is_file()), None))
    if missing := [name for (name, _), path in zip(found, paths, strict=True) if path is None]:
        given = ",".join(map(str, folders))
        raise UserError(
            f"{file}: {missing[0]} and {len(missing) - 1:,} more of {len(found):,} images are not in "
            f"task.pictures=[{given}]: name COCO's val2017, or Visual Genome's VG_100K and VG_100K_2"
        )
    pictures = list(found)

    def read(n: int) -> Image.Image:
        path, (_, box) = paths[n], pictures[n]
        assert path is not None
        try:
            image = decode_image(read_regular(path), str(path))
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        return _part(image, box, str(path)) if box else image

    gallery.count, gallery.read = len(found), read
    return gallery


def _picture(entry: dict[str, Any], where: str) -> tuple[str, tuple[float, ...]]:
    """The file of an image of GeneCIS, and its box (left, top, width, height) or nothing."""
    if "val_image_id" in entry:
        if (image_id := get_value(entry, "val_image_id", where, int)) < 0:
            raise UserError(f"{where}: 'val_image_id' is {image_id}, which is no image of COCO")
        return f"{image_id:012d}.jpg", ()
    name = str(get_value(entry, "image_id", where, int, str))
    box = get_value(entry, "instance_bbox", where)
    if (
        not name.isdecimal()
        or not isinstance(box, list)
        or len(box) != 4
        or not all(type(one) in (int, float) for one in box)
        or min(box[2:]) <= 0
    ):
        raise UserError(f"{where} has an image {name} with the box {box}: it must be [left, top, width, height]")
    return f"{name}.jpg", tuple(box)


def _part(image: Image.Image, box: Sequence[float], name: str) -> Image.Image:
    """What GeneCIS shows of an image: a box that begins 0.7 of its size before, made square with black."""
    if box[0] + box[2] <= 0 or box[1] + box[3] <= 0 or box[0] >= image.width or box[1] >= image.height:
        raise UserError(f"{name}: the box {list(box)} is not in the image, which is {image.width} x {image.height}")
    left, top = (max(0.0, start - _DILATION * size) for start, size in zip(box[:2], box[2:], strict=True))
    right = min(image.width, left + (1 + _DILATION) * box[2])
    bottom = min(image.height, top + (1 + _DILATION) * box[3])
    if round(right) <= round(left) or round(bottom) <= round(top):
        raise UserError(f"{name}: the box {list(box)} is too small to be seen")
    part = image.crop(tuple(round(one) for one in (left, top, right, bottom)))  # type: ignore[arg-type]
    side = max(part.size)
    square = Image.new("RGB", (side, side))
    square.paste(part, ((side - part.width) // 2, (side - part.height) // 2))
    return square
