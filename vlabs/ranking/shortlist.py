"""Which pairs are worth an exact score: those that the prior's similarity puts among the best."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def best_both_ways(blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of every row and of every column of a matrix, of which no more than a block is held.

    Args:
        blocks: rows (n, M) of the matrix, from the first to the last.
        k: at least 1; fewer come back where there are fewer.

    Returns:
        Columns (N, k) of every row's best, and rows (k, M) of every column's best, best first.
    """
    of_row: list[Tensor] = []
    best = place = None
    first = 0
    for block in blocks:
        of_row.append(block.topk(min(k, block.shape[1]), dim=1).indices.cpu())
        block = block.cpu()
        rows = torch.arange(first, first + len(block))[:, None].expand_as(block)
        first += len(block)
        together = block if best is None else torch.cat([best, block])
        rows = rows if place is None else torch.cat([place, rows])
        best, order = together.topk(min(k, len(together)), dim=0)
        place = rows.gather(0, order)
    assert place is not None
    return torch.cat(of_row), place


def shortlist(seen: Tensor, prior: Tensor, k: int, images_at_once: int = 256) -> list[np.ndarray]:
    """The k best captions of every image and every caption for which the image is among the k best.

    The similarity is the cosine of ξ and the bottom-up [cls]; it is held for `images_at_once` images at a time.

    Args:
        seen: (N, D), the bottom-up [cls] of every image.
        prior: ξ, (M, D), of every caption.
        k: at least 1.

    Returns:
        For every image the captions, ascending.
    """
    prior = F.normalize(prior.float(), dim=1)
    parts = seen.split(images_at_once)
    captions, images = best_both_ways((F.normalize(part.float(), dim=1) @ prior.T for part in parts), k)
    pairs = torch.cat(
        [
            torch.stack([torch.arange(len(captions))[:, None].expand_as(captions).flatten(), captions.flatten()]),
            torch.stack([images.flatten(), torch.arange(len(prior)).expand_as(images).flatten()]),
        ],
        dim=1,
    ).unique(dim=1)  # sorted by image, then caption
    counts = torch.bincount(pairs[0], minlength=len(seen))
    return [part.numpy() for part in pairs[1].split(counts.tolist())]


def share_kept(wanted: list[np.ndarray], exact: np.ndarray, k: int = 10, images_at_once: int = 256) -> dict[str, float]:
    """How much of the exact top k a shortlist has, in percent: of the `texts` of every image, the `images` of a text.

    Args:
        wanted: of `shortlist`.
        exact: (N, M), images by captions; read `images_at_once` rows at a time.
    """
    starts = range(0, len(exact), images_at_once)
    texts, images = best_both_ways((torch.from_numpy(exact[n : n + images_at_once].copy()) for n in starts), k)
    width = exact.shape[1]
    listed = np.concatenate([image * width + captions for image, captions in enumerate(wanted)])
    of_images = np.arange(len(texts))[:, None] * width + texts.numpy()
    of_texts = images.numpy() * width + np.arange(width)
    return {
        "texts": 100 * float(np.isin(of_images, listed).mean()),
        "images": 100 * float(np.isin(of_texts, listed).mean()),
    }
