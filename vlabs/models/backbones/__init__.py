"""Image encoders that feedback can be added to, one file per family; `create` builds one by name.

A new family is a subclass of `Backbone` and a line in `OWN` here (or in `TIMM`, for a class of timm's).
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

import timm
import torch
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlabs.errors import UserError
from vlabs.models.backbones.base import Backbone, FeedbackDecoder
from vlabs.models.backbones.eva import RotaryViT
from vlabs.models.backbones.fan import FAN, FANNetwork
from vlabs.models.backbones.rvt import PATCH, RVT, RVTNetwork
from vlabs.models.backbones.swin import Swin
from vlabs.models.backbones.vit import AttentiveProbe, ViT

__all__ = ["Backbone", "FeedbackDecoder", "OPTIONS", "OWN", "TIMM", "ViT", "create", "of", "patch_size_of"]

TIMM: dict[type[nn.Module], Callable[[Any], Backbone]] = {
    VisionTransformer: ViT,
    Eva: RotaryViT,
    SwinTransformer: Swin,
}


def _rvt(patch_size: int = PATCH, global_pool: str | None = None, **options: Any) -> RVT:
    if patch_size != PATCH or global_pool not in (None, "avg"):
        raise ValueError(f"it has patches of {PATCH} px and classifies the mean token")
    return RVT(RVTNetwork(**options))


def _fan(patch_size: int = 16, global_pool: str | None = None, **options: Any) -> FAN:
    if patch_size not in (8, 16) or global_pool not in (None, "token"):
        raise ValueError("it has patches of 8 or 16 px and classifies [cls]")
    return FAN(FANNetwork(patch_size=patch_size, **options))


_RVT: dict[str, dict[str, Any]] = {
    "tiny": {"widths": [192, 384], "depths": [10, 2], "heads": [6, 12]},
    "small": {"widths": [384], "depths": [12], "heads": [6]},
    "base": {"widths": [768], "depths": [12], "heads": [12], "local_mlp": False},
}
OWN: dict[str, Callable[..., Backbone]] = {
    **{f"rvt_{size}": partial(_rvt, **sizes) for size, sizes in _RVT.items()},
    # In RVT* of the paper all blocks of the first stage of Ti are scaled by place, and the first five of S and B.
    **{
        f"rvt_{size}_plus": partial(_rvt, masked_blocks=10 if size == "tiny" else 5, **sizes)
        for size, sizes in _RVT.items()
    },
    "fan_tiny": partial(_fan, embed_dim=192, depth=12, num_heads=4),
    "fan_small": partial(_fan, embed_dim=384, depth=12, num_heads=8),
    "fan_base": partial(_fan, embed_dim=448, depth=18, num_heads=8),
}
"""Architectures that timm does not have."""


_FLAG = (bool,)
_COUNT = (int,)
_NUMBER = (int, float)
_NAME = (str,)
_COUNTS = (int, list, tuple)

OPTIONS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("img_size", "patch_size", "num_classes", "in_chans", "embed_dim", "depth"), _COUNT),
    **dict.fromkeys(("reg_tokens", "num_reg_tokens", "head_dim", "masked_blocks", "cls_depth"), _COUNT),
    **dict.fromkeys(("attn_pool_num_heads", "swiglu_align_to"), _COUNT),
    **dict.fromkeys(("num_heads", "num_kv_heads", "depths", "heads", "widths", "window_size"), _COUNTS),
    **dict.fromkeys(("ref_feat_shape", "rope_mrope_section"), _COUNTS),
    **dict.fromkeys(("mlp_ratio", "init_values", "attn_pool_mlp_ratio", "head_init_scale"), _NUMBER),
    **dict.fromkeys(("drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"), _NUMBER),
    **dict.fromkeys(("drop_path_rate", "rope_temperature", "rope_grid_offset", "rope_shift_coords"), _NUMBER),
    **dict.fromkeys(("rope_jitter_coords", "rope_rescale_coords"), _NUMBER),
    **dict.fromkeys(("qkv_bias", "qkv_fused", "qk_norm", "proj_bias", "scale_attn_norm", "scale_mlp_norm"), _FLAG),
    **dict.fromkeys(("class_token", "no_embed_class", "pre_norm", "final_norm", "fc_norm", "fix_init"), _FLAG),
    **dict.fromkeys(("pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"), _FLAG),
    **dict.fromkeys(("always_partition", "local_mlp", "swiglu_mlp", "scale_mlp", "scale_attn_inner"), _FLAG),
    **dict.fromkeys(("attn_only_layer_scale", "use_abs_pos_emb", "use_rot_pos_emb", "rope_rotate_half"), _FLAG),
    **dict.fromkeys(("use_post_norm", "use_pre_transformer_norm", "use_post_transformer_norm", "use_fc_norm"), _FLAG),
    **dict.fromkeys(("global_pool", "pos_embed", "weight_init", "norm_layer", "act_layer", "attn_type"), _NAME),
    **dict.fromkeys(("rope_type", "rope_grid_indexing"), _NAME),
}
"""What a config or a checkpoint may say of an architecture, and as what; None stands for the architecture's own.

All else that timm takes is left out: it may name files, fetch weights, or leave the architecture.
"""


def _check_options(architecture: str, options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in OPTIONS:
            raise UserError(f"{architecture} has '{name}', which is no option of an architecture")
        of_flag = isinstance(value, bool) and OPTIONS[name] is not _FLAG
        whole = not isinstance(value, list | tuple) or all(type(one) is int for one in value)
        if value is not None and (of_flag or not whole or not isinstance(value, OPTIONS[name])):
            kinds = " or ".join(kind.__name__ for kind in OPTIONS[name])
            raise UserError(f"{architecture} has {name}={value!r}, which must be of the type {kinds}")


def create(architecture: str, embed_layer: Callable[..., nn.Module] | None = None, **options: Any) -> Backbone:
    """Build a backbone with fresh weights.

    Args:
        architecture: a key of `OWN`, or a model of timm.
        embed_layer: computes the input of the first block; None for the architecture's own.
        options: options of the architecture, among `OPTIONS`; all take `img_size`, `patch_size`, `num_classes` and
            `global_pool`, where None means the architecture's own, and `probe` an `AttentiveProbe`.

    Raises:
        UserError: there is no such model, it does not take the options, or feedback cannot be added to it.
    """
    _check_options(architecture, options)
    given = {name: value for name, value in options.items() if name != "global_pool" or value is not None}
    if architecture in OWN:
        try:
            return OWN[architecture](**given)
        except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
            raise UserError(f"{architecture} cannot be built with {given}: {error}") from None
    if architecture not in timm.list_models():
        known = get_close_matches(architecture, timm.list_models(), n=4, cutoff=0.8)
        known = known or timm.list_models(f"{architecture.split('_')[0]}*patch16_224*")[:8]
        near = ", ".join([*known, *sorted(OWN)])
        raise UserError(f"timm has no model '{architecture}', and vlabs none (near it: {near})")
    family = timm.model_entrypoint(architecture).__module__
    if not family.endswith((".vision_transformer", ".eva", ".swin_transformer")):
        raise UserError(_refusal(architecture, "it is no ViT"))
    if family.endswith(".swin_transformer"):
        if embed_layer is not None:
            raise UserError(f"{architecture} has a stem of its own: leave stem out")
        # METER's: windows grow with the image, so that in the last stage there is one.
        given.setdefault("window_size", max(1, given.get("img_size", 224) // 32))
    if embed_layer is not None:
        given["embed_layer"] = embed_layer
    if probes := given.get("global_pool") == "probe":
        given["global_pool"] = "map"
    try:
        network = timm.create_model(architecture, pretrained=False, **given)
        if probes:
            network.attn_pool = AttentiveProbe(network.embed_dim)
    except (TypeError, AssertionError, ValueError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"timm cannot build {architecture} with {given}: {error}") from None
    return of(network, architecture)


def patch_size_of(architecture: str) -> int:
    """The side of a patch in pixels, by default, of an architecture."""
    with torch.device("meta"):
        network: Any = create(architecture).network
    size = getattr(network.patch_embed, "patch_size", PATCH) if architecture not in OWN else PATCH
    return int(size if isinstance(size, int) else size[0])


def of(network: nn.Module, name: str = "this model") -> Backbone:
    """The backbone of a timm model.

    Raises:
        UserError: feedback cannot be added to it.
    """
    kind = TIMM.get(type(network))
    if kind is None:
        raise UserError(_refusal(name, f"it is a {type(network).__name__}"))
    try:
        return kind(network)
    except ValueError as error:
        raise UserError(_refusal(name, str(error))) from None


def _refusal(name: str, why: str) -> str:
    return (
        f"{name} cannot be an AbSViT: {why}. What can: timm's ViTs of pre-norm blocks, such as vit_base_patch16_224, "
        f"eva02_base_patch14_224 and vit_base_patch16_dinov3, its Swins, and {', '.join(sorted(OWN))}"
    )
