"""Figures of segmentations: one color per class, over the image and beside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from vlabs.attention.figures import Cell, View, grid_figure, within
from vlabs.data.prepared import IGNORED

_LISTED = 20  # classes that a legend names


class Segmented(NamedTuple):
    """An image with classes (rows, columns) of the part that a model sees: predicted, and true if known."""

    view: View
    found: np.ndarray
    truth: np.ndarray | None
    title: str = ""


def palette(classes: int) -> np.ndarray:
    """One color per class, (classes + 1, 3) in [0, 1], the first dark; the last, white, for ignored pixels."""
    colors = np.ones((classes + 1, 3))
    hues = matplotlib.colormaps["tab20"](np.arange(classes) % 20)[:, :3]
    colors[:classes] = hues * (1 - 0.12 * (np.arange(classes)[:, None] // 20 % 4))
    colors[0] = 0.15
    return colors


def colored(view: View, labels: np.ndarray, colors: np.ndarray, strength: float = 0.65) -> np.ndarray:
    """Classes (rows, columns) as colors over the part of an image that a model sees; (H, W, 3) uint8."""

    def mixed(pixels: np.ndarray) -> np.ndarray:
        small = Image.fromarray(labels.astype(np.uint16))
        large = np.asarray(small.resize(pixels.shape[1::-1], Image.Resampling.NEAREST))
        of_classes = (1 - strength) * pixels + strength * colors[np.minimum(large, len(colors) - 1)]
        return np.where(large[..., None] == IGNORED, 1.0, of_classes)

    return within(view, mixed)


def segment_figure(rows: Sequence[Segmented], classes: Sequence[str]) -> Figure:
    """A figure with one row per image: the image, the prediction, and the ground truth if known."""
    colors = palette(len(classes))
    shown_rows, present = [], set()
    for view, found, truth, title in rows:
        given = {"found": found} | ({} if truth is None else {"true": truth})
        cells = [Cell(view, title=title or "image")]
        for name, labels in given.items():
            of_classes = Image.fromarray(colored(view, labels, colors))
            cells.append(Cell(View(of_classes, (0, 0, *of_classes.size)), title=name))
            present |= set(np.unique(labels).tolist())
        shown_rows.append(("", cells))
    figure = grid_figure(shown_rows, "one color for each class")
    shown = sorted(present - {IGNORED})[:_LISTED]
    patches = [Patch(color=colors[label], label=classes[label]) for label in shown]
    figure.legend(handles=patches, loc="outside upper center", ncols=5, fontsize=7, frameon=False)
    return figure
