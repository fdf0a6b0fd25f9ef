"""timm's Swin Transformer: attention within windows, tokens merged four to one between stages, no [cls]."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformer, checkpoint_filter_fn, window_partition, window_reverse
from torch import Tensor, nn

from vlabs.models.backbones.base import (
    Backbone,
    FeedbackDecoder,
    Merge,
    PooledDecoder,
    dropout_of,
    mix,
    split_heads,
    to_map,
    to_tokens,
)
from vlabs.models.lora import whole_weight
from vlabs.models.topdown import Steering


class Swin(Backbone):
    """A timm `SwinTransformer`. The signal is added to the values within every window, as to those of a ViT.

    Between two stages feedback takes every token back to the four that it was merged from, as in `RVT`. The attention
    of a block is recorded where one window is the whole image, which it is in the last stage of METER's Swins.

    Raises:
        ValueError: a grid that is merged has an odd side.
    """

    network: SwinTransformer
    num_prefix_tokens = 0
    has_cls = False
    is_even = False

    def __init__(self, network: SwinTransformer) -> None:
        self.network = network
        stages: Any = network.layers
        self.blocks: list[Any] = [block for stage in stages for block in stage.blocks]
        self.merges: dict[int, Any] = {}
        first = 0
        for stage in stages:
            if not isinstance(stage.downsample, nn.Identity):
                self.merges[first] = stage.downsample
            first += len(stage.blocks)
        self.widths = [block.dim for block in self.blocks]
        self.grids: list[tuple[int, int]] = [tuple(block.input_resolution) for block in self.blocks]  # type: ignore[misc]
        self.grid_size = self.grids[-1]
        if any(side % 2 for start in self.merges for side in self.grids[start - 1]):
            raise ValueError("its grid is merged two by two, and has an odd side: choose a multiple of 32 px")

    @property
    def last_is_recorded(self) -> bool:
        """See `Backbone`: whether the last window is the whole image."""
        return bool(self.blocks[-1].window_size == self.grids[-1])

    def embed(self, images: Tensor) -> Tensor:
        """Patches, normed."""
        embedded: Tensor = self.network.patch_embed(images)
        return embedded.flatten(1, 2)

    def enter(self, index: int, x: Tensor, merge: Merge | None = None) -> Tensor:
        """Tokens are merged between stages."""
        if index not in self.merges:
            return x
        merging = self.merges[index]
        rows, columns = self.grids[index]
        # (n, rows, 2, columns, 2, D) to (n, rows · columns, 4D); the four in timm's order, down before right.
        four = x.unflatten(1, (rows, 2, columns, 2)).permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)
        merged: Tensor = merging.reduction(merging.norm(four if merge is None else merge(four)))
        return merged

    def qkv(self, index: int, x: Tensor) -> Tensor:
        """See `Backbone`."""
        block = self.blocks[index]
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
        block = self.blocks[index]
        q, k, v = (self.qkv(index, x) if qkv is None else qkv).chunk(3, dim=-1)
        if steer is not None:
            q, k, v = steer(q, k, v, block.attn.qkv.bias)
        x = x + block.drop_path1(self._attend(index, q, k, v, record))
        out: Tensor = x + block.drop_path2(block.mlp(block.norm2(x)))
        return out

    def _attend(self, index: int, q: Tensor, k: Tensor, v: Tensor, record: list[Tensor] | None) -> Tensor:
        """Attention within the windows of a block, of q, k and v (n or 1, N, D)."""
        block, grid = self.blocks[index], self.grids[index]
        attn, window, shift = block.attn, block.window_size, block.shift_size
        n, one_window = max(q.shape[0], v.shape[0]), window == grid

        def windows(tokens: Tensor) -> Tensor:
            laid = torch.roll(tokens.unflatten(1, grid), (-shift[0], -shift[1]), (1, 2))
            # Filled up to whole windows, on the right and below; F.pad counts axes from the last.
            parts = window_partition(F.pad(laid, (0, 0, 0, -grid[1] % window[1], 0, -grid[0] % window[0])), window)
            return split_heads(parts.flatten(1, 2), attn.num_heads)

        q, k, v = (windows(tokens.expand(n, -1, -1)) for tokens in (q, k, v))
        bias = attn._get_rel_pos_bias()
        if block.attn_mask is not None:
            # (windows, T, T): keeps apart what the shift has rolled together. The windows of an image are adjacent.
            bias = bias + block.attn_mask.repeat(n, 1, 1)[:, None]
        mixed = mix(q, k, v, dropout_of(attn.attn_drop), record if one_window else None, bias)
        mixed = attn.proj_drop(attn.proj(mixed)).unflatten(1, window)
        # Undo all three in reverse order: windows, filling, shift.
        padded = [side + -side % of for side, of in zip(grid, window, strict=True)]
        laid = window_reverse(mixed, window, *padded)[:, : grid[0], : grid[1]]
        return torch.roll(laid, shift, (1, 2)).flatten(1, 2)

    def finish(self, hidden: Tensor) -> Tensor:
        """The final norm."""
        tokens: Tensor = self.network.norm(hidden)
        return tokens

    def pool(self, tokens: Tensor) -> Tensor:
        """The mean token."""
        return tokens.mean(dim=1)

    def classify(self, tokens: Tensor) -> Tensor:
        """See `Backbone`."""
        logits: Tensor = self.network.forward_head(tokens.unflatten(1, self.grid_size))
        return logits

    def qkv_weight(self, index: int) -> Tensor:
        """See `Backbone`."""
        return whole_weight(self.blocks[index].attn.qkv)

    def make_decoders(self) -> nn.ModuleList:
        """One per block; those of the first block of a stage also undo the merging."""
        return nn.ModuleList(
            PooledDecoder(width, self.widths[index - 1]) if index in self.merges else FeedbackDecoder(width)
            for index, width in enumerate(self.widths)
        )

    def back(self, index: int, tokens: Tensor, decoder: nn.Module) -> Tensor:
        """Every token becomes the four that it was merged from."""
        if index not in self.merges:
            return tokens
        assert isinstance(decoder, PooledDecoder)
        return to_tokens(decoder.unpool(to_map(tokens, self.grids[index])))

    def spread(self, index: int, values: Tensor) -> Tensor:
        """What holds for a token holds for the four that it was merged from."""
        # From the output's grid up through the merges, until the grid is the block's own.
        for start in reversed(self.merges):
            if index < start:
                values = to_tokens(F.interpolate(to_map(values, self.grids[start]), scale_factor=2))
        return values

    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """timm's own renaming, of the original files and METER's too, and METER's resampling."""
        own = self.network.state_dict()
        resampled = {}
        for name, value in state.items():
            fits = name not in own or own[name].shape == value.shape
            changed = None if fits else self.resample(name, value, own[name])
            resampled[name] = value if changed is None else changed
        converted: dict[str, Tensor] = checkpoint_filter_fn(resampled, self.network)
        return converted

    def resample(self, name: str, value: Tensor, target: Tensor) -> Tensor | None:
        """The bias of every offset within a window, over the grid of offsets, as METER does it."""
        if not name.endswith("relative_position_bias_table") or value.shape[1] != target.shape[1]:
            return super().resample(name, value, target)
        side, wanted = round(len(value) ** 0.5), round(len(target) ** 0.5)
        maps = F.interpolate(value.T.unflatten(1, (side, side))[None], (wanted, wanted), mode="bicubic")
        return maps[0].flatten(1).T
