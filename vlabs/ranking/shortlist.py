"""Which pairs are worth an exact score: those that the prior's similarity puts among the best."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


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
    captions = len(prior)
    prior = F.normalize(prior.float(), dim=1)
    of_image = []
    best = torch.full((0, captions), 0.0)
    best_image = torch.zeros((0, captions), dtype=torch.int64)
    for start in range(0, len(seen), images_at_once):
        similarity = F.normalize(seen[start : start + images_at_once].float(), dim=1) @ prior.T
        of_image.append(similarity.topk(min(k, captions), dim=1).indices.cpu())
        rows = torch.arange(start, start + len(similarity))[:, None].expand(-1, captions)
        together = torch.cat([best, similarity.cpu()])
        best, place = together.topk(min(k, len(together)), dim=0)
        best_image = torch.cat([best_image, rows]).gather(0, place)
    chosen = torch.cat(of_image)
    pairs = torch.cat(
        [
            torch.stack([torch.arange(len(chosen))[:, None].expand_as(chosen).flatten(), chosen.flatten()]),
            torch.stack([best_image.flatten(), torch.arange(captions).expand_as(best_image).flatten()]),
        ],
        dim=1,
    ).unique(dim=1)  # sorted by image, then caption
    counts = torch.bincount(pairs[0], minlength=len(seen))
    return [part.numpy() for part in pairs[1].split(counts.tolist())]
