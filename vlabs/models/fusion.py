"""METER's co-attention: two streams of post-norm layers, each reading the other's previous state (Dou et al., 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlabs.models.registry import register
from vlabs.utils.options import Positive, Share, Size


class FusionAttention(nn.Module):
    """Multi-head attention with residual and post-norm: `norm(x + out(attention(x, context)))`.

    Attributes:
        record: a list to which the attention weights (n, heads, S, T) are appended; None to compute none.
    """

    record: list[Tensor] | None = None

    def __init__(self, width: Size, num_heads: Size, dropout: Share) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """x (n, S, D) attends to context (n, T, D); mask (n, T) is True where attention is allowed.

        One of x and context may be shared by all n: (1, …).
        """
        queries, keys, width = x.shape[1], context.shape[1], x.shape[2]
        # Multiply-adds, both over 2 D. Folded ones are in smaller matrices, which run slower: half as many must do.
        usual = (queries + keys) * width + queries * keys
        folded = 2 * min(queries, keys) * width + self.num_heads * queries * keys
        # What is exported is for any number of tokens.
        if self.record is not None or torch.compiler.is_exporting() or 2 * folded > usual:
            update = self.out(self._mix(x, context, mask))
        elif queries < keys:
            update = self.out(self._mix_few_queries(x, context, mask))
        else:
            update = self._update_from_few_keys(x, context, mask)
        return self.norm(x + F.dropout(update, self.dropout, self.training))

    def _mix(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        n = max(x.shape[0], context.shape[0])
        q, k, v = (
            self._heads(t).expand(n, -1, -1, -1) for t in (self.query(x), self.key(context), self.value(context))
        )
        allowed = None if mask is None else mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        if self.record is None:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, dropout_p=dropout)
        else:
            scores = q @ k.mT / q.shape[-1] ** 0.5
            self.record.append((scores if allowed is None else scores.masked_fill(~allowed, -torch.inf)).softmax(-1))
            mixed = F.dropout(self.record[-1], dropout) @ v
        return mixed.transpose(1, 2).flatten(2)

    def _mix_few_queries(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """The same without keys and values of the context: their maps act on the few queries and their results.

        `q · (W_k c_j + b_k) = (W_kᵀ q) · c_j + q · b_k` and `Σ_j a_j (W_v c_j + b_v) = W_v Σ_j a_j c_j + b_v Σ_j a_j`,
        head by head.
        """
        heads = (self.num_heads, -1)
        q = self.query(x).unflatten(-1, heads)  # (n, S, heads, d)
        key, value = (layer.weight.unflatten(0, heads) for layer in (self.key, self.value))  # (heads, d, D)
        q = q / q.shape[-1] ** 0.5
        read = torch.einsum("nshd,hde->nshe", q, key)
        bias = torch.einsum("nshd,hd->nsh", q, self.key.bias.unflatten(0, heads))
        scores = (read.flatten(1, 2) @ context.transpose(1, 2)).unflatten(1, q.shape[1:3])  # (n, S, heads, T)
        scores = scores + bias.unsqueeze(-1)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
        share = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        mixed = (share.flatten(1, 2) @ context).unflatten(1, q.shape[1:3])  # (n, S, heads, D)
        mixed = torch.einsum("nshe,hde->nshd", mixed, value)
        mixed = mixed + self.value.bias.unflatten(0, heads) * share.sum(dim=-1, keepdim=True)
        return mixed.flatten(2)

    def _update_from_few_keys(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """The same after `out`, without queries of x: their map acts on the few keys, and `out` on the few values.

        `(W_q x_i + b_q) · k_j = x_i · (W_qᵀ k_j) + b_q · k_j` and `W_o Σ_j a_ij v_j = Σ_j a_ij (W_o v_j)`,
        head by head.
        """
        heads = (self.num_heads, -1)
        k, v = (layer(context).unflatten(-1, heads) for layer in (self.key, self.value))  # (n, T, heads, d)
        k = k / k.shape[-1] ** 0.5
        # (n, heads · T, D) both: a head's keys and values in the space of x, one head after the other.
        keys = torch.einsum("nthd,hde->nhte", k, self.query.weight.unflatten(0, heads)).flatten(1, 2)
        values = torch.einsum("nthd,ehd->nhte", v, self.out.weight.unflatten(1, heads)).flatten(1, 2)
        bias = torch.einsum("nthd,hd->nht", k, self.query.bias.unflatten(0, heads))
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, :], float("-inf"))
        scores = (x @ keys.transpose(1, 2)).unflatten(-1, bias.shape[1:]) + bias.unsqueeze(1)  # (n, S, heads, T)
        share = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return share.flatten(2) @ values + self.out.bias

    def weights(self, x: Tensor, context: Tensor) -> Tensor:
        """Attention weights of x (n, S, D) to context (n, T, D): (n, S, T), mean over heads."""
        q, k = self._heads(self.query(x)), self._heads(self.key(context))
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1).mean(dim=1)


class FusionLayer(nn.Module):
    """Self-attention, cross-attention to the other stream, feed-forward; each with residual and post-norm."""

    def __init__(self, width: Size, num_heads: Size, hidden: int, dropout: Share) -> None:
        super().__init__()
        self.self_attention = FusionAttention(width, num_heads, dropout)
        self.cross_attention = FusionAttention(width, num_heads, dropout)
        self.expand = nn.Linear(width, hidden)
        self.contract = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = dropout

    def forward(
        self, x: Tensor, other: Tensor, mask: Tensor | None, other_mask: Tensor | None, first_only: bool = False
    ) -> Tensor:
        """Update x (n, S, D) or, with `first_only`, only its first token (n, 1, D), which is what a pooler reads."""
        query = x[:, :1] if first_only else x
        query = self.self_attention(query, x, mask)
        query = self.cross_attention(query, other, other_mask)
        update = self.contract(F.gelu(self.expand(query)))
        return self.norm(query + F.dropout(update, self.dropout, self.training))


@dataclass
class Fused:
    """The output of the fusion for n pairs.

    Attributes:
        pooled: (n, 2D), each stream's first token (or the mean of the image's) through dense and tanh, text first.
        text, image: (n, T, D) and (n, N, D), the states of the streams; one token each if `pooled_only`.
        image_read: (n, N), attention of the text's first token to each image token in the last layer; if requested.
    """

    pooled: Tensor
    text: Tensor
    image: Tensor
    image_read: Tensor | None = None


@register
class CoAttentionFusion(nn.Module):
    """Pairs of layers over text and image tokens; each stream is mapped to the fusion width and gets a type embedding.

    Args:
        text_dim, image_dim: widths of the two encoders.
        width: width of the fusion.
        depth: pairs of layers, one for text and one for the image.
        num_heads: attention heads of every layer.
        mlp_ratio: width of the feed-forward layers over `width`.
        dropout: dropout of the attention and of what each sub-layer adds.
        image_pool: what the pooler reads of the image: `first`, its [cls], or `mean`, where it has none.
        pictures: images per text. Each has a token type of its own; METER starts the second one as the first, and so
            does this.
    """

    def __init__(
        self,
        text_dim: int,
        image_dim: int,
        width: Size = 768,
        depth: Size = 6,
        num_heads: Size = 12,
        mlp_ratio: Positive = 4.0,
        dropout: Share = 0.1,
        image_pool: Literal["first", "mean"] = "first",
        pictures: Size = 1,
    ) -> None:
        super().__init__()
        self.image_pool = image_pool
        if width % num_heads:
            raise ValueError(f"the fusion's width {width} is not a multiple of its {num_heads} heads")
        self.width = width
        self.recompute = False
        self.text_map = nn.Linear(text_dim, width)
        self.image_map = nn.Linear(image_dim, width)
        self.token_type = nn.Embedding(1 + pictures, width)  # 0 text, 1 image, 2 second image
        hidden = round(width * mlp_ratio)
        self.text_layers = nn.ModuleList(FusionLayer(width, num_heads, hidden, dropout) for _ in range(depth))
        self.image_layers = nn.ModuleList(FusionLayer(width, num_heads, hidden, dropout) for _ in range(depth))
        self.text_pooler = nn.Linear(width, width)
        self.image_pooler = nn.Linear(width, width)
        self.apply(_init_bert)
        with torch.no_grad():
            self.token_type.weight[2:] = self.token_type.weight[1]

    def forward(
        self,
        text: Tensor,
        attention_mask: Tensor,
        image: Tensor,
        picture: Tensor | None = None,
        *,
        pooled_only: bool = False,
        read_image: bool = False,
    ) -> Fused:
        """Fuse n pairs.

        Args:
            text: (n, T, D_text); attention_mask: (n, T), 1 for text and 0 for padding.
            image: (n, N, D_image); images have no mask.
            picture: (n,), the index of each image among its text's images; None if each text has one image.
            pooled_only: the last layer computes only the tokens that the poolers read.
            read_image: also return the attention of the text to each image token.
        """
        mask = attention_mask.bool()
        text = self.text_map(text) + self.token_type.weight[0]
        kind = self.token_type.weight[1] if picture is None else self.token_type(1 + picture)[:, None]
        image = self.image_map(image) + kind
        image_read = None
        record: list[Tensor] | None = self.text_layers[-1].cross_attention.record  # type: ignore[union-attr,assignment]
        last = len(self.text_layers) - 1
        for index, (text_layer, image_layer) in enumerate(zip(self.text_layers, self.image_layers, strict=True)):
            first_only = pooled_only and index == last
            if read_image and index == last and record is None:
                image_read = _read_weights(text_layer, text, mask, image)
            # One assignment: both layers read the other stream as it was before either of them.
            text, image = (
                self._run(text_layer, text, image, mask, None, first_only),
                # A pooler of the mean reads all tokens, so all are computed.
                self._run(image_layer, image, text, None, mask, first_only and self.image_pool == "first"),
            )
        if read_image and record is not None:
            # The last pair recorded text to text, text to image, image to image, image to text.
            image_read = record[-3].mean(dim=1)[:, 0]
        read = image[:, 0] if self.image_pool == "first" else image.mean(dim=1)
        pooled = torch.cat([torch.tanh(self.text_pooler(text[:, 0])), torch.tanh(self.image_pooler(read))], dim=-1)
        return Fused(pooled, text, image, image_read)

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Context manager: a list of the attention of all layers, with gradients: for each pair of layers, text to
        text, text to image, image to image and image to text, (n, heads, queries, keys)."""
        record: list[Tensor] = []
        attentions = [module for module in self.modules() if isinstance(module, FusionAttention)]
        try:
            for attention in attentions:
                attention.record = record
            yield record
        finally:
            for attention in attentions:
                attention.record = None

    def _run(self, layer: nn.Module, *arguments: Any) -> Tensor:
        """Run a layer, with or without keeping its inner activations for the backward pass."""
        output: Tensor
        if self.recompute and torch.is_grad_enabled():
            output = checkpoint(layer, *arguments, use_reentrant=False)
        else:
            output = layer(*arguments)
        return output


def _read_weights(layer: nn.Module, text: Tensor, mask: Tensor, image: Tensor) -> Tensor:
    assert isinstance(layer, FusionLayer)
    query = layer.self_attention(text[:, :1], text, mask)
    return layer.cross_attention.weights(query, image)[:, 0]


def _init_bert(module: nn.Module) -> None:
    """Initialize as METER and BERT do: normal with standard deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
