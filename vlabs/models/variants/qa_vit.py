"""Text that joins the image encoder's own attention as further keys and values (QA-ViT)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.models.backbones import Backbone
from vlabs.models.registry import register
from vlabs.models.topdown import Project, Signal, TopDown, Words, per_block, similarity
from vlabs.utils.options import NonNegative


class JoinedLayer(nn.Module):
    """What one block reads the words with: their map, W'_o and its gate.

    Args:
        text_dim: width of the words.
        width: D of the block.
    """

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__()
        self.map = nn.Sequential(
            nn.LayerNorm(text_dim), nn.Linear(text_dim, text_dim), nn.GELU(), nn.Linear(text_dim, width)
        )
        # W'_o less W_o: it starts as W_o, wherever the weights of the encoder come from.
        self.change = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.change.weight)
        self.gate = nn.Parameter(torch.zeros(()))


class JoinedSignal(Signal):
    """Words (n, T, D) that are keys and values of every block, and a second output map with a gate.

    Args:
        layers: of the blocks.
        keys, values: (n, T, D) for every block.
        share: (n, 1, 1, T), added to the scores of the words: -inf for padding.
        alpha: a factor of the gates.
        weights: (n, N), the similarity of ξ and the tokens.
    """

    def __init__(
        self,
        layers: list[JoinedLayer],
        keys: list[Tensor],
        values: list[Tensor],
        share: Tensor,
        alpha: float,
        weights: Tensor,
    ) -> None:
        self.layers, self.keys, self.values = layers, keys, values
        self.share, self.alpha, self.similarity = share, alpha, weights

    def steer(self, block: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Signal`."""
        joined = [(k, self.keys[block]), (v, self.values[block])]
        k, v = (torch.cat([of.expand(words.shape[0], -1, -1), words], dim=1) for of, words in joined)
        # `scores` is asked next, of the same block, and fills up to this number.
        self.num_tokens = q.shape[1]
        return q, k, v

    def scores(self, block: int) -> Tensor:
        """See `Signal`."""
        return F.pad(self.share, (self.num_tokens, 0))

    def project(self, block: int, mixed: Tensor, out: Tensor) -> Tensor:
        """See `Signal`."""
        layer = self.layers[block]
        # W'_o a, as W_o a (with its bias) and the change from it.
        more: Tensor = out + layer.change(mixed)
        return out + torch.tanh(self.alpha * layer.gate) * more


@register
class QAViT(TopDown):
    """The words of the text are keys and values beside those of the image (Ganz et al., QA-ViT, CVPR 2024).

    In every block of the second pass, with q_j = Linear(GELU(Linear(LN(t_j)))) of maps of its own: keys and values are
    W_k and W_v of [norm1(x); q_j], queries are those of x, and `out = W_o a + tanh(α g) · W'_o a`. W'_o starts as W_o,
    and g at 0. Padding is masked. The words are read from the first step: the second pass does not start as the first.

    QA-ViT freezes the encoder, and has this in its upper half: `model.vision.start`. ξ is only the map, as in
    `CrossAttention`.

    Args:
        alpha: a factor of the gates, and of the words' part in the attention before it is normalized; not below 0.
    """

    needs_decoders = False
    reads_words = True
    by_similarity = False
    learns_prior = False
    plain = True

    def __init__(self, alpha: NonNegative = 1.0) -> None:
        super().__init__()
        self.alpha = float(alpha)

    def hear(self, text_dim: int, backbone: Backbone, start: int) -> None:
        """See `TopDown`."""
        self.first = start - 1
        self.layers = per_block(backbone, start, lambda width: JoinedLayer(text_dim, width))

    def read(
        self, words: Words, tokens: Tensor, prior: Tensor, project: Project, alpha: float | None = None
    ) -> JoinedSignal:
        """See `TopDown`."""
        alpha = self.alpha if alpha is None else alpha
        layers: list[JoinedLayer] = list(self.layers)[self.first :]  # type: ignore[assignment]
        read = [project(block, layer.map(words.states)).chunk(3, dim=-1) for block, layer in enumerate(layers)]
        # exp(score + log α) = α · exp(score): α times the words' part before the softmax divides by the sum.
        share = words.bias() + (math.log(alpha) if alpha > 0 else -math.inf)
        keys, values = [key for _, key, _ in read], [value for _, _, value in read]
        return JoinedSignal(layers, keys, values, share, alpha, similarity(prior, tokens))
