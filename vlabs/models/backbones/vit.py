"""timm's `VisionTransformer`: ViT, DeiT, CLIP, SigLIP, DINOv2, with or without [cls] and registers."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from vlabs.models.backbones.base import Backbone, dropout_of, mix, split_heads
from vlabs.models.lora import whole_weight
from vlabs.models.topdown import Steering


class AttentiveProbe(nn.Module):
    """Pools the tokens of a frozen encoder: M learned queries read them without a map of keys.

    `A = softmax(q xᵀ / √D)`, and the part j of `W_v x` is averaged with the weights of query j (Psomas et al.,
    Attention, Please!, 2025).

    Args:
        dim: D, width of the tokens.
        queries: M at most; the largest number up to it that divides D.
    """

    def __init__(self, dim: int, queries: int = 32) -> None:
        super().__init__()
        count = max(n for n in range(1, queries + 1) if dim % n == 0)
        self.query = nn.Parameter(torch.empty(count, dim))
        self.value = nn.Linear(dim, dim, bias=False)
        nn.init.trunc_normal_(self.query, std=0.02)
        nn.init.trunc_normal_(self.value.weight, std=dim**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """One vector (B, D) for tokens (B, N, D)."""
        read = (self.query @ tokens.mT / tokens.shape[-1] ** 0.5).softmax(dim=-1)  # (B, M, N)
        parts = self.value(tokens).unflatten(-1, (len(self.query), -1))  # (B, N, M, D / M)
        return torch.einsum("bmn,bnmd->bmd", read, parts).flatten(1)


class TimmViT(Backbone):
    """What timm's two classes of ViTs have in common: where things are, the norm and the head."""

    network: Any
    takes_some = True

    def __init__(self, network: Any) -> None:
        self.network = network
        self.widths = [network.embed_dim] * len(network.blocks)
        self.num_prefix_tokens = network.num_prefix_tokens
        rows, columns = network.patch_embed.grid_size
        self.grid_size = int(rows), int(columns)
        self.has_cls = network.cls_token is not None and network.global_pool == "token"

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm; where the mean token is classified, the norm is after the mean, and there is none here."""
        tokens: Tensor = self.network.norm(hidden)
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """See `Backbone`."""
        pooled: Tensor = self.network.forward_head(tokens, pre_logits=True)
        return pooled

    def classify(self, tokens: Tensor) -> Tensor:
        """See `Backbone`."""
        logits: Tensor = self.network.forward_head(tokens)
        return logits


class ViT(TimmViT):
    """A timm `VisionTransformer` of pre-norm blocks.

    Raises:
        ValueError: its blocks are others; the message says what of them.
    """

    network: VisionTransformer

    def __init__(self, network: VisionTransformer) -> None:
        for block in network.blocks:
            if type(block) is not Block or type(block.attn) is not Attention:
                raise ValueError(f"its blocks are {type(block).__name__}, not pre-norm")
            if getattr(block.attn, "gate", None) is not None:
                raise ValueError("its attention is gated")
        super().__init__(network)

    def embed(self, images: Tensor) -> Tensor:
        """Patches with positions; [cls] and registers first."""
        vit = self.network
        embedded: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        return embedded

    def place_of(self, index: int) -> tuple[int, tuple[int, int]]:
        """See `Backbone`."""
        return self.num_prefix_tokens, self.grid_size

    def qkv(self, index: int, x: Tensor) -> Tensor:
        """See `Backbone`."""
        block = self.network.blocks[index]
        qkv: Tensor = block.attn.qkv(block.norm1(x))
        return qkv

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
        if qkv is None:
            normed = block.norm1(x)
            qkv = attn.qkv(normed if steer is None else steer.norm(0, normed))
        q, k, v = qkv.split(attn.attn_dim, dim=-1)
        if steer is not None:
            q, k, v = steer(q, k, v, attn.qkv.bias)
        q, k, v = (split_heads(t, attn.num_heads) for t in (q, k, v))
        scores = None if steer is None else steer.scores()
        mixed = attn.norm(mix(attn.q_norm(q), attn.k_norm(k), v, dropout_of(attn.attn_drop), record, scores))
        out = attn.proj(mixed) if steer is None else steer.project(mixed, attn.proj(mixed))
        x = x + block.drop_path1(block.ls1(attn.proj_drop(out)))
        normed = block.norm2(x)
        updated: Tensor = x + block.drop_path2(block.ls2(block.mlp(normed if steer is None else steer.norm(1, normed))))
        return updated

    def qkv_weight(self, index: int) -> Tensor:
        """See `Backbone`."""
        return whole_weight(self.network.blocks[index].attn.qkv)

    def qkv_bias(self, index: int) -> Tensor | None:
        """See `Backbone`."""
        return self.network.blocks[index].attn.qkv.bias

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's own renaming, OpenAI's names of CLIP too; resampled as METER does, without smoothing."""
        converted: dict[str, Tensor] = checkpoint_filter_fn(state, self.network, antialias=False)
        return converted
