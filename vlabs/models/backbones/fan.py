"""FAN-ViT: Understanding the Robustness in Vision Transformers (Zhou et al., ICML 2022), under feedback.

An XCiT without its cross-covariance: self-attention between tokens as in a ViT, and instead of the MLP a gate
for every channel that an MLP with a local convolution is multiplied by. A [cls] is put in front of the patches for the
last two blocks, in which it alone attends. Stem, Fourier positions, local convolution and class attention are timm's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models.xcit import LPI, ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier
from torch import Tensor, nn

from vlabs.models.backbones.base import Backbone, Merge, mix, split_heads
from vlabs.models.lora import whole_weight
from vlabs.models.topdown import Steering

_norm = partial(nn.LayerNorm, eps=1e-6)


class TokenAttention(nn.Module):
    """The layers of self-attention, named as in the released checkpoints."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)


class LocalMlp(nn.Module):
    """An MLP without an activation but that of its local convolution, which it adds to what it has."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = LPI(hidden)
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of tokens (n, rows · columns, D)."""
        x = self.fc1(x)
        out: Tensor = self.fc2(x + self.gamma * self.dwconv(x, *grid))
        return out


class ChannelAttention(nn.Module):
    """`t_h · σ(Σ_i softmax_i(q)_ic · k_ih) · norm(mlp(x))_ic` for channel c of head h.

    The query W_q x and the key x are each made a distribution over the tokens i; k_ih is the mean over the head's
    channels. One gate a channel, the same for all tokens.
    """

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.q = nn.Linear(width, width)
        self.mlp_v = LocalMlp(width, hidden)
        self.norm_v = nn.LayerNorm(width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of tokens (n, N, D)."""
        query = split_heads(self.q(x), self.num_heads).softmax(dim=-2)  # (n, heads, N, d)
        key = split_heads(x, self.num_heads).softmax(dim=-2).mean(dim=-1, keepdim=True)  # (n, heads, N, 1)
        gate = (query.transpose(-1, -2) @ key).sigmoid() * self.temperature  # (n, heads, d, 1)
        out: Tensor = self.norm_v(self.mlp_v(x, grid)) * gate.flatten(1).unsqueeze(1)
        return out


class FANBlock(nn.Module):
    """Attention between tokens, then between channels; pre-norm, each scaled by a learned γ."""

    def __init__(self, width: int, num_heads: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(width), _norm(width)
        self.attn = TokenAttention(width, num_heads)
        self.mlp = ChannelAttention(width, num_heads, hidden)
        self.gamma1, self.gamma2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.drop_path = DropPath(drop_path)


class FANNetwork(nn.Module):
    """The weights; `FAN` says how they are run.

    Args:
        img_size, patch_size: sides in pixels; the patch's is 8 or 16.
        embed_dim, depth, num_heads, mlp_ratio: of the blocks.
        cls_depth: blocks of class attention after them.
        drop_path_rate: the same for every block.
        num_classes: of the head; 0 for none.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        cls_depth: int = 2,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        side = img_size // patch_size
        self.grid_size = side, side
        self.patch_embed = ConvPatchEmbed(img_size, patch_size, 3, embed_dim)
        self.pos_embed = PositionalEncodingFourier(dim=embed_dim)
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = nn.ModuleList(FANBlock(embed_dim, num_heads, hidden, drop_path_rate) for _ in range(depth))
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, mlp_ratio, qkv_bias=True, norm_layer=_norm, tokens_norm=True)
            for _ in range(cls_depth)
        )
        self.norm = _norm(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init)
        nn.init.trunc_normal_(self.cls_token, std=0.02)


def _init(module: nn.Module) -> None:
    """As FAN starts them: linear maps of deviation 0.02, biases 0; convolutions stay as PyTorch starts them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class FAN(Backbone):
    """A FAN-ViT. Class attention takes a signal as every block does; before it, feedback leaves [cls] out."""

    network: FANNetwork
    num_prefix_tokens = 1
    has_cls = True
    is_even = False

    def __init__(self, network: FANNetwork) -> None:
        self.network = network
        self.first_cls = len(network.blocks)  # from this block on there is a [cls]
        self.widths = [int(network.cls_token.shape[-1])] * (self.first_cls + len(network.cls_attn_blocks))
        self.grid_size = network.grid_size

    def embed(self, images: Tensor) -> Tensor:
        """The convolutional stem, and where each patch is."""
        patches, grid = self.network.patch_embed(images)
        places = self.network.pos_embed(1, *grid).flatten(2).transpose(1, 2)
        embedded: Tensor = patches + places
        return embedded

    def enter(self, index: int, x: Tensor, merge: Merge | None = None) -> Tensor:
        """[cls] is put in front before the first block of class attention."""
        if index != self.first_cls:
            return x
        return torch.cat([self.network.cls_token.expand(x.shape[0], -1, -1), x], dim=1)

    def place_of(self, index: int) -> tuple[int, tuple[int, int]]:
        """See `Backbone`."""
        return 0, self.grid_size

    def _block(self, index: int) -> Any:
        if index < self.first_cls:
            return self.network.blocks[index]
        return self.network.cls_attn_blocks[index - self.first_cls]

    def qkv(self, index: int, x: Tensor) -> Tensor:
        """See `Backbone`."""
        block = self._block(index)
        x, attn = block.norm1(x), block.attn
        parts = [attn.q(x), attn.kv(x)] if index < self.first_cls else [attn.q(x), attn.k(x), attn.v(x)]
        return torch.cat(parts, dim=-1)

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
        block = self._block(index)
        q, k, v = (self.qkv(index, x) if qkv is None else qkv).chunk(3, dim=-1)
        if steer is not None:
            q, k, v = steer(q, k, v, self._bias(index))
        if index >= self.first_cls:
            q = q[:, :1]  # [cls] alone asks
        q, k, v = (split_heads(t, block.attn.num_heads) for t in (q, k, v))
        mixed = block.attn.proj(mix(q, k, v, record=record))
        if index < self.first_cls:
            x = x + block.drop_path(block.gamma1 * mixed)
            out: Tensor = x + block.drop_path(block.gamma2 * block.mlp(block.norm2(x), self.grid_size))
            return out
        # All tokens are normed twice and doubled, as in the released weights; [cls] alone attends and has an MLP.
        others = block.norm1(x)[:, 1:].expand(mixed.shape[0], -1, -1)
        x = block.norm2(x + block.gamma1 * torch.cat([mixed, others], dim=1))
        return x + torch.cat([block.gamma2 * block.mlp(x[:, :1]), x[:, 1:]], dim=1)

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        tokens: Tensor = self.network.norm(hidden)
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """[cls]."""
        return tokens[:, 0]

    def classify(self, tokens: Tensor) -> Tensor:
        """See `Backbone`."""
        logits: Tensor = self.network.head(tokens[:, 0])
        return logits

    def _maps(self, index: int) -> list[nn.Linear]:
        attn = self._block(index).attn
        return [attn.q, attn.kv] if index < self.first_cls else [attn.q, attn.k, attn.v]

    def _bias(self, index: int) -> Tensor:
        return torch.cat([layer.bias for layer in self._maps(index)])

    def qkv_weight(self, index: int) -> Tensor:
        """See `Backbone`."""
        return torch.cat([whole_weight(layer) for layer in self._maps(index)])

    def value_weight(self, index: int) -> Tensor:
        """See `Backbone`."""
        # The last map is that of k and v together, or of v alone: W_v is its last D rows.
        return whole_weight(self._maps(index)[-1])[-self.widths[index] :]

    def back(self, index: int, tokens: Tensor, decoder: nn.Module) -> Tensor:
        """Without [cls], which the blocks before do not have."""
        return tokens[..., 1:, :] if index == self.first_cls else tokens

    def spread(self, index: int, values: Tensor) -> Tensor:
        """Without that of [cls], which the blocks before do not have."""
        return values[:, 1:] if index < self.first_cls else values

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the released FAN; in some of its files the q, k and v of class attention are one map."""
        converted: dict[str, Tensor] = {}
        for name, value in state.items():
            name = name.replace("pos_embeder.", "pos_embed.")
            if name.startswith("cls_attn_blocks.") and ".attn.qkv." in name:
                for part, letter in zip(value.chunk(3), "qkv", strict=True):
                    converted[name.replace(".qkv.", f".{letter}.")] = part
            else:
                converted[name] = value
        return converted
