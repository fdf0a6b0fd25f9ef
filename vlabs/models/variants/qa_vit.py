"""Text that joins the image encoder's own attention as further keys and values (QA-ViT)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.models.backbones import Backbone
from vlabs.models.registry import register
from vlabs.models.topdown import Project, Signal, TopDown, Words, similarity
from vlabs.utils.options import NonNegative


class WordMap(nn.Sequential):
    """`Linear(GELU(Linear(LN(t))))`, from the text's width to the encoder's."""

    def __init__(self, text_dim: int, width: int) -> None:
        super().__init__(nn.LayerNorm(text_dim), nn.Linear(text_dim, text_dim), nn.GELU(), nn.Linear(text_dim, width))


class JoinedSignal(Signal):
    """Words (n, T, D) that are keys and values of every block, and a second output map with a gate.

    Args:
        keys, values: (n, T, D) for every block.
        share: (n, 1, 1, T), added to the scores of the words: -inf for padding.
        outputs: for every block W'_o, (D, D), and tanh(α g).
        weights: (n, N), the similarity of ξ and the tokens.
    """

    def __init__(
        self,
        keys: list[Tensor],
        values: list[Tensor],
        share: Tensor,
        outputs: list[tuple[Tensor, Tensor]],
        weights: Tensor,
    ) -> None:
        self.keys, self.values, self.share, self.outputs, self.similarity = keys, values, share, outputs, weights

    def steer(self, block: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Signal`."""
        joined = [(k, self.keys[block]), (v, self.values[block])]
        k, v = (torch.cat([of.expand(words.shape[0], -1, -1), words], dim=1) for of, words in joined)
        self.num_tokens = q.shape[1]
        return q, k, v

    def scores(self, block: int) -> Tensor:
        """See `Signal`."""
        return F.pad(self.share, (self.num_tokens, 0))

    def project(self, block: int, mixed: Tensor, out: Tensor) -> Tensor:
        """See `Signal`."""
        weight, gate = self.outputs[block]
        return out + gate * F.linear(mixed, weight)


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
    plain = True

    def __init__(self, alpha: NonNegative = 1.0) -> None:
        super().__init__()
        self.alpha = float(alpha)

    def hear(self, text_dim: int, backbone: Backbone, start: int) -> None:
        """See `TopDown`."""
        blocks = range(start - 1, backbone.depth)
        self.maps = nn.ModuleList(WordMap(text_dim, backbone.widths[index]) for index in blocks)
        self.outputs = nn.ParameterList(backbone.output_weight(index).detach().clone() for index in blocks)
        self.gates = nn.ParameterList(torch.zeros(()) for _ in blocks)

    def read(
        self, words: Words, tokens: Tensor, prior: Tensor, project: Project, alpha: float | None = None
    ) -> JoinedSignal:
        """See `TopDown`."""
        alpha = self.alpha if alpha is None else alpha
        keys, values, outputs = [], [], []
        for block, (layer, weight, gate) in enumerate(zip(self.maps, self.outputs, self.gates, strict=True)):
            _, key, value = project(block, layer(words.states)).chunk(3, dim=-1)
            keys.append(key)
            values.append(value)
            outputs.append((weight, torch.tanh(alpha * gate)))
        share = words.bias() + (math.log(alpha) if alpha > 0 else -math.inf)
        return JoinedSignal(keys, values, share, outputs, similarity(prior, tokens))
