"""A loss that lets a model's own gradient look where people looked (Harmonizer)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 5
_TAPS = (1.0, 4.0, 6.0, 4.0, 1.0)


def harmonizer_loss(saliency: Tensor, human: Tensor) -> Tensor:
    """The harmonization loss of Fel et al. (Harmonizing the object recognition strategies of deep networks, 2022).

    Both maps are standardized, and what is below their mean is cut off; the human one is scaled to the largest value of
    the other. Of both a pyramid of five levels is made, each of half the side. The loss is the mean over levels of the
    mean squared difference; a text without a human map (zeros, or the same everywhere) adds
    zero.

    Args:
        saliency: (n, H, W), the gradient of the score by the pixels, mean over the channels.
        human: (n, H, W), how much people looked at each pixel; zeros where nobody was asked.
    """
    known = (human.flatten(1).amax(dim=1) > human.flatten(1).amin(dim=1)).to(saliency.dtype)
    saliency, human = _standardized(saliency), _standardized(human)
    largest = saliency.detach().amax(dim=(1, 2), keepdim=True)
    human = human / (human.amax(dim=(1, 2), keepdim=True) + 1e-6) * (largest + 1e-6)
    losses = []
    for level in range(LEVELS):
        if level:
            saliency, human = _halved(saliency), _halved(human)
        losses.append((((saliency - human) ** 2).mean(dim=(1, 2)) * known).sum() / max(1, len(known)))
    return torch.stack(losses).mean()


def _standardized(maps: Tensor) -> Tensor:
    centered = maps - maps.mean(dim=(1, 2), keepdim=True)
    # The root has no gradient at 0, where a map is the same everywhere.
    deviation = (centered**2).mean(dim=(1, 2), keepdim=True).clamp_min(1e-20).sqrt()
    return (centered / (deviation + 1e-5)).relu()


def _halved(maps: Tensor) -> Tensor:
    """Every second pixel of maps smoothed by a binomial filter of five taps; zeros beyond the edge."""
    taps = maps.new_tensor(_TAPS) / 16
    pads = [max(0, 2 * ((side + 1) // 2 - 1) + 5 - side) for side in maps.shape[1:]]
    (up, left), (down, right) = (tuple(pad // 2 for pad in pads), tuple(pad - pad // 2 for pad in pads))
    padded = F.pad(maps, (left, right, up, down)).unsqueeze(1)
    return F.conv2d(padded, torch.outer(taps, taps)[None, None], stride=2)[:, 0]
