"""Pictures of where a model looks."""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from vlabs.errors import UserError, printable
from vlabs.utils.files import check_absent, replacing

COLORMAP = "cividis"  # readable with any colour vision


class Panel(NamedTuple):
    """One question about an image: a map (rows, columns), the lines under the picture, e.g. the answers."""

    question: str
    map: np.ndarray
    lines: Sequence[str]


class RankedImage(NamedTuple):
    """An image that was found for a caption: the picture, a map (rows, columns), and whether it is the right one."""

    image: Image.Image
    map: np.ndarray
    right: bool


class Cell(NamedTuple):
    """One picture of a grid.

    Attributes:
        image: the pixels.
        map: (rows, columns), non-negative; None for the picture as it is.
        title, note: lines above and below.
    """

    image: Image.Image
    map: np.ndarray | None = None
    title: str = ""
    note: str = ""


def overlay(
    image: Image.Image, values: np.ndarray, strength: float = 0.75, scale: tuple[float, float] | None = None
) -> np.ndarray:
    """Darken an RGB picture where a map is low and tint it where it is high; (H, W, 3) uint8.

    Args:
        values: (rows, columns), non-negative.
        strength: 0 leaves the picture as it is, 1 leaves nothing where the map is lowest.
        scale: the values that are shown darkest and brightest; the map's own if not given.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    low, high = scale or (float(values.min()), float(values.max()))
    scaled = ((values - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)
    smooth = Image.fromarray((scaled * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BICUBIC)
    weight = np.asarray(smooth, dtype=np.float32)[..., None] / 255
    tint = matplotlib.colormaps[COLORMAP](weight[..., 0])[..., :3]
    mixed = pixels * (1 - strength * (1 - weight)) * (1 - 0.25 * weight) + 0.25 * weight * tint
    return (mixed.clip(0, 1) * 255).round().astype(np.uint8)


def question_figure(image: Image.Image, panels: Sequence[Panel], map_name: str) -> Figure:
    """The image, and beside it one panel a question: where the model looked for it, and what it answered."""
    columns = len(panels) + 1
    titles = [_wrapped(panel.question, 34) for panel in panels]
    lines = max(title.count("\n") + len(panel.lines) for title, panel in zip(titles, panels, strict=True))
    figure = Figure(figsize=(3.1 * columns, 3.7 + 0.22 * lines), layout="constrained", dpi=150)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    shown = enlarged(image)
    axes[0].imshow(shown)
    axes[0].set_title("image", fontsize=10)
    for axis, panel, title in zip(axes[1:], panels, titles, strict=True):
        axis.imshow(overlay(shown, panel.map))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("\n".join(panel.lines), fontsize=9)
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.supxlabel(f"bright: where the model looked ({map_name})", fontsize=8, color="0.4")
    return figure


def grid_figure(rows: Sequence[tuple[str, Sequence[Cell]]], legend: str) -> Figure:
    """Rows of pictures with maps, each row with one scale, so that its pictures can be compared.

    Args:
        rows: a label and the cells of each row, all of one length.
        legend: what bright means.
    """
    columns = max(len(cells) for _, cells in rows)
    figure = Figure(figsize=(2.5 * columns + 1.1, 2.95 * len(rows) + 0.3), layout="constrained", dpi=150)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (label, cells) in zip(axes, rows, strict=True):
        maps = [cell.map for cell in cells if cell.map is not None]
        scale = (min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)) if maps else None
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        for axis, cell in zip(row, cells, strict=False):
            shown = enlarged(cell.image)
            axis.imshow(shown if cell.map is None else overlay(shown, cell.map, scale=scale))
            axis.set_title(_wrapped(cell.title, 30), fontsize=9)
            axis.set_xlabel(_wrapped(cell.note, 34), fontsize=8)
        row[0].set_ylabel(_wrapped(label, 28), fontsize=9)
        if scale is not None:
            drawn = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(*scale), COLORMAP)
            bar = figure.colorbar(drawn, ax=list(row), shrink=0.7, pad=0.01)
            bar.set_ticks([scale[0], scale[1]], labels=["low", "high"], fontsize=7)
            bar.outline.set_visible(False)
    figure.supxlabel(legend, fontsize=8, color="0.4")
    return figure


def add_out(parser: argparse.ArgumentParser, default: str) -> None:
    """Add `--out` and `--overwrite` of a figure to a command line; `check_out` and `save_out` read them."""
    told = f"where the figure goes, .png or .svg (default: {default}, or {_numbered(default, 2)} where that is there)"
    parser.add_argument("--out", help=told)
    parser.add_argument("--overwrite", action="store_true", help="the file of --out may be there already")
    parser.set_defaults(default_out=default)


def check_out(arguments: argparse.Namespace) -> None:
    """Raise a UserError if the figure of a command line cannot go where it says, before the work."""
    if arguments.out is None:
        return
    if Path(arguments.out).suffix not in (".png", ".svg"):
        raise UserError(f"--out {arguments.out}: name a .png or .svg file")
    check_absent(arguments.out, "--out", arguments.overwrite)


def save_out(figure: Figure, arguments: argparse.Namespace) -> Path:
    """Write the figure of a command line, without `--out` under the first name that is free; returns where."""
    if arguments.out is not None:
        return save_figure(figure, arguments.out)
    for number in itertools.count(1):
        path = Path(_numbered(arguments.default_out, number))
        try:
            path.touch(exist_ok=False)  # so that of two commands at once none takes the other's
        except FileExistsError:
            continue
        except OSError:
            pass  # which `save_figure` says
        break
    try:
        return save_figure(figure, path)
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _numbered(name: str, number: int) -> str:
    path = Path(name)
    return name if number == 1 else f"{path.stem}-{number}{path.suffix}"


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all. The suffix chooses the format."""
    path = Path(path)
    for text in figure.findobj(Text):
        # What is in no font steers the terminal from matplotlib's warning, and breaks an SVG.
        text.set_text("\n".join(printable(line) for line in text.get_text().split("\n")))  # type: ignore[attr-defined]
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.lstrip(".") or "png", bbox_inches="tight", pad_inches=0.08)
    return path


def enlarged(image: Image.Image, side: int = 448) -> Image.Image:
    """Small pictures are enlarged without smoothing, so that their own pixels stay visible."""
    factor = side / max(image.size)
    if factor <= 1:
        return image
    return image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.NEAREST)


def _wrapped(text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) + 1 > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    # A lone $ would start mathematical text.
    return "\n".join(lines).replace("$", r"\$")


def ranking_figure(rows: Sequence[tuple[str, Sequence[RankedImage]]]) -> Figure:
    """A row a caption: its best images, best first, each with where the model looked; the right one is framed."""
    columns = max(len(images) for _, images in rows)
    figure = Figure(figsize=(1.9 * columns, 2.4 * len(rows)), layout="constrained", dpi=150)
    for part, (caption, images) in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        part.suptitle(_wrapped(caption, 80), fontsize=9)
        for n, ax in enumerate(part.subplots(1, columns, squeeze=False)[0]):
            ax.set_xticks([])
            ax.set_yticks([])
            if n >= len(images):
                ax.set_visible(False)
                continue
            ax.imshow(overlay(enlarged(images[n].image), images[n].map))
            for side in ax.spines.values():
                side.set(color="#d55e00" if images[n].right else "#cccccc", linewidth=4 if images[n].right else 1)
            ax.set_xlabel(f"{n + 1}" + (" (right)" if images[n].right else ""), fontsize=8)
    return figure
