"""False partners from the batch: captions of other images, gathered from all ranks (only captions, no pixels)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlabs.tasks.base import gather
from vlabs.utils.ranks import is_distributed


def gather_captions(
    input_ids: Tensor, attention_mask: Tensor, image_ids: Tensor, padding: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The captions of all ranks: token ids (P, T), masks (P, T) and image ids (P,); T is the longest of all."""
    if not is_distributed():
        return input_ids, attention_mask, image_ids
    length = torch.tensor(input_ids.shape[1], device=input_ids.device)
    dist.all_reduce(length, op=dist.ReduceOp.MAX)
    extra = int(length) - input_ids.shape[1]
    return (
        gather(F.pad(input_ids, (0, extra), value=padding)),
        gather(F.pad(attention_mask, (0, extra))),
        gather(image_ids),
    )


def draw_false(
    image_ids: Tensor, pool_image_ids: Tensor, count: int, generator: torch.Generator, similarity: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw captions of other images for each of n captions, without replacement.

    Args:
        image_ids: (n,), the image of each caption.
        pool_image_ids: (P,), the image of each caption that can be drawn.
        count: captions to draw for each, m.
        generator: on the CPU, so that the draw is the same on every device.
        similarity: (n, P), ξ · z / temperature; draws follow its softmax. None to draw uniformly.

    Returns:
        Positions in the pool (n, m), and which of them are real (n, m): fewer than m if the pool is too small.
    """
    allowed = (image_ids[:, None] != pool_image_ids[None, :]).cpu()
    weights = (
        allowed.float() if similarity is None else similarity.float().cpu().softmax(dim=1).clamp(min=1e-9) * allowed
    )
    # The m largest of log(u) / w draw m without replacement in proportion to w (Efraimidis and Spirakis, 2006).
    keys = torch.rand(weights.shape, generator=generator).clamp(min=1e-9).log() / weights
    keys = keys.masked_fill(~allowed, float("-inf"))
    width = min(count, keys.shape[1])
    best = keys.topk(width, dim=1)
    real = best.values > float("-inf")
    extra = count - width
    return (
        F.pad(best.indices, (0, extra)).to(image_ids.device),
        F.pad(real, (0, extra), value=False).to(image_ids.device),
    )
