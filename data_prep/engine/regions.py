"""Regions, the parts of images that texts are about: from boxes, instances and mask files to one map per text.

On its way through the index a region is one of these, as JSON:

    {"box": [x, y, width, height]}           in pixels, from the image's top left corner; perhaps with
                                             "size": [height, width] of the image that it is meant for
    {"segmentation": ...}                    COCO's: polygons, or run lengths with their size
    {"maps": [[file, member or null], ...]}  images of where it is, bright or not, of which the mean is taken

A prepared row keeps, for every text, a PNG of the whole image, in which white is what the text is about.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlabs.data.decoding import read_gray
from vlabs.data.instances import Instance, fault_of_polygon
from vlabs.errors import UserError
from vlabs.utils.archives import open_zip, read_member, read_regular

# In the order in which they are looked for: of the scenes, of COCO 2014, and COCO's unpacked.
_INSTANCES = ("annotations.zip", "annotations_trainval2014.zip")
_SAME_ASPECT = 0.02


def find_instances(raw_dir: Path) -> list[Path]:
    """The files of COCO's instances in a folder of raw data, zipped or not; they may be none."""
    for name in _INSTANCES:
        if (raw_dir / name).is_file():
            return [raw_dir / name]
    return sorted([*raw_dir.glob("instances_*.json"), *raw_dir.glob("annotations/instances_*.json")])


def describe_files(files: Mapping[str, Path]) -> dict[str, Any]:
    """The number and the hash of files with regions, by their names: an option that changes when one of them does.

    A file that is not there counts as one: when its region is drawn, it is noted as bad.
    """
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        try:
            content = hashlib.sha256(read_regular(path)).hexdigest()
        except (OSError, ValueError):  # ValueError: no file system takes such a name
            content = "missing"
        digest.update(f"{content} {name!r}\n".encode())
    return {"files": len(files), "sha256": digest.hexdigest()}


_BITS = 8  # of a pixel


class Degenerate(ValueError):
    """A region that cannot be drawn, and does not say that anything else is wrong."""


def draw_regions(regions: Sequence[Mapping[str, Any]], width: int, height: int) -> tuple[bytes, list[str]]:
    """The union of some regions of an image, as a PNG: 1 bit a pixel for masks, 8 for maps.

    If they are of several phrases of a text, the PNG has a palette. Bit p of a pixel's index says that phrase p names
    it (the last bit stands for all further phrases), and every index but 0 is white, so that it reads as the union.

    Args:
        regions: see the module; those of the second phrase and so on say so by their number, `phrase`.
        width, height: of the image as it is seen.

    Returns:
        The PNG, empty bytes where nothing can be drawn; and why boxes and polygons are left out that have no area, are
        no shape, or lie outside the image.

    Raises:
        ValueError: a region is of another image, or its file cannot be read.
    """
    union: np.ndarray = np.zeros((height, width), dtype=np.uint8)
    phrases = np.zeros_like(union)
    faults: list[str] = []
    for region in regions:
        try:
            drawn = _draw(region, width, height, faults)
        except Degenerate as error:
            faults.append(str(error))
            continue
        if drawn.shape != union.shape:
            if len(regions) > 1:
                raise ValueError("maps of another size than their image cannot be joined with other regions")
            union = np.zeros_like(drawn)
        union = np.maximum(union, drawn)
        if drawn.shape == phrases.shape:
            phrases |= np.where(drawn > 0, 1 << min(region.get("phrase", 0), _BITS - 1), 0).astype(np.uint8)
    if not union.any():
        return b"", faults or ["nothing of the region is in the image"]
    picture = Image.fromarray(union)
    hard = set(np.unique(union)) <= {0, 255}
    if hard and len(np.unique(phrases[phrases > 0])) > 1:
        picture = Image.fromarray(phrases, "P")
        picture.putpalette([0] * 3 + [255] * 3 * 255)
    elif hard:
        picture = picture.convert("1", dither=Image.Dither.NONE)
    png = io.BytesIO()
    picture.save(png, "PNG")
    return png.getvalue(), faults


def tells_phrases(png: bytes) -> bool:
    """Whether a drawn region tells its phrases apart: the color type in its header is that of a palette."""
    return png[25:26] == b"\x03"


def _draw(region: Mapping[str, Any], width: int, height: int, faults: list[str]) -> np.ndarray:
    """One region as (H, W) uint8; of several polygons those that can be drawn."""
    if "maps" in region:
        return _mean_map(region["maps"], width, height)
    if "box" in region:
        if list(region.get("size") or (height, width)) != [height, width]:
            raise ValueError(f"a box in {region['size']}, and the image has {[height, width]} (height, width)")
        drawn = _fill_box(region["box"], width, height)
    else:
        segmentation = region["segmentation"]
        size = segmentation.get("size") if isinstance(segmentation, Mapping) else [height, width]
        if list(size or ()) != [height, width]:
            raise ValueError(f"a mask of size {size}, and the image has {[height, width]} (height, width)")
        return np.asarray(draw_shape(segmentation, width, height, faults), dtype=np.uint8) * 255
    if not drawn.any():
        raise Degenerate("nothing of the region is in the image")
    return drawn


def draw_shape(segmentation: Any, width: int, height: int, faults: list[str]) -> np.ndarray:
    """A segmentation of COCO's as (H, W) bool; of several polygons those that can be drawn.

    Args:
        faults: gets why the others are left out.

    Raises:
        Degenerate: none of them can be drawn, or nothing is in the image.
        ValueError: it is of another image, or in none of COCO's formats.
    """
    try:
        drawn = Instance(0, 0, 0.0, height, width, segmentation).mask()
    except UserError as error:
        kind = Degenerate if isinstance(segmentation, list) else ValueError
        raise kind(str(error).partition(": ")[2]) from None
    if not drawn.any():
        raise Degenerate("nothing of the region is in the image")
    if isinstance(segmentation, list):
        each = (fault_of_polygon(one, height, width) for one in segmentation)
        faults += [one for one in each if one is not None]
    return drawn


def _fill_box(box: Sequence[float], width: int, height: int) -> np.ndarray:
    """Pixels whose centers are in the box; at least one, of a box that is in the image."""
    try:
        x, y, box_width, box_height = map(float, box)
    except (TypeError, ValueError, OverflowError):
        raise Degenerate("a box is four numbers") from None
    if not (box_width > 0 and box_height > 0 and math.isfinite(x + y + box_width + box_height)):
        raise Degenerate(f"a box of {box_width:g} x {box_height:g} pixels")
    mask = np.zeros((height, width), dtype=np.uint8)
    if x < width and y < height and x + box_width > 0 and y + box_height > 0:
        columns, rows = _pixels(x, box_width, width), _pixels(y, box_height, height)
        mask[rows, columns] = 255
    return mask


def _pixels(start: float, length: float, side: int) -> slice:
    # Pixel n has its center at n + 0.5; one that is on the border belongs to the box that begins there.
    first, end = math.ceil(start - 0.5), math.ceil(start + length - 0.5)
    if first >= end:  # between two centers
        first = math.floor(start)
    first = min(max(first, 0), side - 1)
    return slice(first, max(first + 1, min(end, side)))


def _mean_map(files: Sequence[Sequence[str | None]], width: int, height: int) -> np.ndarray:
    """The mean of some gray images, scaled so that its brightest is white."""
    maps = [_read_map(Path(str(file)), member) for file, member in files]
    if len({one.shape for one in maps}) > 1:
        raise ValueError(f"{files[0][0]} and the other maps of the same text differ in size")
    mean = np.mean(maps, axis=0)
    if not math.isclose(mean.shape[1] / mean.shape[0], width / height, rel_tol=_SAME_ASPECT):
        raise ValueError(
            f"{files[0][0]} has {mean.shape[1]} x {mean.shape[0]} pixels, and its image {width} x {height}"
        )
    return np.asarray(np.round(255 * mean / max(float(mean.max()), 1e-6)), dtype=np.uint8)


def _read_map(path: Path, member: str | None) -> np.ndarray:
    try:
        if member is None:
            data = read_regular(path)
        else:
            with open_zip(path) as archive:
                data = read_member(path, archive, member)
        return read_gray(data)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}{f' ({member})' if member else ''} cannot be read ({error})") from None
