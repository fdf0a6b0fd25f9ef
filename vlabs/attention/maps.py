"""Where a model looks: maps over the patch grid, from what the model computes anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from vlabs.models.absvit import AbSViT
from vlabs.models.vlm import VLMOutput

MAPS = ("fusion", "weights", "norm")


def attention_map(output: VLMOutput, vision: AbSViT, name: str = "fusion") -> Tensor:
    """One map for each of n texts.

    Args:
        output: of the model, with `read_image=True` for `fusion`.
        vision: its image encoder, for the grid of patches.
        name: `fusion`, how much the question's [cls] reads of each image token in the last fusion layer; `weights`, the
            top-down token weights s_i (zeros without feedback); `norm`, the norm of the second pass's output tokens
            before the final norm (paper, section 6.1).

    Returns:
        (n, rows, columns), non-negative.
    """
    if name == "fusion":
        if output.image_read is None:
            raise ValueError("the fusion map needs read_image=True")
        values = output.image_read
    elif name == "weights":
        weights = output.seen.token_weights
        values = weights if weights is not None else torch.zeros(output.seen.hidden.shape[:2])
    elif name == "norm":
        values = output.seen.hidden.norm(dim=-1)
    else:
        raise ValueError(f"map '{name}': choose one of {', '.join(MAPS)}")
    rows, columns = vision.grid_size
    return values[:, vision.num_prefix_tokens :].reshape(-1, rows, columns).float()
