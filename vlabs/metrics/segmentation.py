"""Intersection over union, of classes over a whole set and of the region of a text."""

from __future__ import annotations

import torch
from torch import Tensor


def class_iou(confusion: Tensor) -> Tensor:
    """IoU of every class, in percent, (K,); NaN for a class that neither occurs nor is predicted.

    Args:
        confusion: (K, K), counts of pixels, true class by predicted class.
    """
    counts = confusion.double()
    right = counts.diag()
    union = counts.sum(dim=0) + counts.sum(dim=1) - right
    return 100 * right / torch.where(union > 0, union, torch.nan)


def mean_iou(confusion: Tensor) -> Tensor:
    """The mean of `class_iou` over the classes that are not NaN, in percent; a float32 scalar."""
    return class_iou(confusion).nanmean().float()


def region_iou(found: Tensor, masks: Tensor, ignored: int) -> Tensor:
    """IoU of the prediction with the region of every text, in [0, 1]; texts without a region are left out.

    Args:
        found, masks: (n, H, W), 1 inside; masks all `ignored` where there is no region.
    """
    known = (masks != ignored).flatten(1).any(dim=1)
    inside, of = (found[known] == 1).flatten(1), (masks[known] == 1).flatten(1)
    both = (inside & of).sum(dim=1)
    return both / (inside | of).sum(dim=1).clamp_min(1)
