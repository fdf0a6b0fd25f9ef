"""A loss that keeps the tokens of an image encoder from all reading the same few tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_diversity(attention: Sequence[Tensor]) -> Tensor:
    """The attention diversification loss, ADL (Guo et al., Robustifying Token Attention, ICCV 2023), in [0, 1].

    Of every block: the attention A is averaged over the heads, and ā is the mean of its N rows. Entries of both that
    are at most 2 / N count as 0. The loss is the mean of cos(ā, A_i) over rows, images and blocks: it is small if
    tokens read different ones.

    Args:
        attention: (n, heads, N, keys) of each block, as `AbSViT.encode` and `attend` record it.
    """
    alike = []
    for weights in attention:
        rows = weights.mean(dim=1).float()
        mean = rows.mean(dim=1, keepdim=True)
        least = 2 / rows.shape[1]
        alike.append(F.cosine_similarity(_above(mean, least), _above(rows, least), dim=2, eps=1e-6).mean())
    return torch.stack(alike).mean()


def _above(values: Tensor, least: float) -> Tensor:
    return values * (values > least)
