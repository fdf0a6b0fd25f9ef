"""Displays of visual search: one object among others that are all alike, as in psychophysics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from PIL import Image

from data_prep.scenes.render import COLORS, FILLS, SHAPES, SIZES, Mask, SceneObject, render
from vlabs.errors import UserError

_TRIES = 200


def read_phrase(phrase: str) -> dict[str, str]:
    """Color, fill and shape of a phrase such as "red circle" or "striped red circle"; solid if it names no fill.

    Raises:
        UserError: it does not name a color and a shape, or says something else.
    """
    kinds = {"fill": FILLS, "color": tuple(COLORS), "shape": SHAPES}
    known = "; ".join(f"{kind}: {', '.join(words)}" for kind, words in kinds.items())
    wanted = f"task.pairs: '{phrase}' must name a color and a shape, and may name a fill"
    found: dict[str, str] = {}
    for word in phrase.split():
        kind = next((kind for kind, words in kinds.items() if word in words), None)
        if kind is None:
            raise UserError(f"{wanted}, but '{word}' is none ({known})")
        if kind in found:
            raise UserError(f"{wanted}, but '{word}' is a second {kind} ({known})")
        found[kind] = word
    if not {"color", "shape"} <= found.keys():
        raise UserError(f"{wanted} ({known})")
    return {"fill": "solid"} | found


def draw_display(size: str, target: str, other: str, others: int, seed: str) -> tuple[Image.Image, list[Mask]]:
    """An image with one target, and the visible pixels (H, W) of each object, the target's first.

    Args:
        size: corpus whose image side and small objects are used, a key of `SIZES`.
        target, other: phrases, see `read_phrase`.
        others: number of objects beside the target; they do not touch.
        seed: seed of places, sizes and background.

    Raises:
        UserError: the objects find no room.
    """
    of_size, rng = SIZES[size], Random(f"displays/{size}/{seed}")
    looks = [read_phrase(target), *[read_phrase(other)] * others]
    for _ in range(_TRIES):
        places = _places([rng.uniform(*of_size.small) / 2 for _ in looks], rng)
        if places is None:
            continue
        items = [
            SceneObject(**look, size="small", x=x, y=y, radius=radius, angle=rng.uniform(-0.2, 0.2))
            for look, (x, y, radius) in zip(looks, places, strict=True)
        ]
        if (drawn := render(items, of_size.image_size, rng)) is not None:
            return Image.fromarray(drawn[0]), drawn[1]
    raise UserError(f"task.others: {others + 1} objects find no room in an image of size {size}: pass fewer")


def _places(radii: Sequence[float], rng: Random) -> list[tuple[float, float, float]] | None:
    """Centers and radii of disks that do not overlap; None if 30 tries found no room for one."""
    places: list[tuple[float, float, float]] = []
    for radius in radii:
        for _ in range(30):
            x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
            if all(math.hypot(x - its_x, y - its_y) > radius + its for its_x, its_y, its in places):
                places.append((x, y, radius))
                break
        else:
            return None
    return places
