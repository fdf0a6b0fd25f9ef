"""What a prior adds inside the attention of every block of the image encoder.

The feedback decoders are linear and the modulation of the paper is one scalar a token, so the top-down signal in value
space factors exactly: with `C_l = W_v B_l A_l A_{l+1} … A_L` (A_L acts first),

    W_v td_l = C_l (w_i z_i) = w_i · (C_l z)_i

A variant says what the scalars `w_i` and the directions `C_l ·` are. It never sees a whole top-down token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.models.registry import register

Feedback = Callable[[Tensor], list[Tensor]]
"""Takes tokens (…, D), returns `C_l tokens` for every block, first block first, without the bias of W_v."""


class FeedbackDecoder(nn.Module):
    """The decoder of one block: `linear` is A_l, the link of the chain; `linear2` is B_l, what the block is given.

    Names and the missing biases are those of the released AbSViT code, whose checkpoints load into them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        self.linear2 = nn.Linear(dim, dim, bias=False)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.trunc_normal_(self.linear2.weight, std=0.02)


@dataclass
class TopDownSignal:
    """The top-down signal of all blocks, factored: `scale · directions[l]`.

    Attributes:
        scale: (n, N, 1), the scalar w_i of every token of every prior.
        directions: for every block (B, N, D) where it depends on the image, (n, 1, D) where it depends on the prior.
        image_index: (n,) the image of each prior; None where `directions` are per prior, or B is n or 1.
        similarity: (n, N), cosine of prior and token clamped to [0, 1]: where the prior asks to look.
    """

    scale: Tensor
    directions: Sequence[Tensor]
    image_index: Tensor | None
    similarity: Tensor

    def value(self, block: int) -> Tensor:
        """`W_v td` of one block without the bias b_v, (n, N, D)."""
        direction = self.directions[block]
        if self.image_index is not None:
            direction = direction.index_select(0, self.image_index)
        return self.scale * direction


def similarity(prior: Tensor, tokens: Tensor) -> Tensor:
    """Cosine of each prior with each of its tokens, clamped to [0, 1] (paper, section 5.1).

    Args:
        prior: (n, D).
        tokens: (n, N, D), or (1, N, D) where all priors are about one image.

    Returns:
        (n, N).
    """
    cosine = torch.einsum("nd,nid->ni", F.normalize(prior, dim=-1), F.normalize(tokens, dim=-1))
    return cosine.clamp(0, 1)


@register
class AbSTopDown(nn.Module):
    """The paper's modulation, `z_i → α · clamp(cos(ξ, z_i), 0, 1) · z_i` (section 5.1, "Design of token modulation").

    `C_l z` does not depend on the prior: it is computed once an image, and a prior costs N scalars.

    Args:
        alpha: α, the scale of the top-down signal: 1 on ImageNet, 10 for multi-object scenes and language.
    """

    def __init__(self, alpha: float = 10.0) -> None:
        super().__init__()
        self.alpha = float(alpha)

    def prepare(self, tokens: Tensor, feedback: Feedback) -> list[Tensor]:
        """What no prior changes: `C_l z` of every block, each (B, N, D)."""
        return feedback(tokens)

    def signal(
        self, tokens: Tensor, prior: Tensor, prepared: list[Tensor], image_index: Tensor | None, feedback: Feedback
    ) -> TopDownSignal:
        """The signal of n priors. `tokens` (n, N, D) are z of each prior's image; `prior` is (n, D)."""
        weights = similarity(prior, tokens)
        return TopDownSignal((self.alpha * weights).unsqueeze(-1), prepared, image_index, weights)


@register
class ReleasedTopDown(nn.Module):
    """The modulation of the released vision-language code, `5 · clamp(cos(ξ, z_i), 0, 1) · (z_i · ξ) ξ`.

    Neither z nor ξ is normalised outside the cosine. The direction is ξ itself, so a text costs L vectors `C_l ξ`
    and no token is decoded.

    Args:
        alpha: the factor, 5 in the released code.
    """

    def __init__(self, alpha: float = 5.0) -> None:
        super().__init__()
        self.alpha = float(alpha)

    def prepare(self, tokens: Tensor, feedback: Feedback) -> list[Tensor]:
        """Nothing: no part of this signal belongs to the image alone."""
        return []

    def signal(
        self, tokens: Tensor, prior: Tensor, prepared: list[Tensor], image_index: Tensor | None, feedback: Feedback
    ) -> TopDownSignal:
        """The signal of n priors. `tokens` (n, N, D) are z of each prior's image; `prior` is (n, D)."""
        weights = similarity(prior, tokens)
        scale = self.alpha * weights * torch.einsum("nd,nid->ni", prior, tokens)
        return TopDownSignal(scale.unsqueeze(-1), feedback(prior.unsqueeze(1)), None, weights)


TopDown = AbSTopDown | ReleasedTopDown
