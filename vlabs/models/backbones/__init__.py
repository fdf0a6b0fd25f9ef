"""Image encoders that feedback can be added to, a file a kind of them; `create` makes one by name.

A kind of one's own is a sub-class of `Backbone` and a line in `OWN` here (or in `TIMM`, for a class of timm's).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vlabs.errors import UserError
from vlabs.models.backbones.base import Backbone, FeedbackDecoder, Steer
from vlabs.models.backbones.eva import RotaryViT
from vlabs.models.backbones.fan import FAN, FANNetwork
from vlabs.models.backbones.rvt import PATCH, RVT, RVTNetwork
from vlabs.models.backbones.swin import Swin
from vlabs.models.backbones.vit import ViT

__all__ = ["Backbone", "FeedbackDecoder", "OWN", "Steer", "TIMM", "ViT", "create", "of"]

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


def create(architecture: str, **options: Any) -> Backbone:
    """A backbone with fresh weights.

    Args:
        architecture: a key of `OWN`, or a model of timm.
        options: of the one or the other; `img_size`, `patch_size`, `num_classes` and `global_pool` are common to all,
            and a `global_pool` of None is the architecture's own.

    Raises:
        UserError: there is no such model, it does not take the options, or feedback cannot be added to it.
    """
    given = {name: value for name, value in options.items() if name != "global_pool" or value is not None}
    if architecture in OWN:
        try:
            return OWN[architecture](**given)
        except (TypeError, ValueError) as error:
            raise UserError(f"{architecture} cannot be built with {given}: {error}") from None
    if architecture not in timm.list_models():
        near = ", ".join([*timm.list_models(f"{architecture.split('_')[0]}*patch16_224*")[:8], *sorted(OWN)])
        raise UserError(f"timm has no model '{architecture}', and vlabs none (near it: {near})")
    family = timm.model_entrypoint(architecture).__module__
    if not family.endswith((".vision_transformer", ".eva", ".swin_transformer")):
        raise UserError(_refusal(architecture, "it is no ViT"))
    if family.endswith(".swin_transformer"):
        if "embed_layer" in given:
            raise UserError(f"{architecture} has a stem of its own: leave stem out")
        # METER's: windows grow with the picture, so that in the last stage there is one.
        given.setdefault("window_size", max(1, given.get("img_size", 224) // 32))
    try:
        network = timm.create_model(architecture, pretrained=False, **given)
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"timm cannot build {architecture} with {given}: {error}") from None
    return of(network, architecture)


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
