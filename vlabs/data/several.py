"""Images with objects of several classes, to ask a classifier for one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageOps

from vlabs.data.images import name_of, read_bytes
from vlabs.data.instances import Instance
from vlabs.data.preprocessing import Preprocessing, decode_image
from vlabs.errors import UserError
from vlabs.utils.archives import read_regular


@dataclass
class Several:
    """An image with several classes, cropped and resized for the model.

    Attributes:
        image: the square that the model sees.
        labels: the classes in it, each once.
        masks: (size, size) bool, the pixels of each class.
    """

    image: Image.Image
    labels: list[int]
    masks: list[np.ndarray]


def side_by_side(images: Sequence[Image.Image], size: int) -> Image.Image:
    """Put two whole images next to each other on a gray square; the longer side of each is half the square's."""
    both, half = Image.new("RGB", (size, size), (127, 127, 127)), size // 2
    for image, corner in zip(images, (0, size - half), strict=True):
        small = ImageOps.contain(image.convert("RGB"), (half, half), Image.Resampling.BICUBIC)
        both.paste(small, (corner + (half - small.width) // 2, (size - small.height) // 2))
    return both


def pairs(rows: datasets.Dataset, preprocessing: Preprocessing, count: int, seed: int) -> Iterator[Several]:
    """Yield pairs of images of different classes, side by side. The mask of a class is the area of its image.

    Args:
        rows: prepared rows with a class.
        preprocessing: of the model.
        count: number of pairs.
        seed: seed of the choice of images.

    Raises:
        UserError: all images are of one class, or one of them cannot be read.
    """
    labels = np.asarray(rows["label"])
    if len(np.unique(labels)) < 2:
        raise UserError("pairs need images of two classes, but all images are of one class")
    rng = np.random.default_rng(seed)
    size = preprocessing.image_size
    half, top = size // 2, (size - size // 2) // 2
    for _ in range(count):
        first = int(rng.integers(len(rows)))
        second = int(rng.choice(np.flatnonzero(labels != labels[first])))
        both = [rows[n] for n in (first, second)]
        seen = [preprocessing.resize(decode_image(read_bytes(row), name_of(row))) for row in both]
        masks = [np.zeros((size, size), dtype=bool) for _ in range(2)]
        masks[0][top : top + half, :half] = masks[1][top : top + half, size - half :] = True
        yield Several(side_by_side(seen, size), [int(labels[first]), int(labels[second])], masks)


def read_several(
    folder: str | Path, preprocessing: Preprocessing, count: int | None = None
) -> list[tuple[Path, dict[int, list[Instance]]]]:
    """Find the images with several classes in a folder of COCO's layout: images, and `instances.json`.

    Args:
        folder: the folder; `file_name`s in `instances.json` are relative to it, and its categories are named like the
            model's classes.
        preprocessing: has the names of the model's classes.
        count: number of images with at least two classes, evenly spread; None for all.

    Returns:
        The path of each image, and its instances by class. Instances of other classes are left out.

    Raises:
        UserError: the file is missing or damaged, or no image shows two classes of the model.
    """
    path = Path(folder) / "instances.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        names = {entry["id"]: str(entry["name"]) for entry in content["categories"]}
        images = {entry["id"]: entry for entry in content["images"]}
        found: dict[int, dict[int, list[Instance]]] = {}
        label_of = {name: label for label, name in enumerate(preprocessing.names)}
        for entry in content["annotations"]:
            label, image = label_of.get(names[entry["category_id"]]), images[entry["image_id"]]
            if label is not None and not entry.get("iscrowd"):
                instance = Instance(
                    entry["id"], image["id"], entry["area"], image["height"], image["width"], entry["segmentation"]
                )
                found.setdefault(image["id"], {}).setdefault(label, []).append(instance)
        shown = [
            (Path(folder) / images[n]["file_name"], by_class) for n, by_class in found.items() if len(by_class) > 1
        ]
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): it must list the objects of the images in this folder"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not an instances file of COCO: {error!r}") from None
    if not shown:
        raise UserError(f"{path}: no image shows two classes of the model, whose names are {', '.join(label_of)[:80]}")
    if count is not None and count < len(shown):
        shown = [shown[n] for n in np.linspace(0, len(shown) - 1, num=count, dtype=int)]
    return shown


def open_several(path: Path, by_class: dict[int, list[Instance]], preprocessing: Preprocessing) -> Several | None:
    """Open an image of `read_several` with its masks; None if the crop shows fewer than two of its classes.

    Raises:
        UserError: it cannot be read, or does not have the size that `instances.json` says.
    """
    try:
        image = decode_image(read_regular(path), str(path))
    except OSError as error:
        raise UserError(f"image {path} cannot be read: {error.strerror}") from None
    labels, masks = [], []
    said = next(iter(by_class.values()))[0]
    if image.size != (said.width, said.height):
        raise UserError(
            f"image {path} has {image.width}x{image.height} pixels, but instances.json says {said.width}x{said.height}"
        )
    for label, instances in by_class.items():
        mask = np.logical_or.reduce([instance.mask() for instance in instances])
        seen = _seen(mask, preprocessing)
        if seen.any():
            labels.append(label)
            masks.append(seen)
    return Several(preprocessing.resize(image), labels, masks) if len(labels) > 1 else None


def _seen(mask: np.ndarray, preprocessing: Preprocessing) -> np.ndarray:
    """Crop and resize a mask over a whole image to what the model sees."""
    return np.asarray(preprocessing.resize(Image.fromarray(mask.astype(np.uint8) * 255))) > 127
