"""Images as a text sees them: attention over the patches that the text asks (FLAIR), and its loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.models.registry import register
from vlabs.utils.options import Size


@register
class TextPool(nn.Module):
    """Text-conditioned attention pooling (Xiao et al., FLAIR, CVPR 2025): `v_bn = MHA(LN(W ξ_n), LN(z_b), LN(z_b))`.

    Beside the patches there is a key of zeros, with a value of zeros, for texts that ask for nothing in an image. An
    image is scored by `e^s cos(v_bn, ξ_n) + c`.

    Args:
        width: D of the patches and of ξ.
        num_heads: attention heads; FLAIR has 8.

    Raises:
        UserError: the heads do not divide D.
    """

    def __init__(self, width: int, num_heads: Size = 8) -> None:
        super().__init__()
        if width % num_heads:
            raise UserError(f"model.pool_heads={num_heads} must divide the width {width} of the image encoder")
        self.query = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, add_zero_attn=True, batch_first=True)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    @property
    def is_new(self) -> bool:
        """Whether it was never trained, and ranks at random: these biases begin at zero."""
        return not bool(self.attention.in_proj_bias.any())

    def forward(self, patches: Tensor, prior: Tensor) -> Tensor:
        """Cosines (B, n) of B images, each as n texts see it, and these texts.

        Args:
            patches: z of the patches, (B, N, D).
            prior: ξ, (n, D).
        """
        z = self.norm(patches)
        asked = self.query(prior).expand(len(patches), -1, -1)  # (B, n, D)
        pooled, _ = self.attention(asked, z, z, need_weights=False)
        return F.cosine_similarity(pooled, prior, dim=2)

    def loss(self, cls: Tensor, patches: Tensor, prior: Tensor, image_index: Tensor | None) -> Tensor:
        """The sigmoid loss of all pairs, `-Σ_bn log σ(± (e^s cos + c)) / n`: + for an image's own texts, − for others.

        The mean of two: of the pooled patches, and of [cls] instead (multi-positive sigmoid loss). Zero without texts.

        Args:
            cls: (B, D), what stands for the images.
            patches, prior: as in `forward`, from the bottom-up pass.
            image_index: (n,), the image of each text; None if text i is about image i.
        """
        n = len(prior)
        if not n:
            return prior.sum() + 0 * (patches.sum() + torch.stack([one.sum() for one in self.parameters()]).sum())
        index = torch.arange(n, device=prior.device) if image_index is None else image_index
        sign = 2.0 * (torch.arange(len(patches), device=prior.device)[:, None] == index) - 1  # (B, n)
        # (2, B, n): of the pooled patches, and of [cls].
        like = torch.stack([self(patches, prior), F.normalize(cls, dim=1) @ F.normalize(prior, dim=1).T]).float()
        return -F.logsigmoid(sign * (self.log_scale.exp() * like + self.bias)).sum() / (2 * n)
