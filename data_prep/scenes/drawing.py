"""What all layouts of scenes are made with: images with their instances, several processes, and files."""

from __future__ import annotations

import io
import json
import multiprocessing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from data_prep.scenes.render import Mask, SceneObject, SceneSize, render

ID_STEP = 1_000_000  # image ids of a split start one above a multiple of this
INFO = {"description": "rendered scenes of colored shapes (vlabs data_prep.scenes)"}

AnyTask = TypeVar("AnyTask")
Made = TypeVar("Made")


class Drawn(NamedTuple):
    """A rendered image and its COCO instances, as JSON."""

    jpeg: bytes
    instances: list[str]


def draw(objects: list[SceneObject], size: SceneSize, image_id: int, rng: Random) -> Drawn | None:
    """The image of a scene; None if one of its objects shows too little."""
    drawn = render(objects, size.image_size, rng)
    if drawn is None:
        return None
    image, masks = drawn
    instances = []
    for index, (item, mask) in enumerate(zip(objects, masks, strict=True)):
        looks = {"shape": item.shape, "color": item.color, "size": item.size, "fill": item.fill}
        one = instance(mask, instance_id(image_id, index), image_id, size.shapes.index(item.shape) + 1)
        instances.append(json.dumps(one | {"attributes": looks}))
    return Drawn(as_jpeg(image), instances)


def as_jpeg(pixels: np.ndarray) -> bytes:
    """An image (rows, columns, 3) of 8 bits as a file."""
    jpeg = io.BytesIO()
    Image.fromarray(pixels).save(jpeg, "JPEG", quality=92, subsampling=0)
    return jpeg.getvalue()


def instance_id(image_id: int, index: int) -> int:
    """The COCO annotation id of a scene's object."""
    return image_id * 100 + index


def instance(mask: Mask, annotation_id: int, image_id: int, category: int) -> dict[str, Any]:
    """COCO's annotation of an object, from its pixels; these are down the columns in run lengths, first of zeros."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    x, y = int(columns[0]), int(rows[0])
    pixels = np.concatenate(([False], mask.ravel(order="F")))
    borders = np.flatnonzero(pixels[1:] != pixels[:-1])
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": category,
        "bbox": [x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y],
        "area": int(np.count_nonzero(mask)),
        "iscrowd": 0,
        "segmentation": {
            "size": list(mask.shape),
            "counts": np.diff(borders, prepend=0, append=mask.size).tolist(),
        },
    }


def mapped(make: Callable[[AnyTask], Made], tasks: Sequence[AnyTask], workers: int) -> Iterator[Made]:
    """What is made of tasks, in their order, by several processes."""
    if workers == 1:
        yield from map(make, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(make, tasks, chunksize=16)


def add_instances(
    archive: zipfile.ZipFile, subset: str, size: SceneSize, names: Mapping[int, str], instances: Iterable[str]
) -> None:
    """Add the instances of some images, whose names are by their ids."""
    shapes, side = size.shapes, size.image_size
    header = {
        "info": INFO,
        "categories": [{"id": n + 1, "name": shape, "supercategory": "shape"} for n, shape in enumerate(shapes)],
        "images": [{"id": n, "file_name": name, "width": side, "height": side} for n, name in names.items()],
    }
    add_json(archive, f"annotations/instances_{subset}.json", header, "annotations", instances)


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
