"""Text that steers with all of its words, by cross-attention between the blocks (SteerViT)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.models.backbones import Backbone
from vlabs.models.backbones.base import mix, split_heads
from vlabs.models.registry import register
from vlabs.models.topdown import Project, Signal, TopDown, Words, per_block, similarity
from vlabs.utils.options import Size


class WordLayer(nn.Module):
    """`x + tanh(α g) · W_o attention(W_q LN(x), W_k t, W_v t)`; no biases, and the scalar g starts at 0.

    Args:
        width: D of the tokens x.
        text_width: width of the words t.
        num_heads: attention heads.
        head_dim: width of a head.
    """

    def __init__(self, width: int, text_width: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(text_width, inner, bias=False)
        self.v = nn.Linear(text_width, inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, words: Tensor, bias: Tensor, alpha: float) -> Tensor:
        """The tokens (n, N, D) of n texts.

        Args:
            x: (n, N, D), or (1, N, D) of one image.
            words: (n, T, text_width).
            bias: (n, 1, 1, T), added to the scores: -inf for padding.
            alpha: a factor of the gate.
        """
        q, k, v = self.q(self.norm(x)), self.k(words), self.v(words)
        q, k, v = (split_heads(one, self.num_heads) for one in (q, k, v))
        mixed = mix(q, k, v, bias=bias.to(q.dtype))
        return x + torch.tanh(alpha * self.gate) * self.out(mixed)


class WordSignal(Signal):
    """Words (n, T, D) that every second block of the second pass reads, the first one too.

    Args:
        layers: of all blocks of the second pass, in order.
        words, bias, alpha: as in `WordLayer.forward`.
        weights: (n, N), the similarity of ξ and the tokens.
    """

    def __init__(self, layers: nn.ModuleList, words: Tensor, bias: Tensor, alpha: float, weights: Tensor) -> None:
        self.layers, self.words, self.bias, self.alpha, self.similarity = layers, words, bias, alpha, weights

    def enter(self, block: int, x: Tensor) -> Tensor:
        """See `Signal`."""
        if block % 2:
            return x
        tokens: Tensor = self.layers[block](x, self.words, self.bias, self.alpha)
        return tokens


@register
class CrossAttention(TopDown):
    """All tokens of the image read all words before every second block (Ruthardt et al., SteerViT, 2026).

    The second pass equals the first until the gates have learned something, and with α = 0. ξ does not steer: it is
    the map, what the region loss teaches, and what `keep` keeps patches by.

    Args:
        alpha: a factor of the gates.
        num_heads: attention heads.
        head_dim: width of a head; None for 3 D / (2 · num_heads), which is SteerViT's 72 where D is 768.
        points: `prior`: the map is ξ's. `head`, as in SteerViT: a linear layer on output tokens, which starts at zero;
            its softmax over the patches is the map, and is what the region loss teaches.
    """

    needs_decoders = False
    reads_words = True
    by_similarity = False
    learns_prior = False
    begins_at_zero = r"layers\.\d+\.gate"

    def __init__(
        self,
        alpha: float = 1.0,
        num_heads: Size = 16,
        head_dim: Size | None = None,
        points: Literal["prior", "head"] = "prior",
    ) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scores_patches = points == "head"

    def hear(self, text_dim: int, backbone: Backbone, start: int) -> None:
        """See `TopDown`."""
        widths = backbone.widths[start - 1 :]
        first, last = nn.Linear(text_dim, text_dim), nn.Linear(text_dim, widths[-1])
        self.connector = nn.Sequential(first, nn.ReLU(), last)
        for layer in (first, last):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.first = start - 1

        def make(width: int) -> nn.Module:
            head_dim = self.head_dim or max(1, 3 * width // (2 * self.num_heads))
            return WordLayer(width, widths[-1], self.num_heads, head_dim)

        self.layers = per_block(backbone, start, make, every=2)
        if self.scores_patches:
            self.head = nn.Linear(widths[-1], 1)
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def score(self, tokens: Tensor) -> Tensor:
        """See `TopDown`."""
        scores: Tensor = self.head(tokens)[..., 0]
        return scores

    def read(
        self, words: Words, tokens: Tensor, prior: Tensor, project: Project, alpha: float | None = None
    ) -> WordSignal:
        """See `TopDown`."""
        read = self.connector(F.normalize(words.states, dim=-1))
        alpha = self.alpha if alpha is None else alpha
        return WordSignal(self.layers[self.first :], read, words.bias(), alpha, similarity(prior, tokens))
