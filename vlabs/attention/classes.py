"""Where a classifier looks when asked for a class: ξ is its row of the last linear layer (paper, section 6.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlabs.attention.gradients import recording
from vlabs.attention.maps import NEEDS_ATTENTION, NEEDS_GRADIENT, ClassOutput, attention_map
from vlabs.models.absvit import AbSViT, AbSViTClassifier


@dataclass
class ClassLook:
    """The output for one image, bottom-up and under the prior of each of n classes; on the CPU.

    Attributes:
        before: (K,), probabilities of the bottom-up pass.
        after: (n, K), under each prior.
        bottom_up: (rows, columns), the norm of the bottom-up tokens before the final norm.
        norm: (n, rows, columns), the same for the tokens under each prior.
        weights: (n, rows, columns), the similarity of prior and token; None if the variant reads no prior.
    """

    before: Tensor
    after: Tensor
    bottom_up: Tensor
    norm: Tensor
    weights: Tensor | None


def strength(encoder: AbSViT, asked: float | None = None) -> float | None:
    """α under the prior of a class: what is asked for, else the paper's 10 or the variant's largest; None if it has no
    α.
    """
    topdown = encoder.topdown
    if topdown is None or not hasattr(topdown, "alpha"):
        return None
    return min(10.0, topdown.most_alpha) if asked is None else asked


@torch.inference_mode()
def look_for(model: AbSViTClassifier, image: Tensor, labels: Sequence[int], alpha: float | None = None) -> ClassLook:
    """Ask a classifier for some classes of an image.

    Args:
        model: in eval mode.
        image: (1, 3, H, W), normalized.
        labels: indices of n classes.
        alpha: the strength of the top-down signal, if the variant has one; None for the trained value.
    """
    encoder = model.encoder
    weight = model.class_priors(labels)
    n, grid = len(labels), encoder.grid_size
    index = torch.zeros(n, dtype=torch.int64, device=weight.device)
    bottom_up = encoder.encode(image.to(weight.device))
    seen = encoder.attend(bottom_up, weight, index, alpha=alpha)
    before, after = (
        model.probabilities(encoder.backbone.classify(tokens)) for tokens in (bottom_up.tokens, seen.tokens)
    )

    def as_map(values: Tensor) -> Tensor:
        return values[:, encoder.num_prefix_tokens :].unflatten(1, grid).float().cpu()

    return ClassLook(
        before[0].cpu(),
        after.cpu(),
        as_map(bottom_up.hidden.norm(dim=-1))[0],
        as_map(seen.of_all(seen.hidden.norm(dim=-1), encoder.backbone.num_tokens)),
        None if seen.token_weights is None else as_map(seen.token_weights),
    )


def class_maps(
    model: AbSViTClassifier,
    images: Tensor,
    names: Sequence[str],
    labels: Sequence[int] | None = None,
    alpha: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Classify images, and compute maps; those of gradients explain the best class, or the one that is asked for.

    Args:
        model: in eval mode.
        images: (n, 3, H, W), normalized; on any device.
        names: names in `vlabs.attention.MAPS` that the model has, see `maps_of`.
        labels: n classes, each asked for in its image by its own ξ, as in `look_for`; None for the trained ξ.
        alpha: the strength of the top-down signal instead of the model's own.

    Returns:
        Logits (n, K), and the maps (n, rows, columns) by name: non-negative, without gradients, on the CPU.
    """
    images = images.detach().to(next(model.parameters()))
    has_gradient = not set(names).isdisjoint(NEEDS_GRADIENT)
    if has_gradient:
        images.requires_grad_()  # frozen parameters alone would leave no gradient
    with torch.set_grad_enabled(has_gradient), recording(model.encoder, names) as recorded:
        prior = None if labels is None else model.class_priors(labels)
        record = recorded.attention if set(names) & set(NEEDS_ATTENTION) else None
        logits, _, seen = model(images, prior, reconstruct=False, alpha=alpha, record=record)
        output = ClassOutput(logits if labels is None else logits[range(len(labels)), labels][:, None], seen)
        maps = {name: attention_map(output, model.encoder, name, recorded).detach().cpu() for name in names}
    return logits.detach(), maps
