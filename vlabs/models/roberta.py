"""RoBERTa's layers in plain torch, because importing those of transformers takes longer than an answer.

Parameters have the names and the order of transformers' `RobertaModel`; the arithmetic is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Roberta(nn.Module):
    """RoBERTa (https://arxiv.org/abs/1907.11692) without its pooler.

    Args:
        embeddings: the sum of the embeddings of words, token types and positions, normalized.
        layers: what follows, in order.

    Attributes:
        recompute: keep only the input of each layer in the forward pass, and recompute the rest in the backward pass.
    """

    def __init__(self, embeddings: RobertaEmbeddings, layers: list[RobertaLayer]) -> None:
        super().__init__()
        self.embeddings = embeddings
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.recompute = False
        self.apply(_initialize)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token ids (n, T) with their mask (n, T), 1 for text and 0 for padding, to states (n, T, D)."""
        states: Tensor = self.embeddings(input_ids)
        seen = attention_mask.bool()[:, None, None]
        layers = self.encoder["layer"]
        assert isinstance(layers, nn.ModuleList)
        for layer in layers:
            if self.recompute and torch.is_grad_enabled():
                states = checkpoint(layer, states, seen, use_reentrant=False)
            else:
                states = layer(states, seen)
        return states


class RobertaEmbeddings(nn.Module):
    """The input of the first layer. Positions count the tokens that are not padding, from `pad + 1`.

    Args:
        words, types, positions: size of the vocabulary, number of token types and of positions.
        width: D, the width of the states.
        pad: the token that pads.
        eps: ε of the norm.
        dropout: dropout of the states.
    """

    def __init__(
        self, words: int, types: int, positions: int, width: int, pad: int, eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.pad, self.dropout = pad, dropout
        self.word_embeddings = nn.Embedding(words, width, padding_idx=pad)
        self.token_type_embeddings = nn.Embedding(types, width)
        self.LayerNorm = nn.LayerNorm(width, eps)
        self.position_embeddings = nn.Embedding(positions, width, padding_idx=pad)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embed token ids (n, T), all of the first token type, to states (n, T, D)."""
        is_text = (input_ids != self.pad).int()
        places = is_text.cumsum(dim=1) * is_text + self.pad  # pad + 1, pad + 2, …, and pad for padding
        embedded = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return F.dropout(self.LayerNorm(embedded + self.position_embeddings(places)), self.dropout, self.training)


class RobertaLayer(nn.Module):
    """Self-attention and feed-forward network, each followed by a norm of its sum with its input.

    Args:
        width: D, the width of the states.
        num_heads: attention heads.
        hidden: width of the feed-forward network.
        eps: ε of the norms.
        dropout: dropout of what each part adds.
        attention_dropout: dropout of the attention.

    Raises:
        ValueError: `width` is not a multiple of `num_heads`.
    """

    def __init__(
        self, width: int, num_heads: int, hidden: int, eps: float, dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"the hidden size {width} is not a multiple of the {num_heads} attention heads")
        self.num_heads, self.dropout, self.attention_dropout = num_heads, dropout, attention_dropout
        attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"self": attention, "output": _with_norm(width, width, eps)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = _with_norm(hidden, width, eps)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        """States (n, T, D) to states; `seen` (n, 1, 1, T) is true where a token may be attended to."""
        attention = self.attention["self"]
        assert isinstance(attention, nn.ModuleDict)
        maps = (attention["query"], attention["key"], attention["value"])
        query, key, value = (one(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for one in maps)
        dropout = self.attention_dropout if attention.training else 0.0  # a part may be frozen alone
        mixed = F.scaled_dot_product_attention(query, key, value, seen, dropout).transpose(1, 2).flatten(2)
        states = self._added(self.attention["output"], mixed, states)
        return self._added(self.output, F.gelu(self.intermediate["dense"](states)), states)

    def _added(self, part: nn.Module, found: Tensor, states: Tensor) -> Tensor:
        assert isinstance(part, nn.ModuleDict)
        normalized: Tensor = part["LayerNorm"](F.dropout(part["dense"](found), self.dropout, part.training) + states)
        return normalized


def _with_norm(before: int, width: int, eps: float) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(before, width), "LayerNorm": nn.LayerNorm(width, eps)})


def _initialize(module: nn.Module) -> None:
    """Initialize as transformers does: normal with standard deviation 0.02; biases and padding zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
