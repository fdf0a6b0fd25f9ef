"""Robustness of a classifier: corruption errors, and attacks on its pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# AlexNet's errors on ImageNet-C, mean over its five severities, as published with it (Hendrycks and Dietterich,
# Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR 2019).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
CORRUPTIONS = tuple(ALEXNET_ERRORS)
SEVERITIES = (1, 2, 3, 4, 5)


def mean_corruption_error(errors: Mapping[str, Mapping[int, float]]) -> float:
    """mCE, in percent: the error on each corruption over AlexNet's, mean over all fifteen.

    Args:
        errors: by corruption and severity, in [0, 1]; all fifteen of ImageNet-C at all five severities.

    Raises:
        ValueError: one is missing.
    """
    ratios = []
    for name, of_alexnet in ALEXNET_ERRORS.items():
        if name not in errors or set(errors[name]) != set(SEVERITIES):
            raise ValueError(f"mCE is over all fifteen corruptions at five severities: {name} is not whole")
        ratios.append(sum(errors[name].values()) / len(SEVERITIES) / of_alexnet)
    return 100 * sum(ratios) / len(ratios)


def pgd(
    logits_of: Callable[[Tensor], Tensor],
    pixels: Tensor,
    labels: Tensor,
    epsilon: float = 1 / 255,
    step: float = 0.5 / 255,
    steps: int = 5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projected gradient descent (Madry et al., 2018): nearby pixels that the model classifies differently.

    Args:
        logits_of: gives (n, classes) of pixels; what is attacked must be what is evaluated.
        pixels: (n, 3, H, W) in [0, 1].
        labels: (n,).
        epsilon: the largest change of a pixel.
        step: the change per step, along the sign of the gradient of the cross-entropy.
        steps: number of steps.
        generator: of a random start inside epsilon; None to start at the pixels.

    Returns:
        (n, 3, H, W) in [0, 1], at most epsilon from `pixels`.
    """
    low, high = (pixels - epsilon).clamp(0, 1), (pixels + epsilon).clamp(0, 1)
    moved = pixels
    if generator is not None:
        noise = torch.rand(pixels.shape, generator=generator, device=generator.device).to(pixels)
        moved = (pixels + epsilon * (2 * noise - 1)).clamp(0, 1)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(logits_of(moved).float(), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, moved)
        moved = torch.minimum(torch.maximum(moved + step * gradient.sign(), low), high)
    return moved.detach()


def fgsm(logits_of: Callable[[Tensor], Tensor], pixels: Tensor, labels: Tensor, epsilon: float = 1 / 255) -> Tensor:
    """The fast gradient sign method (Goodfellow et al., 2015): one step of `pgd`, as long as epsilon."""
    return pgd(logits_of, pixels, labels, epsilon, epsilon, 1)
