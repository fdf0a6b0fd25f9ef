"""The text encoder: RoBERTa through transformers, pre-trained or small and from scratch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import RobertaConfig, RobertaModel

from vlabs.models.registry import register


@register
class RobertaEncoder(nn.Module):
    """RoBERTa without its pooler. The arguments are those of transformers' `RobertaConfig`.

    Positions count the non-padding tokens from `pad_token_id + 1`, so a text of T tokens needs
    `max_position_embeddings >= T + pad_token_id + 1`.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        max_position_embeddings: int = 514,
        type_vocab_size: int = 1,
        pad_token_id: int = 1,
        layer_norm_eps: float = 1e-5,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
    ) -> None:
        super().__init__()
        config = RobertaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            max_position_embeddings=max_position_embeddings,
            type_vocab_size=type_vocab_size,
            pad_token_id=pad_token_id,
            layer_norm_eps=layer_norm_eps,
            hidden_dropout_prob=hidden_dropout_prob,
            attention_probs_dropout_prob=attention_probs_dropout_prob,
            bos_token_id=0,
            eos_token_id=2,
            attn_implementation="sdpa",
        )
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.width = hidden_size
        self.max_length = max_position_embeddings - pad_token_id - 1

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token ids (n, T) with their mask (n, T), 1 for text and 0 for padding, to states (n, T, D)."""
        states: Tensor = self.roberta(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states
