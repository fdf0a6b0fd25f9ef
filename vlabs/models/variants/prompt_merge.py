"""Text that a Swin reads where it merges tokens, before its last stage (VisFocus)."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Le
from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.models.backbones import Backbone
from vlabs.models.registry import register
from vlabs.models.topdown import Project, Signal, TopDown, Words, similarity
from vlabs.utils.options import Size


class MergeSignal(Signal):
    """Words (n, T, D_text) that the merged tokens read.

    Args:
        attention: attention of tokens of 4D over words.
        words: (n, T, D_text).
        padding: (n, T), true for padding.
        alpha: scale.
        weights: (n, N), the similarity of ξ and the tokens.
    """

    def __init__(self, attention: nn.Module, words: Tensor, padding: Tensor, alpha: float, weights: Tensor) -> None:
        self.attention, self.words, self.padding, self.alpha, self.similarity = (
            attention,
            words,
            padding,
            alpha,
            weights,
        )

    def merge(self, block: int, x: Tensor) -> Tensor:
        """See `Signal`."""
        if block:
            return x
        x = x.expand(self.words.shape[0], -1, -1)
        read, _ = self.attention(x, self.words, self.words, key_padding_mask=self.padding, need_weights=False)
        mixed: Tensor = x + self.alpha / 2 * (read - x)
        return mixed


@register
class PromptMerge(TopDown):
    """Where a Swin merges 2 × 2 tokens before its last stage, they read all words (Abramovich et al., VisFocus, 2024).

    `x ← (1 − α/2) x + α/2 CrossAttention(x, words)` on the four tokens side by side, (n, N, 4D), before the merging's
    norm and map: half of each with α = 1. The last stage alone is computed for every text. ξ is only the map, as
    in `CrossAttention`.

    Args:
        alpha: scale α; with 0, the second pass is the first.
        num_heads: attention heads.
    """

    needs_decoders = False
    reads_words = True
    by_similarity = False
    learns_prior = False
    changes_first = True
    most_alpha = 2.0

    def __init__(self, alpha: Annotated[float, Ge(0), Le(2)] = 1.0, num_heads: Size = 8) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.num_heads = num_heads

    def build(self, backbone: Backbone, start: int) -> None:
        """See `TopDown`.

        Raises:
            UserError: the encoder merges no tokens, or `start` is not the first block of its last stage.
        """
        last = max(getattr(backbone, "merges", {0: None})) + 1
        if last == 1:
            raise UserError(
                "model/topdown=prompt_merge reads words where a Swin merges tokens: choose a Swin, such as "
                "model/vision=swin_b"
            )
        if start != last:
            raise UserError(f"model/topdown=prompt_merge begins at the last stage: pass model.vision.start={last}")

    def hear(self, text_dim: int, backbone: Backbone, start: int) -> None:
        """See `TopDown`.

        Raises:
            UserError: the heads do not divide the width of the merged tokens.
        """
        width = 4 * backbone.widths[start - 2]
        if width % self.num_heads:
            raise UserError(
                f"model.vision.topdown.num_heads={self.num_heads} must divide the width {width} of the four tokens "
                "that are merged"
            )
        self.attention = nn.MultiheadAttention(width, self.num_heads, kdim=text_dim, vdim=text_dim, batch_first=True)

    def read(
        self, words: Words, tokens: Tensor, prior: Tensor, project: Project, alpha: float | None = None
    ) -> MergeSignal:
        """See `TopDown`."""
        alpha = self.alpha if alpha is None else alpha
        return MergeSignal(self.attention, words.states, words.mask == 0, alpha, similarity(prior, tokens))
