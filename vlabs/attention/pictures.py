"""The paper's figures, for a model and images of your own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from vlabs.attention.classes import class_maps, look_for, strength
from vlabs.attention.figures import LONGEST, Cell, View, as_view, grid_figure
from vlabs.attention.maps import DEAD, look, look_by, maps_of
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import ImageReader
from vlabs.data.prepared import load_split
from vlabs.data.several import side_by_side
from vlabs.errors import UserError


def seen_of(checkpoint: Checkpoint, image: Image.Image) -> tuple[View, Tensor]:
    """An image to draw on, and the model's input for it, (1, 3, H, W)."""
    preprocessing = checkpoint.preprocessing
    return as_view(image, preprocessing.box(image.size)), preprocessing.image(image)[None]


_ABREAST = 6
"""Models in a row of a figure of many, with the image in the first."""


def questions_figure(
    checkpoint: Checkpoint, images: Sequence[Image.Image], texts: Sequence[str], map_name: str
) -> Figure:
    """Images by questions: where the model looks for each (paper, Fig. 6)."""
    rows = []
    for image in images:
        view, tensor = seen_of(checkpoint, image)
        cells = _cells(checkpoint, view, tensor, texts, map_name)
        cells = [cell._replace(title=text) for cell, text in zip(cells, texts, strict=True)]
        rows.append(("", [Cell(view, title="image"), *cells]))
    return grid_figure(rows)


def pathway_figure(checkpoint: Checkpoint, image: Image.Image, texts: Sequence[str]) -> Figure:
    """Bottom-up attention, token weights and top-down attention side by side, one row per text (paper, Fig. 7).

    Raises:
        UserError: the model has no prior.
    """
    model = checkpoint.model
    if model.prior is None or not model.vision.needs_prior:
        raise UserError("--figure pathway shows what a prior does, but this model has none")
    view, tensor = seen_of(checkpoint, image)
    _, maps = look(model, tensor, *_tokens(checkpoint, texts), ["weights", "norm"])
    with torch.no_grad():
        encoded = model.vision.encode(tensor.to(next(model.parameters())))
        bottom_up = encoded.hidden.norm(dim=-1)[0].float().cpu()
    before = bottom_up[model.vision.num_prefix_tokens :].reshape(model.vision.grid_size).numpy()
    rows = []
    for n, text in enumerate(texts):
        cells = [
            Cell(view, title="image"),
            Cell(view, before, "norm", "bottom-up"),
            Cell(view, maps["weights"][n].numpy(), "weights", "token weights"),
            Cell(view, maps["norm"][n].numpy(), "norm", "top-down"),
        ]
        rows.append((text, cells))
    return grid_figure(rows, own_range=True)


def alpha_figure(
    checkpoint: Checkpoint, image: Image.Image, texts: Sequence[str], alphas: Sequence[float] | None, map_name: str
) -> Figure:
    """One prior at several strengths of the top-down signal, a row per text (paper, Fig. 8).

    Args:
        alphas: the strengths; None for those of 1, 3 and 10 that the variant can have.

    Raises:
        UserError: the model has no α, or not so large a one.
    """
    topdown = checkpoint.model.vision.topdown
    if topdown is None or not hasattr(topdown, "alpha"):
        raise UserError("--figure alpha changes the strength of the top-down signal, but this model has none")
    alphas = alphas or [alpha for alpha in (1, 3, 10) if alpha <= topdown.most_alpha]
    view, tensor = seen_of(checkpoint, image)
    by_alpha = [_cells(checkpoint, view, tensor, texts, map_name, alpha) for alpha in alphas]
    rows = []
    for n, text in enumerate(texts):
        cells = [cells[n]._replace(title=f"α = {alpha:g}") for alpha, cells in zip(alphas, by_alpha, strict=True)]
        rows.append((text, [Cell(view, title="image"), *cells]))
    return grid_figure(rows)


def side_by_side_figure(
    checkpoint: Checkpoint, left: Image.Image, right: Image.Image, texts: Sequence[str], map_name: str
) -> Figure:
    """Two images pasted into one, and where the model looks for each text (paper, Fig. 4)."""
    return questions_figure(checkpoint, [side_by_side([left, right], LONGEST)], texts, map_name)


def checkpoints_figure(
    checkpoints: Sequence[tuple[str, Checkpoint]], image: Image.Image, texts: Sequence[str], map_name: str
) -> Figure:
    """One image seen by several models, in a row per text (paper, Fig. 5) or, of many models, in several; each map
    within its own range.
    """
    view, _ = seen_of(checkpoints[0][1], image)
    rows: list[tuple[str, list[Cell]]] = [(text, [Cell(view, title="image")]) for text in texts]
    for name, checkpoint in checkpoints:
        cells = _cells(checkpoint, *seen_of(checkpoint, image), texts, map_name)
        for (_, row), cell in zip(rows, cells, strict=True):
            row.append(cell._replace(title=name))
    starts = range(0, len(checkpoints) + 1, _ABREAST)
    lines = [(text if not start else "", row[start : start + _ABREAST]) for text, row in rows for start in starts]
    return grid_figure(lines, own_range=True)


def control_figure(
    checkpoints: Sequence[tuple[str, Checkpoint]],
    images: Sequence[Image.Image],
    classes: Sequence[str],
    alpha: float | None,
    map_name: str,
) -> Figure:
    """Classifiers asked for each of some classes of an image, one row per model (paper, Figs. 4 and 5).

    Args:
        images: one image, or two that are put side by side.
        classes: class names that all models have.
        alpha: strength of the top-down signal of the models that have one; None for the usual (`strength`).
        map_name: a map that the models have, of the class that is asked for; `norm` is the paper's. The bottom-up pass
            is shown by `norm`.

    Raises:
        UserError: a model does not have a class, or the map; no model has an α.
    """
    if alpha is not None and all(strength(one.classifier.encoder) is None for _, one in checkpoints):
        raise UserError(f"--alpha {alpha:g}: no model has an α: leave it out")
    rows = []
    for name, checkpoint in checkpoints:
        known = list(checkpoint.preprocessing.names)
        if unknown := [one for one in classes if one not in known]:
            raise UserError(f"--class {unknown[0]} is not in {checkpoint.path}: choose from {', '.join(known[:20])}")
        image = images[0] if len(images) == 1 else side_by_side(images, LONGEST)
        view, tensor = seen_of(checkpoint, image)
        labels = [known.index(one) for one in classes]
        model = checkpoint.classifier
        if lacking := maps_of(model, [map_name])[1]:
            raise UserError(f"--map {map_name}: {checkpoint.path} does not have it ({lacking[0]})")
        own = strength(model.encoder, alpha)
        found = look_for(model, tensor, labels, own)
        maps = class_maps(model, tensor.expand(len(labels), -1, -1, -1), [map_name], labels, own)[1][map_name]
        cells = [Cell(view, title="image")]
        titles = ["bottom-up", *[one.replace("_", " ") for one in classes]]
        for n, title in enumerate(titles):
            shares = found.before if n == 0 else found.after[n - 1]
            note = ", ".join(
                f"{one.replace('_', ' ')} {shares[label]:.0%}" for one, label in zip(classes, labels, strict=True)
            )
            values, shown = (found.bottom_up, "norm") if n == 0 else (maps[n - 1], map_name)
            cells.append(Cell(view, values.numpy(), shown, title, note))
        rows.append((name, cells))
    return grid_figure(rows, own_range=True)


def reconstruction_figure(
    checkpoint: Checkpoint, image: Image.Image, texts: Sequence[str], data_dir: str | Path, num_images: int = 200
) -> Figure:
    """What a linear decoder sees in the signals of the first block, a row per text (paper, Fig. 9).

    The decoder maps a token of the first block's bottom-up input to the pixels of its patch; it is fitted by least
    squares on training images, and then applied to the bottom-up signal, the top-down signal and their sum.

    Raises:
        UserError: the model feeds nothing back.
    """
    model = checkpoint.model
    if model.prior is None or not model.vision.reconstructs:
        raise UserError("--figure reconstruction shows what is fed back, but this model has no feedback with a prior")
    if not model.vision.backbone.is_even:
        raise UserError("--figure reconstruction needs an encoder whose blocks all have the same tokens")
    tokens, pixels = [], []
    rows = load_split(data_dir, "train")
    reader = ImageReader(rows, checkpoint.preprocessing)
    for n in np.linspace(0, len(rows) - 1, num=min(num_images, len(rows)), dtype=int).tolist():
        _, tensor = reader.read(n, 0)
        assert tensor is not None
        tokens.append(_first_input(checkpoint, tensor)[0])
        pixels.append(_to_patches(checkpoint, tensor)[0])
    decoder = _fit(torch.cat(tokens), torch.cat(pixels))
    view, tensor = seen_of(checkpoint, image)
    prefix = model.vision.num_prefix_tokens
    with torch.no_grad():
        bottom_up = model.vision.encode(tensor)
        input_ids, mask = _tokens(checkpoint, texts)
        prior = model.prior(model.text(input_ids, mask), input_ids, mask)
        top_down = model.vision.first_signal(bottom_up, prior)[:, prefix:]
    own = bottom_up.embedded[:, prefix:]
    shown = []
    for n, text in enumerate(texts):
        cells = [Cell(view, title="image")]
        for title, signal in (
            ("bottom-up", own[0]),
            ("top-down", top_down[n]),
            ("their sum", own[0] + top_down[n]),
        ):
            cells.append(Cell(as_view(_to_image(checkpoint, signal, decoder)), title=title))
        shown.append((text, cells))
    return grid_figure(shown, f"a linear decoder of the first block's input, fitted on {len(tokens)} training images")


def _tokens(checkpoint: Checkpoint, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    return checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids(texts))


def _cells(
    checkpoint: Checkpoint, view: View, tensor: Tensor, texts: Sequence[str], map_name: str, alpha: float | None = None
) -> list[Cell]:
    """A map for every text, with the best answer or the ranking score."""
    found = look_by(checkpoint.model, tensor, *_tokens(checkpoint, texts), map_name, alpha=alpha)
    answers = checkpoint.preprocessing.names
    head: Any = checkpoint.model.head
    if answers and hasattr(head, "probabilities"):
        best, ids = head.probabilities(found.output.logits.detach()).max(dim=1)
        lines = [f"{answers[i]} {p:.0%}" for i, p in zip(ids.tolist(), best.tolist(), strict=True)]
    elif hasattr(head, "score"):
        lines = [f"score {score:.2f}" for score in head.score(found.output.pooled_features.detach()).tolist()]
    else:
        lines = [""] * len(texts)
    cells = []
    for maps, name, steers, line in zip(found.maps, found.names, found.steers, lines, strict=True):
        cells.append(Cell(view, maps[0], name, note=f"{line}\n{DEAD.format(name)}" if steers is False else line))
    return cells


@torch.no_grad()
def _first_input(checkpoint: Checkpoint, tensor: Tensor) -> Tensor:
    vision = checkpoint.model.vision
    return vision.encode(tensor).embedded[:, vision.num_prefix_tokens :]


def _to_patches(checkpoint: Checkpoint, tensor: Tensor) -> Tensor:
    """(B, patches, 3 p p), row by row as the tokens are."""
    side = checkpoint.preprocessing.image_size // checkpoint.model.vision.grid_size[0]
    return torch.nn.functional.unfold(tensor, side, stride=side).transpose(1, 2)


def _fit(tokens: Tensor, pixels: Tensor) -> Tensor:
    """Least squares with an offset: (D + 1, 3 p p)."""
    ones = torch.ones(len(tokens), 1)
    solution: Tensor = torch.linalg.lstsq(torch.cat([tokens, ones], dim=1).double(), pixels.double()).solution
    return solution.float()


def _to_image(checkpoint: Checkpoint, tokens: Tensor, decoder: Tensor) -> Image.Image:
    size = checkpoint.preprocessing.image_size
    side = checkpoint.preprocessing.image_size // checkpoint.model.vision.grid_size[0]
    patches = torch.cat([tokens, torch.ones(len(tokens), 1)], dim=1) @ decoder
    tensor = torch.nn.functional.fold(patches.T[None], (size, size), side, stride=side)[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std))
    pixels = ((tensor * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
