"""Text encoders: RoBERTa (pre-trained, or small and from scratch), and BERT, DeBERTa and ModernBERT of transformers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.models.registry import register
from vlabs.models.roberta import Roberta, RobertaEmbeddings, RobertaLayer
from vlabs.utils.options import Share, Size


class TextEncoder(nn.Module):
    """Base class of text encoders.

    Attributes:
        width: D, the width of its states.
        max_length: the largest number of tokens in a text.
        vocab_size: size of the vocabulary.
        origin: which pre-trained weights it has, and how many of them; None without any.
    """

    width: int
    max_length: int
    vocab_size: int
    spec: dict[str, Any]
    origin: str | None = None

    @abstractmethod
    def recompute_activations(self) -> None:
        """Keep only the input of each layer in the forward pass, and recompute the rest in the backward pass."""

    @abstractmethod
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode token ids (n, T) with their mask (n, T), 1 for text and 0 for padding, to states (n, T, D)."""


@register
class RobertaEncoder(TextEncoder):
    """RoBERTa without its pooler. The arguments have the names of transformers' `RobertaConfig`.

    Positions count the non-padding tokens from `pad_token_id + 1`, so a text of T tokens needs
    `max_position_embeddings >= T + pad_token_id + 1`.

    Args:
        vocab_size: tokens that it knows.
        hidden_size: width of the tokens.
        num_hidden_layers: number of layers.
        num_attention_heads: attention heads of every layer.
        intermediate_size: width of the feed-forward layers.
        max_position_embeddings: positions, two more than the tokens of the longest text.
        type_vocab_size: token types, of which one is used.
        pad_token_id: token that pads.
        layer_norm_eps: ε of the norms.
        hidden_dropout_prob: dropout of what each layer adds.
        attention_probs_dropout_prob: dropout of the attention.

    Raises:
        ValueError: `pad_token_id` is not in the vocabulary, or `hidden_size` is not a multiple of the heads.
    """

    def __init__(
        self,
        vocab_size: Size,
        hidden_size: Size = 768,
        num_hidden_layers: Size = 12,
        num_attention_heads: Size = 12,
        intermediate_size: Size = 3072,
        max_position_embeddings: Size = 514,
        type_vocab_size: Size = 1,
        pad_token_id: int = 1,
        layer_norm_eps: float = 1e-5,
        hidden_dropout_prob: Share = 0.1,
        attention_probs_dropout_prob: Share = 0.1,
    ) -> None:
        super().__init__()
        if not 0 <= pad_token_id < vocab_size:
            raise ValueError(f"pad_token_id {pad_token_id} is none of {vocab_size} tokens")
        places, dropout = max_position_embeddings, hidden_dropout_prob
        embeddings = RobertaEmbeddings(
            vocab_size, type_vocab_size, places, hidden_size, pad_token_id, layer_norm_eps, dropout
        )
        sizes = (hidden_size, num_attention_heads, intermediate_size, layer_norm_eps)
        layers = [RobertaLayer(*sizes, dropout, attention_probs_dropout_prob) for _ in range(num_hidden_layers)]
        self.roberta = Roberta(embeddings, layers)
        self.width = hidden_size
        self.vocab_size = vocab_size
        self.max_length = max_position_embeddings - pad_token_id - 1

    def recompute_activations(self) -> None:
        """See `TextEncoder`."""
        self.roberta.recompute = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `TextEncoder`."""
        states: Tensor = self.roberta(input_ids, attention_mask)
        return states


# Types whose first token stands for the text, as ξ and the fusion's pooler take it to.
OTHER_TYPES = ("bert", "deberta-v2", "modernbert")

OPTIONS = frozenset(
    [
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "max_position_embeddings", "type_vocab_size", "pad_token_id", "bos_token_id", "eos_token_id",
        "cls_token_id", "sep_token_id", "layer_norm_eps", "hidden_act", "hidden_dropout_prob",
        "attention_probs_dropout_prob", "initializer_range", "position_embedding_type", "relative_attention",
        "max_relative_positions", "position_buckets", "pos_att_type", "norm_rel_ebd", "share_att_key",
        "position_biased_input", "legacy", "conv_kernel_size", "conv_act", "conv_groups", "embedding_size",
        "hidden_activation", "initializer_cutoff_factor", "norm_eps", "norm_bias", "attention_bias",
        "attention_dropout", "layer_types", "rope_parameters", "rope_theta", "local_rope_theta",
        "global_rope_theta", "global_attn_every_n_layers", "local_attention", "embedding_dropout", "mlp_bias",
        "mlp_dropout", "reference_compile", "attention_head_size",
    ]
)  # fmt: skip
"""What a config or a checkpoint may say of an encoder's architecture, by transformers' names."""

IGNORED = frozenset(
    [
        "transformers_version", "model_type", "architectures", "dtype", "torch_dtype", "_name_or_path",
        "name_or_path", "use_cache", "use_bfloat16", "tokenizer_class", "finetuning_task",
        "task_specific_params", "torchscript", "pruned_heads", "output_past", "repad_logits_with_grad",
        "gradient_checkpointing", "return_dict", "output_hidden_states", "output_attentions",
        "tie_word_embeddings", "is_decoder", "add_cross_attention", "is_encoder_decoder",
        "chunk_size_feed_forward", "problem_type", "id2label", "label2id", "classifier_dropout",
        "pooler_dropout", "pooler_hidden_act", "pooler_hidden_size", "summary_type", "decoder_bias",
        "classifier_pooling", "classifier_bias", "classifier_activation", "deterministic_flash_attn",
        "sparse_prediction", "sparse_pred_ignore_index", "pooler_fc_size", "pooler_num_attention_heads",
        "pooler_num_fc_layers", "pooler_size_per_head", "pooler_type", "directionality",
    ]
)  # fmt: skip
"""What such a config says of its file, of heads and of decoders, none of which is here."""


_OF_DECODERS = ("is_decoder", "add_cross_attention", "is_encoder_decoder")


@register
class OtherEncoder(TextEncoder):
    """BERT, DeBERTa-v3 (which transformers calls deberta-v2) or ModernBERT, without a pooler.

    Args:
        model_type: one of `OTHER_TYPES`.
        config: arguments of transformers' config of that type, as plain data, among `OPTIONS`; those in `IGNORED` are
            ignored.

    Raises:
        ValueError: the type is unknown.
        UserError: an argument is unknown.
    """

    def __init__(self, model_type: str, **config: Any) -> None:
        super().__init__()
        if model_type not in OTHER_TYPES:
            raise ValueError(f"text encoder of type '{model_type}': choose one of roberta, {', '.join(OTHER_TYPES)}")
        if unknown := sorted(config.keys() - OPTIONS - IGNORED):
            raise UserError(f"the text encoder has '{unknown[0]}', which is no option of a {model_type}")
        if decodes := [
            name for name in ("is_decoder", "add_cross_attention", "is_encoder_decoder") if config.get(name)
        ]:
            raise UserError(f"the text encoder has {decodes[0]}: it is a decoder")
        from transformers import AutoConfig, AutoModel  # takes seconds

        settings = AutoConfig.for_model(model_type, **{name: config[name] for name in config.keys() & OPTIONS})
        without_pooler = {"add_pooling_layer": False} if model_type == "bert" else {}
        self.encoder = AutoModel.from_config(
            settings, attn_implementation=_attention(model_type), trust_remote_code=False, **without_pooler
        )
        self.width = int(settings.hidden_size)
        self.vocab_size = int(settings.vocab_size)
        self.max_length = int(settings.max_position_embeddings)

    def recompute_activations(self) -> None:
        """See `TextEncoder`."""
        self.encoder.activation_checkpointing_enable({"use_reentrant": False})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """See `TextEncoder`."""
        states: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return states


def _attention(model_type: str) -> str:
    """The attention implementation: DeBERTa's extra terms exist only in transformers' eager form."""
    return "eager" if model_type == "deberta-v2" else "sdpa"
