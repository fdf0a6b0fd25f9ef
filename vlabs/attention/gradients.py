"""Maps from gradients: what an answer depends on, followed back through attention or to the tokens of every block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlabs.models.absvit import AbSViT
from vlabs.models.fusion import CoAttentionFusion


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
def recording(vision: AbSViT, names: Sequence[str], fusion: CoAttentionFusion | None = None) -> Iterator[Recorded]:
    """Context manager: record what maps with these names need, but `attention`, which the model is given itself."""
    recorded = Recorded()
    parts: list[AbSViT | CoAttentionFusion] = [vision] if fusion is None else [vision, fusion]
    recompute = [part.recompute for part in parts]
    with ExitStack() as stack:
        for part, before in zip(parts, recompute, strict=True):
            part.recompute = False  # a gradient needs what was computed, not its repetition
            stack.callback(setattr, part, "recompute", before)
        if "relevance" in names and fusion is not None:
            recorded.fusion = stack.enter_context(fusion.recording())
        if "normgrad" in names:
            recorded.states = stack.enter_context(inputs_of(_inner_norms(vision)))
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


@contextmanager
def attention_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Context manager: as `inputs_of`, the second output of each module, which for transformers' is its attention."""
    found: list[Tensor] = [None] * len(modules)  # type: ignore[list-item]

    def keep(place: int, module: nn.Module, given: Any, output: tuple[Tensor, ...]) -> None:
        found[place] = output[1]

    hooks = [module.register_forward_hook(partial(keep, place)) for place, module in enumerate(modules)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _inner_norms(vision: AbSViT) -> list[nn.Module]:
    """The second norm of every block that the last pass goes through: its input is the tokens after attention."""
    norms = [module for name, module in vision.vit.named_modules() if name.endswith(".norm2")]
    return norms[vision.start - 1 if vision.looks_twice else 0 :]


def best_score(logits: Tensor) -> Tensor:
    """(n,), what a gradient map explains: the logit of the best answer or class (n, K), or the ranking score (n,)."""
    return logits.flatten(1).max(dim=1).values if logits.ndim > 1 else logits


def normgrad(score: Tensor, states: Sequence[Tensor], places: slice = slice(None)) -> Tensor:
    """`‖∂S/∂x_i‖ · ‖x_i‖` of every token, the product over layers, each scaled to [0, 1] (Rebuffi et al., 2020).

    A layer counts if it says something of more than one token: of the last one, many classifiers read [cls] alone.

    Args:
        score: S, (n,).
        states: x of some layers, (n, N, D) each, in the graph of `score`.
        places: the tokens that are wanted; the others do not count in the scaling.

    Returns:
        (n, N), or as many tokens as `places` has.
    """
    gradients = torch.autograd.grad(score.sum(), list(states), retain_graph=True)
    maps = [(g.norm(dim=2) * x.norm(dim=2))[:, places] for g, x in zip(gradients, states, strict=True)]
    product = torch.ones_like(maps[0])
    for one in maps:
        low, high = one.amin(dim=1, keepdim=True), one.amax(dim=1, keepdim=True)
        counts = (one > 0).sum(dim=1, keepdim=True) > 1
        product = product * torch.where(counts, (one - low) / (high - low).clamp(min=1e-12), 1.0)
    return product


class Read(NamedTuple):
    """Attention by which a stream of tokens reads another one, or itself.

    Attributes:
        reader, read: names of the streams of the queries and of the keys.
        attention: (n, heads, queries, keys), in the graph of the score. Without the last queries, those of the others
            change nothing.
        keys: number of keys that are tokens of the stream `read`; None for all.
    """

    reader: str
    read: str
    attention: Tensor
    keys: int | None = None


def relevances(score: Tensor, layers: Sequence[Sequence[Read]]) -> dict[tuple[str, str], Tensor]:
    """Relevance of the tokens of every stream for those of every stream, for a score (Chefer et al., ICCV 2021).

    With `Ā = mean_h relu(∇A ⊙ A)`, self-attention of a stream s adds `Ā R_sc` to R_sc, for every stream c. Where s
    reads another stream q, `R̂_ssᵀ Ā R̂_qq` is added to R_sq, and `Ā R_qc` to R_sc for the others; R̂ is R with the rows
    of R − I scaled to sum to 1. The reads of a layer see other streams as they were before the layer. In the beginning
    every token is relevant for itself alone.

    Args:
        score: S, (n,).
        layers: the reads of each layer in the order of the computation.

    Returns:
        R by the names of the streams s and c: (n, tokens of s, tokens of c), float64 where the device has it.
    """
    reads = [read for layer in layers for read in layer]
    used = [read.attention for read in reads]
    gradients = torch.autograd.grad(score.sum(), used, retain_graph=True, allow_unused=True)
    # Relevances grow with every layer, and where gradients are large beyond what float32 can hold.
    exact = score.new_zeros((), dtype=torch.float32 if score.device.type == "mps" else torch.float64)
    counted = iter(
        (torch.zeros_like(a[:, 0]) if g is None else (g * a.detach()).clamp(min=0).mean(dim=1)).to(exact)
        for g, a in zip(gradients, used, strict=True)
    )
    sizes: dict[str, int] = {}
    for stream, size in [
        *((read.reader, read.attention.shape[2]) for read in reads),
        *((read.read, read.keys or read.attention.shape[3]) for read in reads),
    ]:
        sizes[stream] = max(size, sizes.get(stream, 0))
    count = max(len(a) for a in used)
    found = {
        (s, c): (torch.eye(rows, columns) if s == c else torch.zeros(rows, columns)).to(exact).expand(count, -1, -1)
        for s, rows in sizes.items()
        for c, columns in sizes.items()
    }
    for layer in layers:
        before = dict(found)
        for s, q, *_ in layer:
            # `counted` gives Ā in the order of the reads.
            read = _padded(next(counted)[..., : sizes[q]], sizes[s], sizes[q])
            more = {c: read @ (found if s == q else before)[q, c] for c in sizes}
            if s != q:
                more[q] = _scaled(found[s, s]).mT @ read @ _scaled(before[q, q])
            for c, value in more.items():
                found[s, c] = found[s, c] + value
    return found


def relevance(score: Tensor, recorded: Recorded, has_cls: bool = True, more: int = 0) -> tuple[Tensor, Tensor | None]:
    """Relevance of every image token and every word for a score, through the encoder's last pass and the fusion.

    The blocks of the encoder count if all have the same tokens. METER's layers read the other stream as it was before
    the layer.

    Args:
        score: S, (n,).
        recorded: `attention` and `fusion`; the latter is empty for a classifier.
        has_cls: whether a classifier's first token is [cls].
        more: how many image tokens the fusion has after those of the encoder.

    Returns:
        The rows of the text's [cls] in R_ti, (n, N + more), and in R_tt, (n, T), of `relevances`. For a classifier, the
        row of the image's [cls] in R_ii, or the mean of all rows, and None.
    """
    if not recorded.fusion:
        alone = relevances(score, [[Read("image", "image", block)] for block in recorded.attention])["image", "image"]
        return alone[:, 0] if has_cls else alone.mean(dim=1), None
    tokens = recorded.fusion[1].shape[3] - more
    # Other keys than the tokens are words that join the attention of the encoder.
    blocks = [[Read("image", "image", block, tokens)] for block in recorded.attention]
    if any(block.shape[2] != tokens for block in recorded.attention):
        blocks = []
    fusion = [
        [Read("text", "text", tt), Read("image", "image", ii), Read("text", "image", ti), Read("image", "text", it)]
        for tt, ti, ii, it in zip(*[iter(recorded.fusion)] * 4, strict=True)
    ]
    found = relevances(score, [*blocks, *fusion])
    return found["text", "image"][:, 0], found["text", "text"][:, 0]


def _padded(read: Tensor, rows: int, keys: int) -> Tensor:
    """(n, rows, keys): queries that a layer does not compute read nothing, keys that it does not have are not read."""
    return torch.nn.functional.pad(read, (0, keys - read.shape[2], 0, rows - read.shape[1]))


def _scaled(relevances: Tensor) -> Tensor:
    """R − I with rows that sum to 1 (or stay 0), plus I."""
    eye = torch.eye(relevances.shape[-1], device=relevances.device, dtype=relevances.dtype)
    change = relevances - eye
    return change / change.sum(dim=-1, keepdim=True).clamp(min=1e-12) + eye
