"""Channels of the image encoder that the text weights, by the mean token and ξ (Sentence Attention Block)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlabs.models.backbones import Backbone
from vlabs.models.registry import register
from vlabs.models.topdown import Feedback, Signal, TopDown, per_block, similarity
from vlabs.utils.options import Size


class ChannelSignal(Signal):
    """The gates of n priors on the output of every block.

    Args:
        gates: for every block two linear maps, from D and the width of ξ to D.
        prior: ξ, (n, D_ξ).
        alpha: scale of the gates.
        weights: (n, N), the similarity of ξ and the tokens.
    """

    def __init__(self, gates: Sequence[nn.Module], prior: Tensor, alpha: float, weights: Tensor) -> None:
        self.gates, self.prior, self.alpha, self.similarity = gates, prior, alpha, weights

    def leave(self, block: int, x: Tensor) -> Tensor:
        """See `Signal`."""
        mean = x.mean(dim=1).expand(self.prior.shape[0], -1)
        gate = 2 * torch.sigmoid(self.gates[block](torch.cat([mean, self.prior], dim=1))) - 1
        return x * (1 + self.alpha * gate).unsqueeze(1)


@register
class SentenceAttention(TopDown):
    """ξ and the mean token weight the channels after every block, as in squeeze and excitation.

    `x ← x · (1 + α (2 σ(W_2 relu(W_1 [mean_i x_i; ξ])) − 1))`: with α = 1 a gate is between 0 and 2. W_2 starts at
    zero, so the second pass starts as the first. The similarity of ξ and the patches is its map, and changes nothing.

    Args:
        alpha: scale α.
        reduction: D over the width between the two maps.
    """

    needs_decoders = False
    by_similarity = False
    takes_several = False
    begins_at_zero = r"gates\.\d+\.2\..+"

    def __init__(self, alpha: float = 1.0, reduction: Size = 16) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.reduction = reduction

    def build(self, backbone: Backbone, start: int) -> None:
        """See `TopDown`."""
        self.first = start - 1

        def make(width: int) -> nn.Module:
            inner = max(1, width // self.reduction)
            last = nn.Linear(inner, width)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            return nn.Sequential(nn.Linear(width + backbone.width, inner), nn.ReLU(), last)

        self.gates = per_block(backbone, start, make)

    def signal(
        self,
        tokens: Tensor,
        prior: Tensor,
        prepared: list[Tensor],
        image_index: Tensor | None,
        feedback: Feedback,
        alpha: float | None = None,
    ) -> ChannelSignal:
        """See `TopDown`."""
        alpha = self.alpha if alpha is None else alpha
        return ChannelSignal(list(self.gates)[self.first :], prior, alpha, similarity(prior, tokens))
