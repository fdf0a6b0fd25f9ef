"""Pictures of segments: a colour a class, over the picture and beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from vlabs.attention.figures import enlarged
from vlabs.data.prepared import IGNORED

_LISTED = 20  # classes that a legend names


class Segmented(NamedTuple):
    """A picture with classes (rows, columns) of its pixels: found, and true where that is known."""

    image: Image.Image
    found: np.ndarray
    truth: np.ndarray | None
    title: str = ""


def palette(classes: int) -> np.ndarray:
    """A colour a class, (classes + 1, 3) in [0, 1], the first dark; white for what does not count."""
    colors = np.ones((classes + 1, 3))
    hues = matplotlib.colormaps["tab20"](np.arange(classes) % 20)[:, :3]
    colors[:classes] = hues * (1 - 0.12 * (np.arange(classes)[:, None] // 20 % 4))
    colors[0] = 0.15
    return colors


def colored(image: Image.Image, labels: np.ndarray, colors: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """Classes (rows, columns) as colours over their picture; (H, W, 3) uint8."""
    shown = enlarged(image)
    large = np.asarray(Image.fromarray(labels.astype(np.uint16)).resize(shown.size, Image.Resampling.NEAREST))
    pixels = np.asarray(shown.convert("RGB"), dtype=np.float32) / 255
    mixed = (1 - strength) * pixels + strength * colors[np.minimum(large, len(colors) - 1)]
    mixed[large == IGNORED] = 1.0
    return (mixed.clip(0, 1) * 255).round().astype(np.uint8)


def segment_figure(rows: Sequence[Segmented], classes: Sequence[str]) -> Figure:
    """A row a picture: the picture, what was found, and the truth where it is known."""
    colors = palette(len(classes))
    columns = 3 if any(row.truth is not None for row in rows) else 2
    figure = Figure(figsize=(2.7 * columns + 1.6, 2.75 * len(rows)), layout="constrained", dpi=130)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    present: set[int] = set()
    for row, own in zip(rows, axes, strict=True):
        own[0].imshow(enlarged(row.image))
        own[1].imshow(colored(row.image, row.found, colors))
        present |= set(np.unique(row.found).tolist())
        if row.truth is not None:
            own[2].imshow(colored(row.image, row.truth, colors))
            present |= set(np.unique(row.truth).tolist())
        for axis, title in zip(own, (row.title or "picture", "found", "true"), strict=False):
            axis.set_title(title, fontsize=8)
            axis.set_xticks([])
            axis.set_yticks([])
    shown = sorted(present - {IGNORED})[:_LISTED]
    patches = [Patch(color=colors[label], label=classes[label]) for label in shown]
    figure.legend(handles=patches, loc="outside right upper", fontsize=7)
    return figure
