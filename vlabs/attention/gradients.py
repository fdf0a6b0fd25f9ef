"""Maps from gradients: what an answer depends on, followed back through attention or to the tokens of every block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from vlabs.models.absvit import AbSViT
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.vlm import VisionLanguageModel, VLMOutput


@dataclass
class Recorded:
    """What a model computed on the way to its output, for the maps that need it; with gradients for those of this file.

    Attributes:
        attention: of every block of the last pass over the images, (n, heads, N, N).
        fusion: attention of the fusion, (n, heads, queries, keys): for each pair of layers that of text to text, text
            to image, image to image and image to text.
        states: the tokens inside every block of the last pass, (n, N, D).
        words: (n, T), how much each token of the text counts; set by the map `relevance`.
    """

    attention: list[Tensor] = field(default_factory=list)
    fusion: list[Tensor] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    words: Tensor | None = None


@contextmanager
def recording(model: VisionLanguageModel, names: Sequence[str]) -> Iterator[Recorded]:
    """Context manager: record what maps with these names need, but `attention`, which the model is given itself."""
    recorded = Recorded()
    parts: list[AbSViT | CoAttentionFusion] = [model.vision, model.fusion]
    recompute = [part.recompute for part in parts]
    with ExitStack() as stack:
        for part, before in zip(parts, recompute, strict=True):
            part.recompute = False  # a gradient needs what was computed, not its repetition
            stack.callback(setattr, part, "recompute", before)
        if "relevance" in names:
            recorded.fusion = stack.enter_context(model.fusion.recording())
        if "normgrad" in names:
            recorded.states = stack.enter_context(inputs_of(_inner_norms(model.vision)))
        yield recorded


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Context manager: a list with the last input of each module, in the order of `modules`; None before it ran."""
    inputs: list[Tensor] = [None] * len(modules)  # type: ignore[list-item]

    def keep(place: int, module: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[place] = given[0]

    hooks = [module.register_forward_pre_hook(partial(keep, place)) for place, module in enumerate(modules)]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def _inner_norms(vision: AbSViT) -> list[nn.Module]:
    """The second norm of every block that the last pass goes through: its input is the tokens after attention."""
    norms = [module for name, module in vision.vit.named_modules() if name.endswith(".norm2")]
    return norms[vision.start - 1 :]


def best_score(output: VLMOutput) -> Tensor:
    """(n,), what a gradient map explains: the logit of the best answer, or the ranking score."""
    return output.logits.flatten(1).max(dim=1).values if output.logits.ndim > 1 else output.logits


def normgrad(score: Tensor, states: Sequence[Tensor]) -> Tensor:
    """`‖∂S/∂x_i‖ · ‖x_i‖` of every token, the product over layers, each scaled to [0, 1] (Rebuffi et al., 2020).

    Args:
        score: S, (n,).
        states: x of some layers, (n, N, D) each, in the graph of `score`.

    Returns:
        (n, N).
    """
    gradients = torch.autograd.grad(score.sum(), list(states), retain_graph=True)
    maps = [g.norm(dim=2) * x.norm(dim=2) for g, x in zip(gradients, states, strict=True)]
    product = torch.ones_like(maps[0])
    for one in maps:
        low, high = one.amin(dim=1, keepdim=True), one.amax(dim=1, keepdim=True)
        product = product * (one - low) / (high - low).clamp(min=1e-12)
    return product


def relevance(score: Tensor, recorded: Recorded) -> tuple[Tensor, Tensor]:
    """Relevance of every image token and every word for a score (Chefer et al., ICCV 2021, for co-attention).

    With `Ā = mean_h relu(∇A ⊙ A)`, self-attention of a stream s adds `Ā R_ss` to R_ss and `Ā R_sq` to R_sq. Where s
    reads the other stream q, `R̂_ssᵀ Ā R̂_qq` is added to R_sq and `Ā R_qs` to R_ss; R̂ is R with the rows of R − I scaled
    to sum to 1. The image's stream begins with the attention of the encoder's last pass, if all its blocks have the
    same tokens. METER's layers read the other stream as it was before the layer, and so do these rules.

    Args:
        score: S, (n,).
        recorded: `attention` and `fusion`.

    Returns:
        The rows of the text's [cls] in R_ti, (n, N), and in R_tt, (n, T).
    """
    used = [*recorded.attention, *recorded.fusion]
    gradients = torch.autograd.grad(score.sum(), used, retain_graph=True, allow_unused=True)
    read = [
        torch.zeros_like(a[:, 0]) if g is None else (g * a.detach()).clamp(min=0).mean(dim=1)
        for g, a in zip(gradients, used, strict=True)
    ]
    blocks, fusion = read[: len(recorded.attention)], read[len(recorded.attention) :]
    blocks = [block[..., : block.shape[1]] for block in blocks]  # other keys than the tokens are words
    count, tokens, words = len(fusion[1]), fusion[1].shape[2], fusion[0].shape[2]

    def eye(size: int) -> Tensor:
        return torch.eye(size, device=score.device, dtype=fusion[0].dtype).expand(count, -1, -1)

    r_tt, r_ii = eye(words), eye(tokens)
    r_ti, r_it = r_tt.new_zeros(count, words, tokens), r_tt.new_zeros(count, tokens, words)
    if all(block.shape[1:] == (tokens, tokens) for block in blocks):
        for block in blocks:
            r_ii = r_ii + block @ r_ii
    for layer in range(0, len(fusion), 4):
        tt, ti, ii, it = (_all_rows(a, words if n < 2 else tokens) for n, a in enumerate(fusion[layer : layer + 4]))
        before = r_tt, r_ii, r_ti, r_it
        r_tt, r_ti = r_tt + tt @ r_tt, r_ti + tt @ r_ti
        r_ii, r_it = r_ii + ii @ r_ii, r_it + ii @ r_it
        r_ti, r_it, r_tt, r_ii = (
            r_ti + _scaled(r_tt).mT @ ti @ _scaled(before[1]),
            r_it + _scaled(r_ii).mT @ it @ _scaled(before[0]),
            r_tt + ti @ before[3],
            r_ii + it @ before[2],
        )
    return r_ti[:, 0], r_tt[:, 0]


def _all_rows(read: Tensor, rows: int) -> Tensor:
    """(n, rows, keys): the queries that the last layer does not compute change nothing, so they read nothing."""
    return torch.nn.functional.pad(read, (0, 0, 0, rows - read.shape[1]))


def _scaled(relevances: Tensor) -> Tensor:
    """R − I with rows that sum to 1 (or stay 0), plus I."""
    eye = torch.eye(relevances.shape[-1], device=relevances.device, dtype=relevances.dtype)
    change = relevances - eye
    return change / change.sum(dim=-1, keepdim=True).clamp(min=1e-12) + eye
