"""RVT: Towards Robust Vision Transformer (Mao et al., CVPR 2022), under feedback.

Convolutions in the stem and in the MLPs know where things are, so there are no position embeddings and no [cls]; the
mean token is classified. RVT-Ti pools its tokens before the last two blocks. `_plus` (RVT* in the paper) scales the
attention of its first blocks by a learned share for every pair of places.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vlabs.models.backbones.base import (
    Backbone,
    FeedbackDecoder,
    Merge,
    PooledDecoder,
    mix,
    split_heads,
    to_map,
    to_tokens,
)
from vlabs.models.lora import whole_weight
from vlabs.models.topdown import Steering

PATCH = 16  # px, of the stem


class ConvMlp(nn.Module):
    """An MLP over (n, N, D) tokens of a grid, with a depth-wise 3×3 convolution between its layers."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.fc2 = nn.Conv2d(hidden, width, 1)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of tokens (n, rows · columns, D)."""
        x = F.gelu(self.bn1(self.fc1(to_map(x, grid))))
        x = F.gelu(self.bn2(self.dwconv(x)))
        return to_tokens(self.bn3(self.fc2(x)))


class PlainMlp(nn.Module):
    """The MLP of a ViT, which RVT-B has."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Of tokens (n, N, D); `grid` is not read."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class RVTAttention(nn.Module):
    """Self-attention, its scores scaled by place where `places` says for how many."""

    def __init__(self, width: int, num_heads: int, places: int | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.att_mask = None if places is None else nn.Parameter(torch.zeros(num_heads, places, places))


class RVTBlock(nn.Module):
    """A pre-norm block."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, drop_path: float, local: bool, places: int | None
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = RVTAttention(width, num_heads, places)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = (ConvMlp if local else PlainMlp)(width, hidden)
        self.drop_path = DropPath(drop_path)


class RVTNetwork(nn.Module):
    """The weights; `RVT` says how they are run.

    Args:
        img_size: side of the square input in pixels, a multiple of 16.
        widths, depths, heads: of every stage; the grid is halved between two.
        mlp_ratio: width within the MLP over the block's.
        local_mlp: a depth-wise convolution in every MLP.
        masked_blocks: the first blocks whose attention is scaled by place.
        drop_path_rate: of the last block, rising from 0.
        num_classes: of the head; 0 for none.
    """

    def __init__(
        self,
        img_size: int = 224,
        widths: Sequence[int] = (384,),
        depths: Sequence[int] = (12,),
        heads: Sequence[int] = (6,),
        mlp_ratio: float = 4.0,
        local_mlp: bool = True,
        masked_blocks: int = 0,
        drop_path_rate: float = 0.0,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        side, depth = img_size // PATCH, sum(depths)
        self.starts = [sum(depths[:stage]) for stage in range(1, len(depths))]  # blocks before which it is pooled
        self.grids: list[tuple[int, int]] = []
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 7, stride=2, padding=2),
            nn.BatchNorm2d(32),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(32, widths[0], 4, stride=4),
        )
        self.blocks = nn.ModuleList()
        self.pools = nn.ModuleList()
        for stage, (width, of_stage, num_heads) in enumerate(zip(widths, depths, heads, strict=True)):
            for _ in range(of_stage):
                index = len(self.blocks)
                places = side * side if index < masked_blocks and stage == 0 else None
                rate = drop_path_rate * index / depth
                block = RVTBlock(width, num_heads, round(width * mlp_ratio), rate, local_mlp, places)
                self.blocks.append(block)
                self.grids.append((side, side))
            if stage + 1 < len(widths):
                self.pools.append(nn.Conv2d(width, widths[stage + 1], 3, stride=2, padding=1, groups=width))
                side = (side + 1) // 2
        self.norm = nn.LayerNorm(widths[-1], eps=1e-6)
        self.head = nn.Linear(widths[-1], num_classes) if num_classes else nn.Identity()


class RVT(Backbone):
    """An RVT; feedback goes from the pooled blocks to those before through a linear map of every token to its four.

    Raises:
        ValueError: a grid that is pooled has an odd side.
    """

    network: RVTNetwork
    num_prefix_tokens = 0
    has_cls = False

    def __init__(self, network: RVTNetwork) -> None:
        self.network = network
        self.widths = [int(block.norm1.normalized_shape[0]) for block in network.blocks]  # type: ignore[index,union-attr]
        self.grid_size = network.grids[-1]
        self.is_even = not network.starts
        if any(network.grids[start - 1][0] % 2 for start in network.starts):
            raise ValueError("its grid is pooled two by two, and has an odd side: choose another image size")

    def embed(self, images: Tensor) -> Tensor:
        """The convolutional stem."""
        return to_tokens(self.network.stem(images))

    def enter(self, index: int, x: Tensor, merge: Merge | None = None) -> Tensor:
        """Tokens are pooled between stages."""
        if index not in self.network.starts:
            return x
        pool = self.network.pools[self.network.starts.index(index)]
        return to_tokens(pool(to_map(x, self.network.grids[index - 1])))

    def place_of(self, index: int) -> tuple[int, tuple[int, int]]:
        """See `Backbone`."""
        return 0, self.network.grids[index]

    def qkv(self, index: int, x: Tensor) -> Tensor:
        """See `Backbone`."""
        block: Any = self.network.blocks[index]
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
        block: Any = self.network.blocks[index]
        attn = block.attn
        q, k, v = (self.qkv(index, x) if qkv is None else qkv).chunk(3, dim=-1)
        if steer is not None:
            q, k, v = steer(q, k, v, attn.qkv.bias)
        q, k, v = (split_heads(t, attn.num_heads) for t in (q, k, v))
        if attn.att_mask is None:
            mixed = mix(q, k, v, record=record)
        else:
            # Scores are multiplied, not biased, by place, which fused attention cannot do.
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 * attn.att_mask.sigmoid()
            # q and k may be those of one image, and v those of n priors.
            weights = scores.softmax(dim=-1).expand(v.shape[0], -1, -1, -1)
            if record is not None:
                record.append(weights)
            mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = x + block.drop_path(attn.proj(mixed))
        out: Tensor = x + block.drop_path(block.mlp(block.norm2(x), self.network.grids[index]))
        return out

    def finish(self, hidden: Tensor) -> Tensor:
        """As they are: the norm is after the mean."""
        return hidden

    def pool(self, tokens: Tensor) -> Tensor:
        """The mean token, normed."""
        pooled: Tensor = self.network.norm(tokens.mean(dim=1))
        return pooled

    def classify(self, tokens: Tensor) -> Tensor:
        """See `Backbone`."""
        logits: Tensor = self.network.head(self.pool(tokens))
        return logits

    def qkv_weight(self, index: int) -> Tensor:
        """See `Backbone`."""
        block: Any = self.network.blocks[index]
        return whole_weight(block.attn.qkv)

    def make_decoders(self) -> nn.ModuleList:
        """One per block; those of the first block of a stage also undo the pooling."""
        return nn.ModuleList(
            PooledDecoder(width, self.widths[index - 1]) if index in self.network.starts else FeedbackDecoder(width)
            for index, width in enumerate(self.widths)
        )

    def back(self, index: int, tokens: Tensor, decoder: nn.Module) -> Tensor:
        """Every token becomes the four that it was pooled from."""
        if index not in self.network.starts:
            return tokens
        assert isinstance(decoder, PooledDecoder)
        return to_tokens(decoder.unpool(to_map(tokens, self.network.grids[index])))

    def spread(self, index: int, values: Tensor) -> Tensor:
        """What holds for a token holds for the four that it was pooled from."""
        # As in Swin: up through the poolings, until the grid is the block's own.
        for start in reversed(self.network.starts):
            if index < start:
                values = to_tokens(F.interpolate(to_map(values, self.network.grids[start]), scale_factor=2))
        return values

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Names of the released RVT: blocks within stages, the stem's layers by number."""
        offsets = [0, *self.network.starts]

        def renamed(name: str) -> str:
            name = re.sub(r"^patch_embed\.proj\.", "stem.", name)
            name = re.sub(r"^pools\.(\d+)\.conv\.", r"pools.\1.", name)
            stage = re.match(r"^transformers\.(\d+)\.blocks\.(\d+)\.", name)
            if stage is None:
                return name
            of, number = int(stage[1]), int(stage[2])
            # A stage too many gets a name that no weight has, so that the loader reports it.
            return f"blocks.{(offsets[of] if of < len(offsets) else 1000 * of) + number}.{name[stage.end() :]}"

        converted = {renamed(name): value for name, value in state.items()}
        own = self.network.state_dict()
        for name, value in converted.items():
            if name in own and value.shape != own[name].shape:
                resampled = self.resample(name, value, own[name])
                converted[name] = value if resampled is None else resampled
        return converted

    def resample(self, name: str, value: Tensor, target: Tensor) -> Tensor | None:
        """The scale of every pair of places: over the one's grid, then over the other's."""
        if not name.endswith(".att_mask") or value.shape[0] != target.shape[0]:
            return None
        side, wanted = round(value.shape[-1] ** 0.5), round(target.shape[-1] ** 0.5)
        for _ in range(2):
            maps = value.unflatten(2, (side, side))  # (heads, places, side, side)
            maps = F.interpolate(maps, (wanted, wanted), mode="bicubic", antialias=True, align_corners=False)
            # Transposed: the second turn resamples the other place, and transposes back.
            value = maps.flatten(2).transpose(1, 2)
        return value
