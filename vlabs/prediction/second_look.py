"""A second look: the image again, cropped to what a map points at, or without the rest, and both answers joined."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlabs.attention.figures import Box

_LEAST, _MOST = 1 / 3, 2 / 3  # of the side of what is seen, for a window


def view_of(image: Image.Image, box: Box, values: np.ndarray, kind: str, color: tuple[int, ...]) -> Image.Image:
    """The image for a second look.

    Args:
        image: the whole image, RGB.
        box: the part of it that the model saw, in its pixels.
        values: (rows, columns), the map over that part.
        kind: one of `vlabs.attention.VIEWS`.
        color: the mean color, three values in [0, 255].
    """
    left, top, right, bottom = box
    rows, columns = values.shape
    if kind == "crop":
        row, column, side = best_window(values)
        across, down = (right - left) / columns, (bottom - top) / rows
        x, width = _within(left + column * across, side * across, image.width)
        y, height = _within(top + row * down, side * down, image.height)
        return image.crop((x, y, x + width, y + height))
    width, height = max(1, round(right - left)), max(1, round(bottom - top))
    smooth = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    shown = np.asarray(smooth)
    kept = Image.fromarray((shown >= np.median(shown)).astype(np.uint8) * 255)
    masked = Image.new("RGB", image.size, color)
    masked.paste(image.crop((round(left), round(top), round(left) + width, round(top) + height)),
                 (round(left), round(top)), kept)  # fmt: skip
    return masked


def _within(start: float, length: float, most: int) -> tuple[int, int]:
    """Whole pixels, at least one, of a stretch of an image's side."""
    first = min(round(start), most - 1)
    return first, max(1, round(start + length) - first)


def best_window(values: np.ndarray) -> tuple[int, int, int]:
    """Row, column and side, in patches, of the square that stands out of a map (ViCrop).

    For each side, from a third to two thirds of the grid, the window with the largest sum; of these, the one whose mean
    is furthest above the mean of the windows beside it.

    Args:
        values: (rows, columns), non-negative.
    """
    shorter = min(values.shape)
    found = []
    for side in range(max(1, round(_LEAST * shorter)), max(1, round(_MOST * shorter)) + 1):
        sums = np.lib.stride_tricks.sliding_window_view(values, (side, side)).sum(axis=(2, 3)) / side**2
        row, column = (int(n) for n in np.unravel_index(sums.argmax(), sums.shape))
        beside = [
            sums[r, c]
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
            if 0 <= r < sums.shape[0] and 0 <= c < sums.shape[1]
        ]
        found.append((float(sums[row, column] - np.mean(beside or [sums[row, column]])), row, column, side))
    _, row, column, side = max(found)
    return row, column, side


def join(first: Tensor, second: Tensor, probabilities: Tensor) -> Tensor:
    """The mean logits (n, K) of both looks, among answers with at least half of the first look's best probability."""
    possible = probabilities >= probabilities.max(dim=1, keepdim=True).values / 2
    return torch.where(possible, (first + second) / 2, -torch.inf)
