"""Figures of where a model looks; every figure and the page are drawn here."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageDraw

from vlabs.attention.maps import legend_of
from vlabs.errors import printable
from vlabs.utils.arguments import numbered
from vlabs.utils.files import replacing

COLORMAP = "cividis"  # readable with any color vision
LONGEST, _SHORTEST = 1024, 448  # largest and smallest number of pixels of the longer side of a shown image
_COLUMN = 2.9  # inches
_DPI = 150
_MOST_PIXELS = 16e6  # largest number of pixels of a figure

Box = tuple[float, float, float, float]


class View(NamedTuple):
    """An image at a size for display.

    Attributes:
        image: the whole image.
        box: left, top, right and bottom of the part that the model sees, in pixels of `image`.
    """

    image: Image.Image
    box: Box


class Cell(NamedTuple):
    """One image of a figure.

    Attributes:
        view: the image.
        map: (rows, columns), non-negative, over the part that the model sees; None for the plain image.
        name: name of the map, see `MAPS`.
        title, note: text above and below.
        marked: draw a frame around it, as the right one.
    """

    view: View
    map: np.ndarray | None = None
    name: str = ""
    title: str = ""
    note: str = ""
    marked: bool = False


def as_view(image: Image.Image, box: Box | None = None) -> View:
    """Resize an image to a longer side of 448 to 1,024 pixels; the pixels of small images stay visible.

    Args:
        box: the result of `Preprocessing.box`; None if the model sees the whole image.
    """
    longer = max(image.size)
    factor = min(max(longer, _SHORTEST), LONGEST) / longer
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    x, y = size[0] / image.width, size[1] / image.height
    if size != image.size:
        kind = Image.Resampling.NEAREST if factor > 3 else Image.Resampling.BICUBIC
        image = image.resize(size, kind, reducing_gap=3)
    left, top, right, bottom = box or (0, 0, size[0] / x, size[1] / y)
    return View(image, (left * x, top * y, right * x, bottom * y))


def overlay(view: View, values: np.ndarray, scale: tuple[float, float] | None = None) -> np.ndarray:
    """Darken the part that a model sees where a map is low, and tint it where it is high; (H, W, 3) uint8.

    Args:
        values: (rows, columns), non-negative, over the box of the view.
        view: the image.
        scale: the values that are shown darkest and brightest; None for the map's own range.
    """
    low, high = scale or (float(values.min()), float(values.max()))
    scaled = ((values - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)

    def tinted(pixels: np.ndarray) -> np.ndarray:
        smooth = Image.fromarray(scaled.astype(np.float32)).resize(pixels.shape[1::-1], Image.Resampling.BICUBIC)
        weight = np.asarray(smooth).clip(0, 1)[..., None]
        tint = matplotlib.colormaps[COLORMAP](weight[..., 0])[..., :3].astype(np.float32)
        seen: np.ndarray = pixels * (0.3 + 0.4 * weight) + 0.3 * weight * tint
        return seen

    return within(view, tinted)


def within(view: View, draw: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """An image, (H, W, 3) uint8, with a frame around what the model sees, unless that is all of it.

    Args:
        draw: maps the pixels (h, w, 3) in [0, 1] inside the frame to what is shown there; the outside is then pale.
    """
    whole = view.image.convert("RGB")
    left, top, right, bottom = box = [round(edge) for edge in view.box]
    right, bottom = max(right, left + 1), max(bottom, top + 1)
    part = box != [0, 0, *whole.size]
    if draw is not None:
        pixels = np.asarray(whole, dtype=np.float32) / 255
        seen = draw(pixels[top:bottom, left:right])
        if part:
            pixels = 0.75 + 0.25 * pixels.mean(axis=2, keepdims=True).repeat(3, axis=2)
            pixels[top:bottom, left:right] = seen
        else:
            pixels = seen
        whole = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    if part:
        for color, inset, width in (("black", 0, 4), ("white", 1, 2)):
            edges = left + inset, top + inset, right - 1 - inset, bottom - 1 - inset
            if edges[0] <= edges[2] and edges[1] <= edges[3]:
                ImageDraw.Draw(whole).rectangle(edges, outline=color, width=width)
    return np.asarray(whole)


def pixels_of(cell: Cell, scale: tuple[float, float] | None = None) -> np.ndarray:
    """The pixels of a cell, (H, W, 3) uint8; `scale` as in `overlay`."""
    return within(cell.view) if cell.map is None else overlay(cell.view, cell.map, scale)


def _scale_of(cells: Sequence[Cell]) -> tuple[float, float] | None:
    """The common range of the maps of some cells; None if they have different names and do not compare."""
    maps = [cell.map for cell in cells if cell.map is not None]
    if len({cell.name for cell in cells if cell.map is not None}) != 1:
        return None
    return min(float(one.min()) for one in maps), max(float(one.max()) for one in maps)


def grid_figure(rows: Sequence[tuple[str, Sequence[Cell]]], note: str = "", own_range: bool = False) -> Figure:
    """A figure of rows of images with maps, with a legend below.

    Args:
        rows: the title of each row, and its cells.
        note: more text below.
        own_range: show each map within its own range. Otherwise the maps of a row share one range, so that they can be
            compared, unless their names differ.
    """
    cells = [cell for _, row in rows for cell in row]
    columns = max(len(row) for _, row in rows)
    legend = legend_of([cell.name for cell in cells if cell.name], own_range)
    width = _COLUMN * columns + 0.6 * bool(legend)
    below = textwrap.fill("; ".join(filter(None, (legend, note))), round(14 * width))
    heights = [*(_height(label, row) for label, row in rows), 0.1 + 0.15 * (below.count("\n") + 1)]
    # Choose the resolution so that images keep all their pixels, unless the figure becomes too large.
    finest = max(max(cell.view.image.size) for cell in cells) / _COLUMN
    dpi = max(_DPI, min(finest, (_MOST_PIXELS / (width * sum(heights))) ** 0.5))
    figure = Figure(figsize=(width, sum(heights)), layout="constrained", dpi=dpi)
    *parts, foot = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    foot.text(0.5, 0.5, _plain(below), fontsize=8, color="0.4", ha="center", va="center")
    for part, (label, row) in zip(parts, rows, strict=True):
        if label:
            part.suptitle(_wrapped(label, round(11 * width)), fontsize=10)
        _draw_row(part.subplots(1, columns, squeeze=False)[0], row, own_range)
    return figure


def _draw_row(axes: Sequence[Axes], cells: Sequence[Cell], own_range: bool) -> None:
    scale = None if own_range else _scale_of(cells)
    for axis in axes[len(cells) :]:
        axis.set_visible(False)
    for axis, cell in zip(axes, cells, strict=False):
        axis.imshow(pixels_of(cell, scale))
        axis.set_title(_wrapped(cell.title, 34), fontsize=9)
        axis.set_xlabel(_wrapped(cell.note, 40), fontsize=8)
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(visible=cell.marked, color="#d55e00", linewidth=3)
    if any(cell.map is not None for cell in cells):
        drawn = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*(scale or (0, 1))), COLORMAP)
        beside = axes[len(cells) - 1].inset_axes((1.04, 0.1, 0.035, 0.8))
        bar = beside.figure.colorbar(drawn, cax=beside)
        ends = ["low", "high"] if scale is None else [f"{value:.2g}" for value in scale]
        bar.set_ticks(list(scale or (0, 1)), labels=ends, fontsize=7)
        bar.outline.set_visible(False)


def question_figure(view: View, cells: Sequence[Cell]) -> Figure:
    """A figure of an image and, beside it, the map of each question within its own range."""
    return grid_figure([("", [Cell(view, title="image"), *cells])], own_range=True)


def _height(label: str, cells: Sequence[Cell]) -> float:
    """The height of a row in inches."""
    pictures = max(min(cell.view.image.height / cell.view.image.width, 1.6) * (_COLUMN - 0.1) for cell in cells)
    lines = [max(_wrapped(text, width).count("\n") + bool(text) for text in texts) for texts, width in (
        ([label], 60), ([cell.title for cell in cells], 34), ([cell.note for cell in cells], 40),
    )]  # fmt: skip
    return max(pictures, 0.8) + 0.2 * lines[0] + 0.17 * lines[1] + 0.15 * lines[2] + 0.2


def save_out(figure: Figure, arguments: argparse.Namespace) -> Path:
    """Write the figure of a command; without `--out`, under the first free name. Returns the path."""
    if arguments.out is not None:
        return save_figure(figure, arguments.out)
    for number in itertools.count(1):
        path = Path(numbered(arguments.default_out, number))
        try:
            path.touch(exist_ok=False)  # reserve the name, so that two commands at once do not take the same
        except FileExistsError:
            continue
        except OSError:
            pass  # `save_figure` reports it
        break
    try:
        return save_figure(figure, path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, completely or not at all. The suffix chooses the format."""
    path = Path(path)
    for text in figure.findobj(Text):
        # Control characters would reach the terminal in matplotlib's warning about missing glyphs, and break an SVG.
        text.set_text("\n".join(printable(line) for line in text.get_text().split("\n")))  # type: ignore[attr-defined]
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.lstrip(".") or "png", bbox_inches="tight", pad_inches=0.08)
    return path


def _wrapped(text: str, width: int) -> str:
    return _plain("\n".join(textwrap.fill(line, width) for line in text.split("\n")))


def _plain(text: str) -> str:
    """Escape $, which would start mathematical text."""
    return text.replace("$", r"\$")
