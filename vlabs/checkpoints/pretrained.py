"""Encoders from pre-trained weights: timm and the Hugging Face hub, or local files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
from torch import Tensor
from transformers import AutoConfig, AutoModel

from vlabs.checkpoints.checkpoint import read_tensors
from vlabs.checkpoints.released import find_state
from vlabs.errors import UserError, one_line
from vlabs.models.absvit import AbSViT
from vlabs.models.film import FiLMViT
from vlabs.models.text import OTHER_TYPES, OtherEncoder, RobertaEncoder, TextEncoder
from vlabs.models.topdown import TopDown

_ROBERTA_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "pad_token_id",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)

# What a config says of the file that it came with, and not of the architecture.
_OF_THE_FILE = ("transformers_version", "model_type", "architectures", "dtype", "_name_or_path", "use_cache")


def vit_from_timm(
    weights: str | None,
    architecture: str | None = None,
    img_size: int = 224,
    patch_size: int = 16,
    topdown: TopDown | None = None,
    encoder_class: type[AbSViT] = AbSViT,
    **vit_options: Any,
) -> AbSViT:
    """An AbSViT that starts from a pre-trained ViT; position and patch embeddings are resampled to the sizes given.

    Args:
        weights: a timm tag such as `vit_base_patch16_224.augreg_in21k_ft_in1k`, or a local `.safetensors` or `.pth`
            file with timm's parameter names or those of the released RVT or FAN (then `architecture` says which model
            it is); None for fresh weights.
        architecture: as in `AbSViT`; the tag's own if not given.
        img_size, patch_size, topdown, vit_options: as for `AbSViT`. With a `depth` below that of the weights, the last
            blocks are left out, as METER leaves CLIP's last one out.
        encoder_class: what is built around the ViT.

    Raises:
        UserError: feedback cannot be added to the architecture, or the weights cannot be had.
    """
    if weights is None:
        if architecture is None:
            raise UserError("model.vision.architecture must be given, e.g. vit_base_patch16_224")
        return encoder_class(architecture, img_size=img_size, patch_size=patch_size, topdown=topdown, **vit_options)
    local = Path(weights)
    is_file = local.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
    if is_file and not local.is_file():
        raise UserError(f"model.vision.weights={weights} does not exist")
    if is_file and architecture is None:
        raise UserError(f"model.vision.weights={weights} is a file: say what it holds with model.vision.architecture")
    name = architecture or weights.split(".")[0]
    encoder = encoder_class(name, img_size=img_size, patch_size=patch_size, topdown=topdown, **vit_options)
    state = find_state(read_tensors(local), weights) if is_file else _tag_state(weights, **vit_options)
    try:
        state = encoder.backbone.convert(state)
        kept = {
            key: value
            for key, value in state.items()
            if not key.startswith(("head.", "fc_norm.")) and not _is_left_out(key, vit_options.get("depth"))
        }
        missing, unexpected = encoder.vit.load_state_dict(kept, strict=False)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{weights} does not fit {name}: {error}") from None
    missing = [key for key in missing if not key.startswith(("head.", "fc_norm."))]
    if missing or unexpected:
        raise UserError(
            f"{weights} does not fit {name}: missing {missing or 'none'}, unexpected {unexpected or 'none'}"
        )
    return encoder


def film_vit(weights: str | None = None, architecture: str | None = None, **options: Any) -> AbSViT:
    """A ViT whose norms ξ scales and shifts, fresh or from a timm ViT; arguments as in `vit_from_timm`."""
    return vit_from_timm(weights, architecture, encoder_class=FiLMViT, **options)


def _is_left_out(key: str, depth: int | None) -> bool:
    block = re.match(r"blocks\.(\d+)\.", key)
    return depth is not None and block is not None and int(block[1]) >= depth


def _tag_state(tag: str, **vit_options: Any) -> dict[str, Tensor]:
    options = {name: value for name, value in vit_options.items() if value is not None and name != "depth"}
    try:
        source = timm.create_model(tag, pretrained=True, **options | {"num_classes": 0})
    except Exception as error:
        # timm raises whatever its download layer does: a missing tag and a missing network look alike.
        known = timm.list_pretrained(tag.split(".")[0] + "*")
        if tag not in known and known:
            raise UserError(f"timm has no weights '{tag}': choose one of {', '.join(known)}") from None
        raise UserError(
            f"the weights of {tag} are neither in the local cache nor to be had from the Hugging Face hub "
            f"({type(error).__name__}): download them where there is a network, with `hf download timm/{tag} "
            "model.safetensors --local-dir DIR`, and pass model.vision.weights=DIR/model.safetensors"
        ) from None
    return dict(source.state_dict())


def text_from_pretrained(name_or_path: str) -> TextEncoder:
    """A text encoder by hub name (`FacebookAI/roberta-base`, `answerdotai/ModernBERT-base`) or from a local folder.

    Raises:
        UserError: it cannot be had (the message says which local folder to pass), or it is of another type.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise _not_there(name_or_path, error) from None
    if config.model_type not in ("roberta", *OTHER_TYPES):
        raise UserError(
            f"{name_or_path} is a {config.model_type}: a text encoder is one of roberta, {', '.join(OTHER_TYPES)}"
        )
    without_pooler = {"add_pooling_layer": False} if config.model_type in ("roberta", "bert") else {}
    try:
        source = AutoModel.from_pretrained(name_or_path, **without_pooler)
    except (OSError, ValueError) as error:
        raise _not_there(name_or_path, error) from None
    encoder: TextEncoder
    if config.model_type == "roberta":
        encoder = RobertaEncoder(**{name: getattr(config, name) for name in _ROBERTA_SIZES})
    else:
        settings = {name: value for name, value in config.to_diff_dict().items() if name not in _OF_THE_FILE}
        encoder = OtherEncoder(config.model_type, **settings)
    encoder.network.load_state_dict(source.state_dict())
    return encoder


roberta_from_pretrained = text_from_pretrained  # what the configs of earlier runs call it


def _not_there(name_or_path: str, error: Exception) -> UserError:
    if Path(name_or_path).is_dir():
        return UserError(f"{name_or_path} holds no text encoder that transformers can load: {one_line(str(error))}")
    return UserError(
        f"{name_or_path} is neither in the local cache nor to be had from the Hugging Face hub: download it where "
        f"there is a network, with `hf download {name_or_path} --local-dir DIR`, "
        "and pass model.text.name_or_path=DIR"
    )
