"""A baseline that is steered differently: ξ scales and shifts the outputs of the norms of a plain ViT (FiLM)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, BottomUp, StoredPass, VisionTokens, forget
from vlabs.models.backbones.vit import ViT, attend_to
from vlabs.models.registry import register
from vlabs.models.topdown import Words


class Embedded(BottomUp):
    """What B images share under every prior if there is no bottom-up pass: the embedding."""

    @property
    def cls(self) -> Tensor:
        """Not available: before any block, [cls] is the same for every image.

        Raises:
            ValueError: always.
        """
        raise ValueError("an encoder that is steered from its first block has no bottom-up [cls]")


@register
class FiLMViT(AbSViT):
    """Perez et al. (2018) inside a ViT: `norm(x) → norm(x) · (1 + γ_l(ξ)) + β_l(ξ)` for both norms of every block.

    γ and β are linear in ξ and start at zero, so the encoder starts as the plain ViT. There is one pass, and all of it
    depends on ξ: texts about one image share only the embedding.

    Args:
        architecture, options: as in `AbSViT`, without `topdown`, `start` and `keep`.

    Raises:
        UserError: the architecture is not one of timm's `VisionTransformer`s.
    """

    has_bottom_up = False
    needs_all = "model/topdown=film has no first pass that could say which patches"

    def __init__(self, architecture: str, **options: Any) -> None:
        super().__init__(architecture, **{"topdown": None} | options)
        if not isinstance(self.backbone, ViT):
            raise UserError(f"model/topdown=film modulates the norms of a plain ViT, which {architecture} is not")
        if self.start > 1:
            raise UserError(f"model.vision.start={self.start}: model/topdown=film has no second pass")
        self.modulations = nn.ModuleList(nn.Linear(self.width, 4 * self.width) for _ in self.backbone.widths)
        for layer in self.modulations:
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @property
    def needs_prior(self) -> bool:
        """Always: the output depends on ξ."""
        return True

    @property
    def looks_twice(self) -> bool:
        """Never: there is one pass."""
        return True

    def encode(
        self, images: Tensor | StoredPass, layers: Sequence[int] = (), record: list[Tensor] | None = None
    ) -> BottomUp:
        """The embedding of the patches, which is all that does not depend on ξ; it stands for z too."""
        embedded = images.embedded if isinstance(images, StoredPass) else self.backbone.embed(images)
        assert embedded is not None
        embedded = embedded.to(next(self.parameters()))
        return Embedded(embedded, embedded, embedded, embedded, [], embedded)

    def attend(
        self,
        bottom_up: BottomUp,
        prior: Tensor | None,
        image_index: Tensor | None = None,
        *,
        reconstruct: bool = False,
        layers: Sequence[int] = (),
        alpha: float | None = None,
        record: list[Tensor] | None = None,
        words: Words | None = None,
    ) -> VisionTokens:
        """The pass over the images, each under a prior; arguments as in `AbSViT`. There is no α."""
        if prior is None:
            raise ValueError("an encoder that is steered by a prior needs one")
        hidden = bottom_up.embedded if image_index is None else bottom_up.embedded.index_select(0, image_index)
        forget(record)
        for block, modulation in zip(self.vit.blocks, self.modulations, strict=True):
            scale, shift, mlp_scale, mlp_shift = modulation(prior).unsqueeze(1).chunk(4, dim=-1)
            qkv = block.attn.qkv(block.norm1(hidden) * (1 + scale) + shift)
            hidden = attend_to(block, hidden, qkv, record=record)
            hidden = hidden + block.drop_path2(block.ls2(block.mlp(block.norm2(hidden) * (1 + mlp_scale) + mlp_shift)))
        return VisionTokens(self.backbone.finish(hidden), hidden)
