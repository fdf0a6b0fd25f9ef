"""timm's `Eva`: ViTs with rotary positions, among them EVA02 and DINOv3."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, checkpoint_filter_fn
from torch import Tensor, nn

from vlabs.models.backbones.base import dropout_of, mix, split_heads
from vlabs.models.backbones.vit import TimmViT
from vlabs.models.lora import whole_weight
from vlabs.models.topdown import Kept, Steering, take


class RotaryViT(TimmViT):
    """A timm `Eva` of pre-norm blocks; q and k are rotated by place after the signal, which has none.

    Raises:
        ValueError: its blocks are others; the message says what of them.
    """

    network: Eva

    def __init__(self, network: Eva) -> None:
        for block in network.blocks:
            if type(block) is not EvaBlock or type(block.attn) not in (EvaAttention, AttentionRope):
                raise ValueError(f"its blocks are {type(block).__name__}, not pre-norm")
            if block.attn.gate is not None:
                raise ValueError("its attention is gated")
            if getattr(block.attn, "num_kv_groups", 1) > 1:
                raise ValueError("its heads share their values")
        if network.patch_drop is not None:
            raise ValueError("with rotary positions no patches can be dropped")
        super().__init__(network)

    def embed(self, images: Tensor) -> Tensor:
        """Patches, with positions where they are not only rotary; [cls] and registers first."""
        embedded: Tensor = self.network.norm_pre(self.network._pos_embed(self.network.patch_embed(images))[0])
        return embedded

    def positions(self, kept: Kept | None = None) -> Tensor | None:
        """Rotations of the patches, (N, 2d), or (depth, heads, N, 2d) where every block has its own.

        Of `kept` patches they are (n, 1, M + 1, 2d) and (depth, n, heads, M + 1, 2d).
        """
        rope = self.network.rope
        if rope is None:
            return None
        cached = hasattr(rope, "feat_shape") and not self.network.dynamic_img_size
        rotations: Tensor = rope.get_embed(shape=None if cached else list(self.grid_size))
        if kept is None:
            return rotations
        if rotations.ndim == 2:
            return take(rotations[None], None, kept).unsqueeze(1)
        depth, heads = rotations.shape[:2]
        # One token per patch, (1, N, depth · heads · 2d), so that `take` can choose. The mean token gets the mean
        # rotation.
        of_patches = take(rotations.permute(2, 0, 1, 3).flatten(1)[None], None, kept)
        return of_patches.unflatten(2, (depth, heads, -1)).permute(2, 0, 3, 1, 4)

    def qkv(self, index: int, x: Tensor) -> Tensor:
        """See `Backbone`."""
        block = self.network.blocks[index]
        return F.linear(block.norm1(x), self.qkv_weight(index), _bias(block.attn))

    def block(
        self,
        index: int,
        x: Tensor,
        positions: Any = None,
        steer: Steering | None = None,
        qkv: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """See `Backbone`."""
        block = self.network.blocks[index]
        attn = block.attn
        q, k, v = (self.qkv(index, x) if qkv is None else qkv).chunk(3, dim=-1)
        if steer is not None:
            q, k, v = steer(q, k, v, _bias(attn))
        q, k, v = (split_heads(t, attn.num_heads) for t in (q, k, v))
        q, k = attn.q_norm(q), attn.k_norm(k)
        if positions is not None:
            own = positions[index] if self.network.rope_mixed else positions
            q, k = (_rotated(t, own, attn).type_as(v) for t in (q, k))
        mixed = attn.proj_drop(attn.proj(attn.norm(mix(q, k, v, dropout_of(attn.attn_drop), record))))
        x = x + block.drop_path1(mixed if block.gamma_1 is None else block.gamma_1 * mixed)
        update = block.mlp(block.norm2(x))
        out: Tensor = x + block.drop_path2(update if block.gamma_2 is None else block.gamma_2 * update)
        return out

    def qkv_weight(self, index: int) -> Tensor:
        """See `Backbone`."""
        attn = self.network.blocks[index].attn
        if attn.qkv is not None:
            return whole_weight(attn.qkv)
        return torch.cat([whole_weight(layer) for layer in (attn.q_proj, attn.k_proj, attn.v_proj)])

    def value_weight(self, index: int) -> Tensor:
        """See `Backbone`."""
        attn = self.network.blocks[index].attn
        return whole_weight(attn.v_proj) if attn.qkv is None else whole_weight(attn.qkv).chunk(3)[2]

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's own renaming and resampling."""
        return checkpoint_filter_fn(state, self.network)


def _bias(attn: nn.Module) -> Tensor | None:
    """Of W_qkv, (3D,): k often has none, which is zeros."""
    if attn.qkv is not None and isinstance(attn, EvaAttention):
        return None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    if attn.qkv is not None:
        return attn.qkv.bias  # type: ignore[union-attr,return-value]
    if attn.v_proj.bias is None:  # type: ignore[union-attr]
        return None
    parts = [layer.bias for layer in (attn.q_proj, attn.k_proj, attn.v_proj)]  # type: ignore[union-attr]
    return torch.cat([torch.zeros_like(parts[2]) if part is None else part for part in parts])  # type: ignore[arg-type]


def _rotated(x: Tensor, positions: Tensor, attn: nn.Module) -> Tensor:
    """(n, heads, N, d) with the patches rotated by place."""
    prefix: int = attn.num_prefix_tokens  # type: ignore[assignment]
    patches = apply_rot_embed_cat(x[:, :, prefix:], positions, half=attn.rotate_half)
    return torch.cat([x[:, :, :prefix], patches], dim=2)
