"""Parameter-efficient fine-tuning: low-rank adapters (LoRA, Hu et al., 2021) on the linear layers of the encoders.

A layer's W becomes W + (alpha / rank) · B A with A (rank, in) and B (out, rank), and only A and B are trained. peft
inserts them. They are added to W when a trained model is loaded, so only training knows about them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.utils.options import Count, Positive, ShareBelowOne, checked

PARTS: tuple[Literal["vision", "text"], ...] = ("vision", "text")
_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."


@checked("task.lora")
@dataclass(frozen=True)
class LoRA:
    """The adapters of a training.

    Attributes:
        rank: rank of the adapters; 0 for none.
        alpha: scale: the adapters count alpha / rank.
        dropout: dropout on the input of an adapter. The feedback reads W_v + B A of the blocks, which has no dropout.
        parts: encoders whose linear layers get an adapter, those of them that the model has. All else in them is
            frozen; the fusion, the head, the feedback decoders and the map to ξ are trained.

    Raises:
        UserError: an option is out of range.
    """

    rank: Count = 0
    alpha: Positive = 16.0
    dropout: ShareBelowOne = 0.0
    parts: tuple[Literal["vision", "text"], ...] = PARTS

    @property
    def scale(self) -> float:
        """The factor of B A, alpha / rank."""
        return self.alpha / self.rank


def add_adapters(network: nn.Module, lora: LoRA, new: Collection[str] = ()) -> None:
    """Insert adapters into the linear layers of an encoder, in place, and freeze all else in it; initially they change
    nothing.

    Args:
        new: names of parameters of a head that is trained from scratch, which stays as it is.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("task.lora needs the package peft: pip install 'vlabs[lora]'") from None
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    trained = [one for name, one in network.named_parameters() if name in new and one.requires_grad]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=[name for name in linear if f"{name}.weight" not in new],
        bias="none",
    )
    inject_adapter_in_model(config, network)
    for one in trained:
        one.requires_grad_(True)


def whole_weight(layer: nn.Module) -> Tensor:
    """W of a linear layer (out, in), including its adapters, if it has any."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    for adapter in getattr(layer, "active_adapters", ()):
        weight = weight + layer.get_delta_weight(adapter)  # type: ignore[operator]
    return weight


def merge_adapters(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Merge adapters into the weights: the names of the model without adapters, and W + scale · B A instead of W.

    Args:
        state: names and values, of a model or with any prefix.
        scale: of `LoRA`.

    Raises:
        KeyError, ValueError, RuntimeError: adapters that are missing or of another shape.
    """
    merged = {}
    for name, value in state.items():
        if name.endswith((_A, _B)):
            continue
        plain = name.replace(_BASE, ".")
        adapter = name.removesuffix(f"{_BASE}weight")
        if name != plain and name.endswith(".weight"):
            a, b = state[adapter + _A], state[adapter + _B]
            if (len(b), *a.shape[1:]) != tuple(value.shape):
                raise ValueError(f"the adapter of {plain} is of another shape")
            precise = torch.promote_types(value.dtype, torch.float32)
            value = (value.to(precise) + scale * (b.to(precise) @ a.to(precise))).to(value.dtype)
        merged[plain] = value
    return merged
