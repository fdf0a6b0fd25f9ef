"""What feedback needs from an image encoder: blocks whose values take a signal, and what lies between the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor, nn

from vlabs.models.topdown import Kept, Steering

Merge = Callable[[Tensor], Tensor]


class FeedbackDecoder(nn.Module):
    """The feedback decoder of one block: `linear` is A_l, the link of the chain; `linear2` is B_l, the block's signal.

    Names and missing biases follow the released AbSViT code, whose checkpoints load into them.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        self.linear2 = nn.Linear(dim, dim, bias=False)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.trunc_normal_(self.linear2.weight, std=0.02)


class PooledDecoder(FeedbackDecoder):
    """The decoder of a block whose tokens were pooled just before; `unpool` maps every token to the four it came from.

    Its kernel is as large as its stride, so every token is decoded alone and the signal stays factored.
    """

    def __init__(self, dim: int, before: int) -> None:
        super().__init__(dim)
        self.unpool = nn.ConvTranspose2d(dim, before, 2, stride=2, bias=False)
        nn.init.trunc_normal_(self.unpool.weight, std=0.02)


class Backbone(ABC):
    """An image encoder seen as blocks whose values take a signal; each family has a subclass in a file of its own.

    The weights stay in `network`, under the names of its own checkpoints. Tokens are (n, N, D). If blocks have other
    tokens than the output, `enter` is what lies before such a block, `back` is what feedback does there (it must be
    linear and act on every token alone), and `spread` gives the output token that stands for each token of a block.

    Attributes:
        network: the encoder.
        widths: D of every block, first block first.
        num_prefix_tokens: output tokens before the patches: [cls] and registers.
        grid_size: rows and columns of the output's patches.
        has_cls: whether the first output token is a [cls] that stands for the image.
        is_even: whether all blocks have the tokens of the output.
        takes_some: whether blocks can run on a subset of the tokens.
    """

    network: nn.Module
    widths: list[int]
    num_prefix_tokens: int
    grid_size: tuple[int, int]
    has_cls: bool
    is_even = True
    takes_some = False

    @property
    def last_is_recorded(self) -> bool:
        """Whether the last block's attention is over the whole image, so that it is recorded."""
        return True

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.widths)

    @property
    def width(self) -> int:
        """D, the width of the output tokens."""
        return self.widths[-1]

    @property
    def num_tokens(self) -> int:
        """N, the number of output tokens."""
        return self.num_prefix_tokens + self.grid_size[0] * self.grid_size[1]

    # A pass

    @abstractmethod
    def embed(self, images: Tensor) -> Tensor:
        """The input of the first block, of normalized images (B, 3, H, W)."""

    def positions(self, kept: Kept | None = None) -> Any:
        """Positions that all blocks of a pass read, e.g. rotary embeddings; None by default.

        Args:
            kept: the patches that are kept; None for all.
        """
        return None

    def enter(self, index: int, x: Tensor, merge: Merge | None = None) -> Tensor:
        """From the output of the previous block to the input of block `index`: the identity by default.

        Args:
            merge: changes tokens (n, N, 4D) that stand side by side to be merged, where there are such.
        """
        return x

    def place_of(self, index: int) -> tuple[int, tuple[int, int]] | None:
        """The tokens before the patches, and the grid of patches, that `norm1` of `network.blocks[index]` reads.

        None by default: they are not known.
        """
        return None

    @abstractmethod
    def qkv(self, index: int, x: Tensor) -> Tensor:
        """q, k and v (n, N, 3D) of block `index` for its input."""

    @abstractmethod
    def block(
        self,
        index: int,
        x: Tensor,
        positions: Any = None,
        steer: Steering | None = None,
        qkv: Tensor | None = None,
        record: list[Tensor] | None = None,
    ) -> Tensor:
        """Run one block.

        Args:
            index: which block.
            x: its input, (n, N, D), or (1, N, D) if `steer` expands one image to n priors.
            positions: the output of `positions`.
            steer: changes q, k and v, and what else a variant changes inside a block.
            qkv: q, k and v of the input, if they are known already.
            record: a list to which the attention weights (n, heads, queries, N) are appended.
        """

    @abstractmethod
    def finish(self, hidden: Tensor) -> Tensor:
        """The output tokens from the output of the last block: the final norm."""

    @abstractmethod
    def pool(self, tokens: Tensor) -> Tensor:
        """The image's feature (n, D) from output tokens: [cls], or what the encoder classifies instead."""

    @abstractmethod
    def classify(self, tokens: Tensor) -> Tensor:
        """Logits (n, K) from output tokens."""

    # Feedback

    @abstractmethod
    def qkv_weight(self, index: int) -> Tensor:
        """W_qkv of block `index`, (3D, D)."""

    def qkv_bias(self, index: int) -> Tensor | None:
        """Its bias, (3D,); only asked of a ViT."""
        raise NotImplementedError

    def value_weight(self, index: int) -> Tensor:
        """W_v of block `index`, (D, D)."""
        return self.qkv_weight(index).chunk(3)[2]

    def make_decoders(self) -> nn.ModuleList:
        """New feedback decoders, one per block."""
        return nn.ModuleList(FeedbackDecoder(width) for width in self.widths)

    def back(self, index: int, tokens: Tensor, decoder: nn.Module) -> Tensor:
        """Feedback from the input of block `index` to the output of the previous block: the identity by default.

        Args:
            decoder: the decoder of block `index`.
        """
        return tokens

    def spread(self, index: int, values: Tensor) -> Tensor:
        """Turn a value per output token, (n, N, 1), into one per token of block `index`: the identity by default."""
        return values

    # Weights

    @abstractmethod
    def convert(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename and reshape the tensors of a checkpoint of this architecture as `network` has them."""

    def resample(self, name: str, value: Tensor, target: Tensor) -> Tensor | None:
        """Resample a tensor of `network` from another resolution or patch size; None if that is not possible."""
        if name == "pos_embed" and value.shape[-1] == target.shape[-1]:
            prefix = 0 if getattr(self.network, "no_embed_class", False) else self.num_prefix_tokens
            # As METER and the released AbSViT resample: without the smoothing that timm adds.
            return resample_abs_pos_embed(value, list(self.grid_size), num_prefix_tokens=prefix, antialias=False)
        if name == "patch_embed.proj.weight" and value.shape[:2] == target.shape[:2]:
            return resample_patch_embed(value, list(target.shape[-2:]))
        return None


def to_map(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(n, rows · columns, D) to (n, D, rows, columns)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def to_tokens(maps: Tensor) -> Tensor:
    """(n, D, rows, columns) to (n, rows · columns, D)."""
    return maps.flatten(2).transpose(1, 2)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(n, N, D) to (n, heads, N, D / heads)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    record: list[Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of q, k and v (n, heads, N, d): (n, N, heads · d); q and k may be shared by n sets of values.

    Args:
        dropout: probability, on the attention weights.
        record: as in `Backbone.block`.
        bias: (n or 1, heads, N, N), added to the scores.
    """
    q, k = (t.expand(v.shape[0], -1, -1, -1) for t in (q, k))
    if record is None:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    else:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        record.append((scores if bias is None else scores + bias).softmax(dim=-1))
        mixed = F.dropout(record[-1], dropout) @ v
    return mixed.transpose(1, 2).flatten(2)


def dropout_of(layer: nn.Module) -> float:
    """The probability of a dropout layer, 0 outside training."""
    return float(layer.p) if layer.training else 0.0  # type: ignore[arg-type]
