"""What all layouts of scenes are made with: pictures with their instances, several processes, and files."""

from __future__ import annotations

import io
import json
import multiprocessing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from data_prep.scenes.render import Mask, SceneObject, SceneSize, render

ID_STEP = 1_000_000  # image ids of a split start one above a multiple of this
INFO = {"description": "rendered scenes of coloured shapes (vlabs data_prep.scenes)"}

AnyTask = TypeVar("AnyTask")
Made = TypeVar("Made")


class Drawn(NamedTuple):
    """A rendered picture and its COCO instances, as JSON."""

    jpeg: bytes
    instances: list[str]


def draw(objects: list[SceneObject], size: SceneSize, image_id: int, rng: Random) -> Drawn | None:
    """The picture of a scene; None if one of its objects shows too little."""
    drawn = render(objects, size.image_size, rng)
    if drawn is None:
        return None
    image, masks = drawn
    jpeg = io.BytesIO()
    Image.fromarray(image).save(jpeg, "JPEG", quality=92, subsampling=0)
    instances = [
        json.dumps(_instance(item, mask, instance_id(image_id, index), image_id, size.shapes))
        for index, (item, mask) in enumerate(zip(objects, masks, strict=True))
    ]
    return Drawn(jpeg.getvalue(), instances)


def instance_id(image_id: int, index: int) -> int:
    """The COCO annotation id of a scene's object."""
    return image_id * 100 + index


def _instance(
    item: SceneObject, mask: Mask, annotation_id: int, image_id: int, shapes: tuple[str, ...]
) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": shapes.index(item.shape) + 1,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(np.count_nonzero(mask)),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
        "attributes": {"shape": item.shape, "color": item.color, "size": item.size, "fill": item.fill},
    }


def run_lengths(mask: Mask) -> list[int]:
    """COCO's uncompressed run lengths: down the columns, the first run being of zeros, perhaps none."""
    pixels = np.concatenate(([False], mask.ravel(order="F")))
    borders = np.flatnonzero(pixels[1:] != pixels[:-1])
    lengths: list[int] = np.diff(borders, prepend=0, append=mask.size).tolist()
    return lengths


@contextmanager
def mapped(make: Callable[[AnyTask], Made], tasks: Sequence[AnyTask], workers: int) -> Iterator[Iterable[Made]]:
    """What is made of tasks, in their order, by several processes."""
    if workers == 1:
        yield map(make, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap(make, tasks, chunksize=16)


def new_zip(path: Path) -> zipfile.ZipFile:
    """A new zip file, whose bytes are to depend on nothing but the content."""
    return zipfile.ZipFile(path, "w")


def add_json(archive: zipfile.ZipFile, name: str, header: dict[str, Any], key: str, items: Iterable[str]) -> None:
    """Add a JSON file: the header with one more key, a list of items that are JSON already."""
    member = zipfile.ZipInfo(name)  # dated 1980, so that the bytes depend on nothing but the content
    member.compress_type = zipfile.ZIP_DEFLATED
    with archive.open(member, "w") as stream:
        write_list(stream, header, key, items)


def write_list(stream: IO[bytes], header: dict[str, Any], key: str, items: Iterable[str]) -> None:
    """The header with one more key, a list of items that are JSON already: a large corpus's list is not built twice."""
    stream.write(json.dumps(header)[:-1].encode() + b", " + json.dumps(key).encode() + b": [")
    for number, item in enumerate(items):
        stream.write((", " if number else "").encode() + item.encode())
    stream.write(b"]}\n")
