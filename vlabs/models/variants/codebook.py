"""Output tokens through a bottleneck of codes that image and text choose (Selective Visual Representations)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.models.backbones import Backbone
from vlabs.models.registry import register
from vlabs.models.topdown import TopDown, similarity
from vlabs.utils.options import Share, Size


@register
class Codebook(TopDown):
    """Every output token becomes a mixture of few codes, chosen by the token and ξ together; nothing is fed back.

    With the joint embedding `e_i = W_e [z_i; ξ]` and `p_i = dropout(softmax(W_p relu(e_i)))` over the codes c_k,
    `z_i ← (1 − α) z_i + α W_u Σ_k p_ik c_k`. With α = 1 codes replace tokens, from the first step on. The similarity of
    ξ and the patches is its map, and changes nothing.

    Args:
        alpha: α; with 0 tokens are those of the first pass.
        codes: number of codes.
        code_dim: width of a code.
        dropout: probability, on p.
    """

    needs_decoders = False
    by_similarity = False
    takes_several = False
    second_pass = False
    most_alpha = 1.0

    def __init__(self, alpha: Share = 1.0, codes: Size = 256, code_dim: Size = 10, dropout: Share = 0.1) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.count, self.code_dim, self.dropout = codes, code_dim, dropout

    def build(self, backbone: Backbone, start: int) -> None:
        """See `TopDown`."""
        width = backbone.width
        self.joint = nn.Linear(2 * width, width)
        self.choose = nn.Linear(width, self.count)
        self.codes = nn.Parameter(torch.randn(self.count, self.code_dim))
        self.up = nn.Linear(self.code_dim, width)

    def reweigh(
        self, tokens: Tensor, prior: Tensor, alpha: float | None = None
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """See `TopDown`."""
        alpha = self.alpha if alpha is None else alpha

        def change(z: Tensor) -> Tensor:
            z = z.expand(prior.shape[0], -1, -1)
            joint = self.joint(torch.cat([z, prior.unsqueeze(1).expand_as(z)], dim=2))
            chosen = F.dropout(self.choose(joint.relu()).softmax(dim=2), self.dropout, self.training)
            mixed: Tensor = self.up(chosen @ self.codes)
            return (1 - alpha) * z + alpha * mixed

        return change, similarity(prior, tokens)
