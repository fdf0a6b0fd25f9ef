"""What keeps the tokens of an image encoder from all reading the same few tokens: a loss, ADL, and a module, TAP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.models.backbones.base import Backbone, to_map, to_tokens


def attention_diversity(attention: Sequence[Tensor]) -> Tensor:
    """The attention diversification loss, ADL (Guo et al., Robustifying Token Attention, ICCV 2023), in [0, 1].

    Of every block: the attention A is averaged over the heads, and ā is the mean of its N rows. Entries of both that
    are at most 2 / N count as 0. The loss is the mean of cos(ā, A_i) over rows, images and blocks: it is small if
    tokens read different ones. Blocks in which [cls] alone reads (FAN's last two) have nothing to compare.

    Args:
        attention: (n, heads, N, keys) of each block, as `AbSViT.encode` and `attend` record it.
    """
    alike = []
    for weights in (one for one in attention if one.shape[2] > 1):
        rows = weights.mean(dim=1).float()
        mean = rows.mean(dim=1, keepdim=True)
        least = 2 / rows.shape[1]
        alike.append(F.cosine_similarity(_above(mean, least), _above(rows, least), dim=2, eps=1e-6).mean())
    return torch.stack(alike).mean()


def _above(values: Tensor, least: float) -> Tensor:
    return values * (values > least)


class TokenPool(nn.Module):
    """Token-aware average pooling, TAP (Guo et al., Robustifying Token Attention, ICCV 2023).

    Every patch becomes a mean of K neighborhoods of itself: `Σ_k p_ik · mean of 3 × 3 patches, k apart`, zeros beyond
    the edge, and for k = 0 the patch alone; `p_i = softmax(conv3×3(gelu(conv3×3(x))))`. The released code normalizes
    over the batch instead of the GELU; here an image does not depend on others.

    Args:
        width: D.
        count: K.
    """

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.choose = nn.Sequential(
            nn.Conv2d(width, count, 3, padding=1, bias=False),
            nn.GELU(),
            nn.Conv2d(count, count, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """A map (n, D, rows, columns) of patches, pooled."""
        share = self.choose(x).softmax(dim=1)
        pooled = share[:, :1] * x
        ninth = x.new_full((x.shape[1], 1, 3, 3), 1 / 9)
        for k in range(1, self.count):
            pooled = pooled + share[:, k : k + 1] * F.conv2d(x, ninth, padding=k, dilation=k, groups=x.shape[1])
        return pooled


def is_of_pool(name: str) -> bool:
    """Whether a parameter, by name, is of a `TokenPool`, which no pre-trained encoder has."""
    return ".norm1.pool." in f".{name}"


class PooledNorm(nn.LayerNorm):
    """The norm before a block's attention, of pooled patches; what the block adds to is not pooled.

    Args:
        norm: the norm without pooling, whose weights it takes over.
        count: K, see `TokenPool`.
        prefix: tokens before the patches, which are not pooled.
        grid: rows and columns of patches.
    """

    def __init__(self, norm: nn.LayerNorm, count: int, prefix: int, grid: tuple[int, int]) -> None:
        super().__init__(norm.normalized_shape, norm.eps)  # type: ignore[arg-type]
        self.weight, self.bias = norm.weight, norm.bias
        self.pool = TokenPool(norm.weight.shape[0], count)
        self.prefix, self.grid = prefix, grid

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (n, N, D), pooled and normed."""
        patches = to_tokens(self.pool(to_map(x[:, self.prefix :], self.grid)))
        return super().forward(torch.cat([x[:, : self.prefix], patches], dim=1))


def pool_tokens(backbone: Backbone, count: int) -> None:
    """Give every block of patches a `TokenPool` before the norm of its attention.

    Raises:
        UserError: the encoder has no such blocks, or `count` is 1, which pools nothing, or reaches far beyond its grid.
    """
    blocks: Any = getattr(backbone.network, "blocks", ())
    if backbone.place_of(0) is None or not all(isinstance(block.norm1, nn.LayerNorm) for block in blocks):
        raise UserError(
            f"model.vision.tap={count} pools the patches of a plain ViT, an RVT or a FAN, which this encoder is not: "
            "pass 0"
        )
    side = max(backbone.place_of(0)[1])  # type: ignore[index]
    if not 2 <= count <= 4 * side:
        raise UserError(
            f"model.vision.tap={count}: {side} patches in a row are pooled with neighborhoods up to {4 * side}, and 1 "
            f"pools nothing: pass 0, or 2 to {4 * side}"
        )
    for index, block in enumerate(blocks):
        place = backbone.place_of(index)
        assert place is not None
        block.norm1 = PooledNorm(block.norm1, count, *place)
