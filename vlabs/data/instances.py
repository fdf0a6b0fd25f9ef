"""Target masks of prepared data: COCO instances by annotation id, cropped and resized like the model's input.

Prepared rows name the instances that a question or caption is about (`target_instances`). Their masks stay in the raw
data, in COCO's instances files: `annotations.zip` of the scenes, `annotations_trainval2014.zip` of COCO.
"""

from __future__ import annotations

import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from vlabs.errors import UserError
from vlabs.utils.archives import entries, open_zip
from vlabs.utils.json_file import JsonFile

_NAME = re.compile(r"(^|/)instances[^/]*\.json$")
# How far a polygon may reach outside its image, in multiples of the image's longer side.
_FAR = 100


@dataclass(frozen=True)
class Instance:
    """One annotated object; its mask is decoded on demand.

    Attributes:
        annotation_id: COCO's id of the annotation.
        image_id: COCO's id of the image.
        area: area of the mask in pixels, as given in the file.
        height, width: size of the image.
        segmentation: as in the file: run lengths, or a list of polygons.
    """

    annotation_id: int
    image_id: int
    area: float
    height: int
    width: int
    segmentation: Any

    def mask(self) -> np.ndarray:
        """The object's pixels, (height, width) bool.

        Raises:
            UserError: the segmentation is not in one of COCO's formats.
        """
        try:
            if isinstance(self.segmentation, Mapping):
                return decode_run_lengths(self.segmentation["counts"], self.height, self.width)
            return fill_polygons(self.segmentation, self.height, self.width)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the segmentation of instance {self.annotation_id} cannot be read: {error}") from None


def read_instances(path: str | Path, wanted_ids: Iterable[int]) -> dict[int, Instance]:
    """Find instances by annotation id in COCO's instances files, which are read as a stream.

    Args:
        path: a JSON file, or a zip file with any number of `instances_*.json`. The smallest file is searched first, and
            reading ends when all ids are found. Image sizes are read only for polygons.
        wanted_ids: annotation ids; they may repeat.

    Returns:
        The instances by annotation id.

    Raises:
        UserError: the file is missing, damaged or of another kind, or an id is not found.
    """
    missing = set(wanted_ids)
    found: dict[int, Instance] = {}
    for file in _files(path):
        here: dict[int, dict[str, Any]] = {}
        for entry in _annotations(file) if missing else ():
            if entry["id"] in missing:
                here[entry["id"]] = entry
                if len(here) == len(missing):
                    break
        of_polygons = {entry["image_id"] for entry in here.values() if isinstance(entry["segmentation"], list)}
        sizes = _image_sizes(file, of_polygons)
        found |= {annotation_id: _instance(entry, sizes, file) for annotation_id, entry in here.items()}
        missing -= here.keys()
    if missing:
        listed = ", ".join(str(annotation_id) for annotation_id in sorted(missing)[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(f"{path} has no instance {listed}{more}: do these annotations belong to the prepared data?")
    return found


def list_annotations(path: str | Path | JsonFile) -> Iterator[dict[str, Any]]:
    """Yield all annotations of COCO's instances files, unchanged, read as a stream.

    Args:
        path: as in `read_instances`, or one file inside a zip file.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    for file in _files(path):
        yield from _annotations(file)


def list_categories(path: str | Path | JsonFile) -> dict[int, str]:
    """Category names in COCO's instances files, by id.

    Args:
        path: as in `list_annotations`.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    names: dict[int, str] = {}
    for file in _files(path):
        for entry in file.items("categories.item"):
            if not isinstance(entry, dict) or not isinstance(entry.get("id"), int):
                raise UserError(f"{file}: a category has no 'id'")
            names[entry["id"]] = str(entry.get("name", ""))
    return names


def decode_run_lengths(counts: str | Iterable[int], height: int, width: int) -> np.ndarray:
    """Decode COCO's run lengths to a mask: alternating runs of 0 and 1, starting with 0, column by column.

    Args:
        counts: the run lengths, or COCO's compressed string of them.
        height, width: size of the mask.

    Returns:
        (height, width) bool

    Raises:
        ValueError: the runs are not whole numbers of 0 or more that fill the mask exactly.
    """
    # Not pycocotools: if the runs are too short, it leaves the rest of the mask uninitialized.
    runs = np.asarray(_uncompressed(counts) if isinstance(counts, str) else list(counts))
    if runs.ndim != 1 or not np.issubdtype(runs.dtype, np.integer) or (runs < 0).any():
        raise ValueError("run lengths must be whole numbers, 0 or more")
    if runs.sum() != height * width:
        raise ValueError(f"the run lengths add up to {runs.sum()} pixels, but the image has {height}x{width}")
    values = np.arange(len(runs)) % 2 == 1
    # Column by column, so rows of the transposed mask.
    return values.repeat(runs).reshape(width, height).T


def _uncompressed(text: str) -> list[int]:
    """Decode COCO's compressed string to run lengths.

    Each character code minus 48 is six bits: five bits of a number, lowest first, and a flag (32) if more follow. The
    top bit of the last five is the sign. From the fourth run on, a number is the difference to the run two before.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} cannot occur in compressed run lengths")
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    if shift:
        raise ValueError("the compressed run lengths end within a number")
    return runs


def fill_polygons(polygons: Sequence[Sequence[float]], height: int, width: int) -> np.ndarray:
    """The pixels inside any of the polygons, as drawn by COCO's own tools. Polygons that cannot be drawn are ignored.

    Pixel (row, column) covers [column, column + 1) x [row, row + 1).

    Args:
        polygons: flat lists x1, y1, x2, y2, ..., in pixels; three corners or more.
        height, width: size of the mask.

    Returns:
        (height, width) bool

    Raises:
        ValueError: none of the polygons can be drawn.
    """
    faults = [fault_of_polygon(polygon, height, width) for polygon in polygons]
    good = [polygon for polygon, fault in zip(polygons, faults, strict=True) if fault is None]
    if not good:
        if faults:
            raise ValueError(faults[0])
        return np.zeros((height, width), dtype=bool)
    runs = coco_mask.frPyObjects([[float(n) for n in polygon] for polygon in good], height, width)
    return np.asarray(coco_mask.decode(coco_mask.merge(runs)), dtype=bool)


def fault_of_polygon(polygon: Sequence[float], height: int, width: int) -> str | None:
    """Why a polygon cannot be drawn; None if it can."""
    try:
        corners = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        corners = np.zeros(0)
    if corners.ndim != 1 or len(corners) < 6 or len(corners) % 2 or not np.isfinite(corners).all():
        return "a polygon must be a list of three or more pairs of numbers"
    # pycocotools draws the outline pixel by pixel, also outside the image: a far corner would take hours.
    if (reach := np.abs(corners).max()) > _FAR * max(height, width):
        return f"a polygon reaches to {reach:g}, but the image has {height}x{width}"
    if np.linalg.matrix_rank(corners.reshape(-1, 2) - corners[:2]) < 2:
        return "a polygon has no area: its corners are on one line"
    return None


# --- the geometry of the model's input -----------------------------------------------------------------------------


def crop_map(
    values: np.ndarray, image_size: int, grid: tuple[int, int] | None = None, crop_mode: str = "center"
) -> np.ndarray:
    """Crop and resize a map over a whole image to the part that the model sees, as `Preprocessing.resize` does.

    Args:
        values: (H, W), over the image's own pixels, or over a smaller or larger copy of the image.
        image_size: side of the model's input in pixels.
        grid: rows and columns of patches of the model's input; None for its pixels.
        crop_mode: as in `Preprocessing`.

    Returns:
        (rows, columns), float64: the mean over the area that each patch or pixel covers.

    Raises:
        ValueError: the model's input is not a whole number of patches high and wide.
    """
    height, width = values.shape
    rows, columns = grid or (image_size, image_size)
    if image_size % rows or image_size % columns:
        raise ValueError(f"{rows}x{columns} patches do not tile an input of {image_size} pixels")
    down, across = _crop_weights(height, width, image_size, rows, columns, crop_mode)
    # Whole numbers until the end, so that a mask's half is exactly a half.
    area = height * width * (image_size // rows) * (image_size // columns)
    return np.asarray(down @ values @ across / area)


@lru_cache(maxsize=256)  # images of one dataset have few sizes
def _crop_weights(
    height: int, width: int, image_size: int, rows: int, columns: int, crop_mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """Whole-number matrices that `crop_map` multiplies a map by: (rows, H) on the left, (W, columns) on the right."""
    new_height = new_width = image_size
    if crop_mode == "center":
        short = min(height, width)
        # Rounded as in torchvision: down for the longer side, Python's `round` for the border that is cut off.
        new_height, new_width = image_size * height // short, image_size * width // short
    top, left = round((new_height - image_size) / 2), round((new_width - image_size) / 2)
    down = _overlaps(height, new_height, top, image_size // rows, rows)
    across = _overlaps(width, new_width, left, image_size // columns, columns)
    return down, across.T.copy()


def crop_mask(mask: np.ndarray, image_size: int, crop_mode: str = "center") -> np.ndarray:
    """Crop and resize a mask over a whole image to the part that the model sees.

    Args:
        mask: (H, W), bool or in [0, 1], over the image's own pixels, or over a smaller or larger copy of it.
        image_size: side of the model's input in pixels.
        crop_mode: as in `Preprocessing`.

    Returns:
        (image_size, image_size) bool: the pixels of which the mask covers more than half. It is empty if the target
        lies outside the crop or is thinner than a pixel.
    """
    return crop_map(mask, image_size, crop_mode=crop_mode) > 0.5


def resize_area(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize maps to any size, larger or smaller: each new pixel is the mean over the area that it covers.

    Sums of whole numbers are exact, so that the result is rounded only once.

    Args:
        values: (..., H, W).
        height, width: the new size.

    Returns:
        (..., height, width), float64
    """
    old_height, old_width = values.shape[-2:]
    if (old_height, old_width) == (height, width):
        return values.astype(np.float64)
    summed = _overlaps(old_height, height) @ values.astype(np.float64) @ _overlaps(old_width, width).T
    return np.asarray(summed / (old_height * old_width))


def _overlaps(old: int, new: int, first: int = 0, step: int = 1, count: int | None = None) -> np.ndarray:
    """How much of each old pixel lies in each new cell, (count, old), in whole units of 1 / new of an old pixel.

    Args:
        old, new: number of pixels of the same length before and after resizing.
        first: the new pixel at which the first cell begins.
        step: new pixels per cell.
        count: number of cells; None for one per new pixel.
    """
    # Both grids in units of 1 / (old · new) of the length, where all edges are whole numbers.
    new_edges = (first + step * np.arange((new if count is None else count) + 1)) * old
    old_edges = np.arange(old + 1) * new
    ends = np.minimum(new_edges[1:, None], old_edges[None, 1:])
    starts = np.maximum(new_edges[:-1, None], old_edges[None, :-1])
    return np.asarray((ends - starts).clip(0).astype(np.float64))


# --- the files -----------------------------------------------------------------------------------------------------


def _files(path: str | Path | JsonFile) -> list[JsonFile]:
    """The JSON files to read: the instances files of a zip file, smallest first, or the file itself."""
    if isinstance(path, JsonFile):
        return [path]
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}: name COCO's annotations, such as a corpus's annotations.zip")
    if path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
        return [JsonFile(path)]
    with open_zip(path) as archive:
        inside = [(info.file_size, info.filename) for name, info in entries(archive) if _NAME.search(name)]
    if not inside:
        raise UserError(f"{path} holds no COCO instances (no instances_*.json)")
    return [JsonFile(path, member) for _, member in sorted(inside)]


def _annotations(file: JsonFile) -> Iterator[dict[str, Any]]:
    """Yield the annotations of one file."""
    number = -1
    for number, entry in enumerate(file.items("annotations.item", floats=True)):
        if not (isinstance(entry, dict) and all(isinstance(entry.get(name), int) for name in ("id", "image_id"))):
            raise UserError(f"{file}: annotation {number} needs 'id' and 'image_id'")
        if not isinstance(entry.get("segmentation"), dict | list):  # e.g. an annotation with only a box
            entry["segmentation"] = []
        yield entry
    if number < 0:
        raise UserError(f"{file} has no 'annotations': it is not a file of COCO instances")


def _image_sizes(file: JsonFile, wanted: set[int]) -> dict[int, tuple[int, int]]:
    """(height, width) of the wanted images in one file."""
    sizes: dict[int, tuple[int, int]] = {}
    for entry in file.items("images.item") if wanted else ():
        if isinstance(entry, dict) and entry.get("id") in wanted:
            sizes[entry["id"]] = (entry.get("height", 0), entry.get("width", 0))
            if len(sizes) == len(wanted):
                break
    return sizes


def _instance(entry: dict[str, Any], sizes: dict[int, tuple[int, int]], file: JsonFile) -> Instance:
    segmentation = entry["segmentation"]
    size = segmentation.get("size") if isinstance(segmentation, dict) else sizes.get(entry["image_id"])
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise UserError(f"{file}: instance {entry['id']} has no image with a height and a width")
    return Instance(entry["id"], entry["image_id"], float(entry.get("area") or 0), size[0], size[1], segmentation)


def count_instances(path: str | Path) -> dict[int, int]:
    """Count the instances per image, by image id, in COCO's instances files.

    Args:
        path: as in `read_instances`.

    Raises:
        UserError: the file is missing, damaged or of another kind.
    """
    return dict(Counter(entry["image_id"] for entry in list_annotations(path)))
