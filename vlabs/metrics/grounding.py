"""Grounding: does a model look at what it was asked about? Maps against target masks and against human attention.

A map is non-negative, (..., H, W), of any scale, and so are the masks and human maps it is compared with; every measure
gives one value in float64 for each map, (...). A map over patches becomes one over pixels by `to_pixels`. Values do not
depend on the scale of a map, and an all-zero map counts as a uniform one.

The first three measures have one chance level: a uniform map scores exactly the target's share of the image
(`area_share`), and so does a random one on average (a little more for `average_precision`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from vlabs.data.decoding import known_suffixes, read_gray
from vlabs.data.instances import resize_area
from vlabs.errors import UserError
from vlabs.utils.archives import read_regular

HAT_GRID = (14, 14)
_HAT_NAME = re.compile(r"(\d+)_(\d+)\.png", re.IGNORECASE)  # of VQA-HAT
_AIR_NAME = re.compile(r"(\d+)\.png", re.IGNORECASE)  # of AiR-D


def to_pixels(patches: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """A map over patches as a map over pixels: every patch becomes a block of its value.

    Nothing is interpolated, so the share of the map's energy in any set of patches stays what it was.

    Args:
        patches: (..., rows, columns).
        size: the side of the image in pixels, or (height, width).

    Returns:
        (..., height, width)

    Raises:
        ValueError: the image is not a whole number of patches high and wide.
    """
    if patches.ndim < 2:
        raise ValueError(f"a map over patches needs rows and columns, not shape {patches.shape}")
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = patches.shape[-2:]
    if not rows or not columns or height < 1 or width < 1 or height % rows or width % columns:
        raise ValueError(f"{rows}x{columns} patches do not tile an image of {height}x{width} pixels")
    return patches.repeat(height // rows, axis=-2).repeat(width // columns, axis=-1)


def area_share(mask: np.ndarray) -> np.ndarray:
    """The target's share of the image, in (0, 1]: what a uniform map scores.

    Args:
        mask: (..., H, W), bool.

    Raises:
        ValueError: the mask is not boolean, or has no pixel.
    """
    return np.asarray(_flat_mask(mask).mean(axis=-1))


def energy_inside(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The share of the map's energy (its sum) that lies in the target, in [0, 1].

    Args:
        attention: (..., H, W), non-negative.
        mask: (..., H, W), bool.

    Raises:
        ValueError: shapes differ, a value is negative or not finite, or a mask has no pixel.
    """
    values, target = _flat_pair(attention, mask)
    return np.asarray(np.where(target, values, 0).sum(axis=-1) / values.sum(axis=-1))


def pointing(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The pointing game (Zhang et al., Top-down Neural Attention by Excitation Backprop, ECCV 2016), without tolerance.

    1 if the map's maximum lies in the target, else 0; of several equal maxima, the share that lies in it.

    Args and raises: as `energy_inside`.
    """
    values, target = _flat_pair(attention, mask)
    highest = values == 1
    return np.asarray((highest & target).sum(axis=-1) / highest.sum(axis=-1))


def average_precision(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The average precision of the map as a score that a pixel belongs to the target, in (0, 1].

    Σ (R_k − R_{k−1}) P_k over the map's different values as thresholds, highest first, without interpolation. Equal
    pixels enter together, so their order does not matter.

    Args and raises: as `energy_inside`.
    """
    # torchmetrics' binary average precision treats ties alike, but it puts scores beyond 1 through a sigmoid, so that
    # the scale of a map would change its value.
    hits, chosen, is_threshold = _thresholds(*_flat_pair(attention, mask))
    reached = np.maximum.accumulate(np.where(is_threshold, hits, 0), axis=-1)
    gained = np.diff(reached, axis=-1, prepend=0)
    return np.asarray((gained * (hits / chosen)).sum(axis=-1) / hits[..., -1])


def best_iou(attention: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The best intersection over union of the target with the pixels above any threshold of the map, in (0, 1].

    The threshold is chosen with the target in hand, so this is an upper bound of what the map can segment, and never
    below the target's share of the image.

    Args and raises: as `energy_inside`.
    """
    hits, chosen, is_threshold = _thresholds(*_flat_pair(attention, mask))
    overlaps = hits / (chosen + hits[..., -1:] - hits)  # |A ∩ B| / (|A| + |B| - |A ∩ B|)
    return np.asarray(np.where(is_threshold, overlaps, 0).max(axis=-1))


def rank_correlation(attention: np.ndarray, human: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation of a map with a human one, in [-1, 1], as in VQA-HAT (Das et al., EMNLP 2016).

    Both are scaled to 14x14, their pixels ranked, and the ranks correlated. The paper does not say how it scales: here
    a pixel of the 14x14 is the mean over the area that it covers. Equal pixels share their average rank, which matters
    as most of a human map is 0. A map that is the same everywhere ranks nothing, and scores 0. The paper reports the
    mean over questions.

    Args:
        attention: (..., H, W), non-negative; over patches or pixels.
        human: (..., H', W'), non-negative; of the same part of the image, see `vlabs.data.instances.crop_map`.

    Raises:
        ValueError: the leading shapes differ, or a value is negative or not finite.
    """
    _check_map(attention)
    _check_map(human)
    if attention.shape[:-2] != human.shape[:-2]:
        raise ValueError(f"maps of shape {attention.shape} and human maps of shape {human.shape} do not match")
    a, b = _centered_ranks(attention), _centered_ranks(human)
    norm = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return np.asarray((a * b).sum(axis=-1) / np.where(norm > 0, norm, 1))


class HumanMaps(NamedTuple):
    """Where people looked for one question.

    Attributes:
        question_id: the id in VQA v1, on which VQA-HAT was collected; v2 numbers the same questions differently. Of
            AiR-D, the id in GQA.
        maps: (n, H, W), float32 in [0, 1], one map per person, of the size of the whole image.
    """

    question_id: int | str
    maps: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """One map for the question, (H, W)."""
        return np.asarray(self.maps.mean(axis=0))


def read_hat(folder: str | Path, question_ids: Container[int] | None = None) -> Iterator[HumanMaps]:
    """Read the human attention maps of VQA-HAT as they are downloaded.

    Files are `{question_id}_{n}.png`, up to three per question; hidden files and those that are no images are ignored.

    Args:
        folder: `vqahat_train` or `vqahat_val`.
        question_ids: the wanted questions; all by default.

    Yields:
        One record per question, by question id.

    Raises:
        UserError: there is no such folder, it holds no maps, images that are called otherwise or a map
            twice, a file is not an image, or the maps of a question differ in size.
    """
    found = list_hat(folder)
    wanted = sorted((one for one in found if question_ids is None or one in question_ids), key=lambda one: int(one))
    return (read_human_maps(question_id, found[question_id]) for question_id in wanted)


def list_hat(folder: str | Path) -> dict[int | str, list[Path]]:
    """The files of VQA-HAT by question id, those of a question in order; see `read_hat`.

    Or those of AiR-D (Chen et al., ECCV 2020), by the ids of GQA, which are texts: `{question_id}.png`, one map over
    all people.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: name the one with the maps of VQA-HAT, such as vqahat_val, or of AiR-D, "
            "such as aggregated_maps/fixmaps"
        )
    found: defaultdict[int | str, dict[int, Path]] = defaultdict(dict)
    others: list[str] = []
    for path in folder.iterdir():
        same = path
        if match := _HAT_NAME.fullmatch(path.name):
            same = found[int(match[1])].setdefault(int(match[2]), path)
        elif match := _AIR_NAME.fullmatch(path.name):
            same = found[match[1]].setdefault(0, path)
        elif path.suffix.lower() in known_suffixes() and not path.name.startswith("."):
            others.append(path.name)
        if same != path:
            raise UserError(f"{same} and {path.name} are the same map of a question: move one of them away")
    if not found:
        raise UserError(f"{folder} holds no maps of VQA-HAT (files such as 2773461_1.png) or AiR-D (00126851.png)")
    if others:
        raise UserError(
            f"{folder}: {len(others)} images are not called as maps are (2773461_1.png, or 00126851.png), such as "
            f"{min(others)}: rename them, or move them away"
        )
    return {question_id: [path for _, path in sorted(paths.items())] for question_id, paths in found.items()}


def read_human_maps(question_id: int | str, paths: list[Path]) -> HumanMaps:
    """The maps of one question, from its files; see `read_hat`."""
    maps = [_read_gray(path) for path in paths]
    if len({one.shape for one in maps}) > 1:
        raise UserError(f"{', '.join(str(path) for path in paths)}: the maps of one question differ in size")
    return HumanMaps(question_id, np.stack(maps))


def _read_gray(path: Path) -> np.ndarray:
    try:
        return read_gray(read_regular(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): download it again") from None


def _check_map(attention: np.ndarray) -> None:
    if attention.ndim < 2 or not attention.size:
        raise ValueError(f"a map needs rows and columns, not shape {attention.shape}")
    if not np.isfinite(attention).all():
        raise ValueError("the map has values that are not finite")
    if (attention < 0).any():
        raise ValueError("the map has negative values")


def _flat_mask(mask: np.ndarray) -> np.ndarray:
    """(..., H * W)"""
    if mask.dtype != np.bool_ or mask.ndim < 2:
        raise ValueError(f"a mask must be boolean with rows and columns, not {mask.dtype} of shape {mask.shape}")
    flat = mask.reshape(*mask.shape[:-2], mask.shape[-2] * mask.shape[-1])
    if not flat.any(axis=-1).all():
        raise ValueError("the mask is empty")
    return flat


def _flat_pair(attention: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map over its maximum, float64, and the mask, both (..., H * W); a map of zeros becomes one of ones.

    A uniform map is exactly 1 everywhere then, and its sums are exact.
    """
    if attention.shape != mask.shape:
        raise ValueError(f"the map has shape {attention.shape} and the mask {mask.shape}")
    _check_map(attention)
    target = _flat_mask(mask)
    values = attention.reshape(target.shape).astype(np.float64)
    peak = values.max(axis=-1, keepdims=True)
    return np.where(peak > 0, values / np.where(peak > 0, peak, 1), 1), target


def _thresholds(values: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add the pixels in order of decreasing value.

    Returns:
        how many of the first k are in the target, (..., P); k, (P,); whether a threshold ends there and not among
        equal pixels, (..., P).
    """
    order = np.argsort(-values, axis=-1)
    values = np.take_along_axis(values, order, axis=-1)
    hits = np.take_along_axis(target, order, axis=-1).cumsum(axis=-1)
    last = np.ones_like(target[..., :1])
    is_threshold = np.concatenate([values[..., 1:] != values[..., :-1], last], axis=-1)
    return hits, np.arange(1, values.shape[-1] + 1), is_threshold


def _centered_ranks(attention: np.ndarray) -> np.ndarray:
    """Average ranks of the 14x14 pixels, less their mean: (..., 196)."""
    values = resize_area(attention, *HAT_GRID)
    values = values.reshape(*values.shape[:-2], HAT_GRID[0] * HAT_GRID[1])
    peak = values.max(axis=-1, keepdims=True)
    # Means over equal values can differ in the last digit of a double; float32 makes them equal again, so that they
    # share a rank.
    flat = (values / np.where(peak > 0, peak, 1)).astype(np.float32)
    return np.asarray(rankdata(flat, axis=-1)) - (flat.shape[-1] + 1) / 2
