"""Scenes of colored shapes: what a scene may hold, how one is drawn from a seed, and how it becomes pixels.

Every shape is a signed distance field on the unit disk, tabulated once; an object is a look-up into that table on its
bounding box, which gives anti-aliased edges (`coverage = clip(0.5 - distance, 0, 1)`) for the price of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Reals = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]

MIN_VISIBLE = 0.6  # of each object's own pixels
TABLE_SIZE = 257  # a shape's table covers [-TABLE_REACH, TABLE_REACH] in both directions, in radii
TABLE_REACH = 1.25

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 35, 35),
    "green": (30, 150, 50),
    "blue": (35, 70, 225),
    "yellow": (250, 225, 40),
    "purple": (140, 40, 175),
    "cyan": (50, 220, 230),
    "orange": (245, 130, 20),
    "pink": (255, 150, 195),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "heart", "diamond", "moon")
FILLS = ("solid", "striped", "hollow")
SPLITS = ("train", "val", "test", "distractors", "systematic", "productive", "relations")


@dataclass(frozen=True)
class SceneSize:
    """How large a corpus is and how hard its scenes are. Lengths are fractions of the image side."""

    image_size: int  # pixels
    train_images: int
    eval_images: int  # each of val, test and relations
    generalisation_images: int  # each of distractors, systematic and productive
    num_shapes: int
    num_colors: int
    objects: tuple[int, int]  # fewest and most in an image
    max_count: int  # the largest answer to "how many"
    fill_weights: tuple[float, float, float]  # solid, striped, hollow
    small: tuple[float, float]  # diameter
    large: tuple[float, float]
    distractor_objects: tuple[int, int] = (7, 9)

    @property
    def shapes(self) -> tuple[str, ...]:
        """The shapes it draws."""
        return SHAPES[: self.num_shapes]

    @property
    def colors(self) -> tuple[str, ...]:
        """The names of the colors it draws."""
        return tuple(COLORS)[: self.num_colors]

    @property
    def held_out(self) -> frozenset[tuple[str, str]]:
        """(color, shape) pairs that only the `systematic` split shows or mentions: one color of every shape."""
        return frozenset(zip(self.colors, self.shapes, strict=False))

    def num_images(self, split: str) -> int:
        """How many images a split has."""
        if split == "train":
            return self.train_images
        return self.eval_images if split in ("val", "test", "relations") else self.generalisation_images


SIZES = {
    "tiny": SceneSize(32, 40, 12, 12, 5, 6, (3, 4), 3, (0.8, 0.1, 0.1), small=(0.25, 0.28), large=(0.38, 0.42)),
    "small": SceneSize(64, 6_000, 500, 300, 5, 6, (3, 4), 3, (0.8, 0.1, 0.1), small=(0.25, 0.28), large=(0.38, 0.42)),
    "medium": SceneSize(
        112, 20_000, 1_000, 1_000, 8, 8, (3, 6), 4, (0.5, 0.25, 0.25), small=(0.16, 0.19), large=(0.27, 0.32)
    ),
    "large": SceneSize(
        224, 100_000, 2_000, 2_000, 8, 8, (3, 6), 4, (0.5, 0.25, 0.25), small=(0.16, 0.19), large=(0.27, 0.32)
    ),
}


class SceneObject(NamedTuple):
    """One object. `x`, `y` (center, from the top left) and `radius` are fractions of the image side."""

    shape: str
    color: str
    size: str
    fill: str
    x: float
    y: float
    radius: float
    angle: float  # radians


# --- what a scene holds --------------------------------------------------------------------------------------------


def sample_objects(size: SceneSize, split: str, rng: Random) -> list[SceneObject]:
    """The objects of one scene, back to front; they overlap at most so far that a drawing may still be rejected."""
    num_objects = rng.randint(*(size.distractor_objects if split == "distractors" else size.objects))
    while True:
        objects: list[SceneObject] = []
        for color, shape in _sample_pairs(size, split, num_objects, rng):
            placed = _place(size, shape, color, objects, num_objects, rng)
            if placed is None:
                break
            objects.append(placed)
        else:
            return objects


def _sample_pairs(size: SceneSize, split: str, num_objects: int, rng: Random) -> list[tuple[str, str]]:
    """A (color, shape) per object. Every second scene repeats a color, a shape or both, so that counts vary."""
    held_out = sorted(size.held_out)
    seen = [(color, shape) for color in size.colors for shape in size.shapes if (color, shape) not in size.held_out]
    pairs = [rng.choice(seen) for _ in range(num_objects)]
    if split == "systematic":
        for index in range(rng.randint(1, 2)):
            pairs[index] = rng.choice(held_out)
    if rng.random() < 0.5:
        repeats = size.max_count if rng.random() < 0.6 else 2
        shared = rng.choice(("color", "shape", "both"))
        color, shape = pairs[0]
        for index in range(1, min(repeats, num_objects)):
            if shared == "both":
                pairs[index] = pairs[0]
            elif pairs[index] in size.held_out:
                continue
            else:
                pairs[index] = rng.choice([p for p in seen if (p[0] == color if shared == "color" else p[1] == shape)])
    rng.shuffle(pairs)
    return pairs


def _place(
    size: SceneSize, shape: str, color: str, others: Sequence[SceneObject], num_objects: int, rng: Random
) -> SceneObject | None:
    """An object at a free place, or None when 30 tries found none."""
    extent = "large" if rng.random() < min(0.5, 2 / num_objects) else "small"
    radius = rng.uniform(*(size.large if extent == "large" else size.small)) / 2
    for _ in range(30):
        x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
        if all(math.hypot(x - o.x, y - o.y) > _nearest(color, o) * (radius + o.radius) for o in others):
            fill = rng.choices(FILLS, size.fill_weights)[0]
            return SceneObject(shape, color, extent, fill, x, y, radius, rng.uniform(-0.2, 0.2))
    return None


def _nearest(color: str, other: SceneObject) -> float:
    """How near an object may come to another, in sums of their radii. Two of one color would run together."""
    return 1.0 if color == other.color else 0.65


# --- pixels --------------------------------------------------------------------------------------------------------


def render(objects: Sequence[SceneObject], image_size: int, rng: Random) -> tuple[NDArray[np.uint8], list[Mask]] | None:
    """Draw a scene, first object at the back.

    Returns the image (height, width, 3) and each object's visible mask (height, width): the pixels it painted that
    nothing covers, so the middle of a hollow object is not part of it. None if one is less than 60% visible.
    """
    image = _background(image_size, rng)
    owner = np.full((image_size, image_size), -1, np.int16)
    painted = []
    for index, item in enumerate(objects):
        radius = item.radius * image_size
        rows = _window(item.y * image_size, radius, image_size)
        columns = _window(item.x * image_size, radius, image_size)
        coverage, paint = _draw(item, rows, columns, image_size, rng)
        region = image[rows, columns]
        region += coverage[..., None] * (paint - region)
        own = coverage > 0.5
        owner[rows, columns][own] = index
        painted.append(np.count_nonzero(own))
    masks = [owner == index for index in range(len(objects))]
    if any(np.count_nonzero(mask) < MIN_VISIBLE * whole for mask, whole in zip(masks, painted, strict=True)):
        return None
    return np.clip(image + 0.5, 0, 255).astype(np.uint8), masks


def _window(center: float, radius: float, image_size: int) -> slice:
    reach = TABLE_REACH * radius + 1
    return slice(max(0, math.floor(center - reach)), min(image_size, math.ceil(center + reach)))


def _draw(
    item: SceneObject, rows: slice, columns: slice, image_size: int, rng: Random
) -> tuple[Floats, Floats | NDArray[np.float64]]:
    """Coverage (height, width) in 0..1 and paint (height, width, 3) or (3,) in 0..255 of one object's window."""
    radius = item.radius * image_size
    down = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - item.y * image_size)[:, None]
    right = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - item.x * image_size)[None, :]
    cosine, sine = math.cos(item.angle), math.sin(item.angle)
    u, v = cosine * right + sine * down, cosine * down - sine * right
    distance = radius * _look_up(_shape_table(item.shape), u / radius, v / radius)
    shade = rng.uniform(0.9, 1.08)
    paint = np.minimum(np.array(COLORS[item.color], np.float32) * np.float32(shade), 255)
    if item.fill == "hollow":
        line = max(1.8, 0.24 * radius)
        distance = np.maximum(distance, -distance - line)
    elif item.fill == "striped":
        period = max(4.0, 0.45 * radius)
        phase = np.abs(((u + v) * math.sqrt(0.5) / period) % 1 - 0.5) * period  # px from a pale stripe's border
        pale = np.clip(phase - 0.32 * period + 0.5, 0, 1)[..., None]
        paint = paint + pale * (np.float32(245) - paint)
    return np.clip(0.5 - distance, 0, 1), paint


def _look_up(table: Floats, u: Reals, v: Reals) -> Floats:
    scale, last = (TABLE_SIZE - 1) / 2 / TABLE_REACH, TABLE_SIZE - 1
    column = np.clip(np.rint((u + TABLE_REACH) * scale), 0, last).astype(np.intp)
    row = np.clip(np.rint((v + TABLE_REACH) * scale), 0, last).astype(np.intp)
    found: Floats = table[row, column]
    return found


def _background(image_size: int, rng: Random) -> Floats:
    """Smooth, nearly gray, low-contrast noise (height, width, 3)."""
    noise = np.random.default_rng(rng.getrandbits(64))
    level = rng.uniform(85, 175) + noise.uniform(-6, 6, 3).astype(np.float32)
    coarse = Image.fromarray(noise.uniform(-22, 22, (7, 7)).astype(np.float32))
    smooth = np.asarray(coarse.resize((image_size, image_size), Image.Resampling.BICUBIC))
    grain = noise.standard_normal((image_size, image_size), dtype=np.float32) * 3
    return ((smooth + grain)[..., None] + level).astype(np.float32)


# --- shapes --------------------------------------------------------------------------------------------------------


@cache
def _shape_table(shape: str) -> Floats:
    """Signed distance to the outline in radii, negative inside: (TABLE_SIZE, TABLE_SIZE), rows first."""
    axis = np.linspace(-TABLE_REACH, TABLE_REACH, TABLE_SIZE)
    x, y = axis[None, :], axis[:, None]
    if shape == "circle":
        return (np.hypot(x, y) - 0.92).astype(np.float32)
    if shape == "moon":
        return np.maximum(np.hypot(x, y) - 0.98, 0.72 - np.hypot(x - 0.5, y)).astype(np.float32)
    return _polygon_distance(_corners(shape), x, y).astype(np.float32)


def _corners(shape: str) -> list[tuple[float, float]]:
    """The outline's corners in order, y downwards."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "diamond":
        return [(0, -1.1), (0.66, 0), (0, 1.1), (-0.66, 0)]
    if shape == "triangle":
        return [(0, -1), (1, 0.8), (-1, 0.8)]
    if shape == "star":
        return [
            (r * math.sin(k * math.pi / 5), 0.05 - r * math.cos(k * math.pi / 5))
            for k, r in enumerate((1.12, 0.48) * 5)
        ]
    if shape == "cross":
        a, b = 0.34, 1.0
        top, right = [(-a, -b), (a, -b), (a, -a)], [(b, -a), (b, a), (a, a)]
        return top + right + [(-x, -y) for x, y in top + right]
    if shape == "heart":
        turns = [2 * math.pi * k / 48 for k in range(48)]
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15.5 - 0.1,
            )
            for t in turns
        ]
    raise ValueError(f"no outline for the shape {shape!r}")


def _polygon_distance(
    corners: Sequence[tuple[float, float]], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Signed distance to a polygon: to the nearest edge, negative where a ray to the right crosses an odd number."""
    squared = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf)
    inside = np.zeros(squared.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, [*corners[1:], corners[0]], strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (x < ax + (y - ay) / ey * ex)
    distance: NDArray[np.float64] = np.where(inside, -1.0, 1.0) * np.sqrt(squared)
    return distance
