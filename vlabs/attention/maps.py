"""Maps over the patch grid that show where a model looks, from what the model computes anyway."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlabs.attention import LOOK_MAPS, MAPS
from vlabs.attention.gradients import Recorded, best_score, normgrad, recording, relevance
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, AbSViTClassifier, VisionTokens
from vlabs.models.vlm import VisionLanguageModel, VLMOutput

DEAD = "this question does not steer: its ξ is not similar to any patch; the map is {}"
NEEDS_ATTENTION = ("cls", "rollout", "gradient", "relevance")
NEEDS_GRADIENT = ("gradient", "relevance", "normgrad")


_COPIES = 32  # texts that are run at once

UNSTEERED = "normgrad"
"""The default map where no ξ steers."""


def default_map(model: VisionLanguageModel) -> str:
    """The default map: the token weights if ξ steers the encoder, otherwise `UNSTEERED`.

    The token weights are computed anyway and lie best on what a text is about. They are among the most faithful maps,
    but where scenes have many objects `cls` is more faithful (`docs/looking.md`). Elsewhere `UNSTEERED` was as faithful
    as the best for every model that reads a text.
    """
    topdown = model.vision.topdown
    return "weights" if topdown is not None and topdown.needs_prior else UNSTEERED


def lacking(vision: AbSViT, has_text: bool = True) -> dict[str, str]:
    """The maps that an image encoder does not have, and what each needs.

    Args:
        vision: the encoder.
        has_text: whether a fusion reads it; otherwise it classifies.
    """
    found = {} if has_text else dict.fromkeys(("fusion", "contrast"), "a text")
    if not vision.backbone.is_even:
        even = "an encoder whose blocks all have the same tokens"
        found |= dict.fromkeys(("rollout",) if has_text else ("rollout", "relevance"), even)
    if not vision.backbone.last_is_recorded:
        found |= dict.fromkeys(("cls", "gradient"), "attention over the whole image in the encoder's last block")
    return found


def maps_of(model: VisionLanguageModel | AbSViTClassifier, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Which of some maps a model has, and which it does not have, each with the reason."""
    if isinstance(model, AbSViTClassifier):
        needed, steers = lacking(model.encoder, has_text=False), model.encoder.needs_prior
    else:
        needed, steers = lacking(model.vision), model.prior is not None
    if not steers:
        needed["weights"] = "a ξ"
    return [one for one in names if one not in needed], [
        f"{one} is left out: it needs {needed[one]}" for one in names if one in needed
    ]


def some_maps_of(model: VisionLanguageModel | AbSViTClassifier, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """As `maps_of`.

    Raises:
        UserError: it has none of them.
    """
    found, left_out = maps_of(model, names)
    if not found:
        raise UserError(f"task.maps: {left_out[0]}: nothing is measured: name another map")
    return found, left_out


class ClassOutput(NamedTuple):
    """What maps need of a classifier's output for n images: logits (n, K), and the second pass."""

    logits: Tensor
    seen: VisionTokens
    prior_reads: None = None

    @property
    def pairs(self) -> int:
        """n: every image is a sample of its own."""
        return len(self.logits)


def attention_map(
    output: VLMOutput | ClassOutput,
    vision: AbSViT,
    name: str = "fusion",
    recorded: Recorded | None = None,
    image_index: Tensor | None = None,
) -> Tensor:
    """One map per text or, if a text has several images, per pair of text and image.

    Args:
        output: the model's output, with `read_image=True` for `fusion`; of a classifier, which has neither `fusion` nor
            `contrast`.
        vision: its image encoder, for the grid of patches.
        name: `fusion`: the attention of the text's [cls] to each image token in the last fusion layer. `weights`: the
            top-down token weights s_i (zeros without a prior). `norm`: the norm of the output tokens before the final
            norm (paper, section 6.1). `cls`: the attention of the encoder's [cls] in its last block, mean over heads.
            `rollout`: attention rollout (Abnar and Zuidema, 2020), the product over blocks of (A + I) / 2, in the row
            of [cls]. Without a [cls], both are the mean of all rows. `gradient`: gradient × attention in the last
            block, of the best answer or the ranking score, positive part, summed over queries and heads. `relevance`
            and `normgrad`: see `vlabs.attention.gradients`. `contrast` is not of one output, see `look`.
        recorded: what the model recorded, for all but the first three; with gradients for `NEEDS_GRADIENT`. It gets the
            words' relevance.
        image_index: (n,) as given to the model.

    Returns:
        (n, rows, columns), non-negative; 0 for patches that were not kept, except in `weights` and, without a second
        pass, in the maps of the blocks, which all patches went through.

    Raises:
        UserError: the encoder does not have the map, see `lacking`.
    """
    has_text = not isinstance(output, ClassOutput)
    if needed := lacking(vision, has_text).get(name):
        raise UserError(f"the map {name} needs {needed}: choose another")
    # Without a second pass, all patches went through the blocks, whatever is kept after them.
    tokens = output.seen.hidden.shape[1] if vision.looks_twice else vision.backbone.num_tokens
    if name == "fusion":
        if isinstance(output, ClassOutput) or output.image_read is None:
            raise ValueError("the fusion map needs read_image=True")
        values = output.image_read
    elif name == "weights":
        weights = output.seen.token_weights
        values = (
            weights if weights is not None else output.seen.hidden.new_zeros(output.pairs, vision.backbone.num_tokens)
        )
    elif name == "norm":
        values = output.seen.hidden.norm(dim=-1)
    elif name == "normgrad":
        if recorded is None or not recorded.states:
            raise ValueError("the normgrad map needs the recorded states")
        shape = (len(output.seen.hidden), tokens)
        inner = [x for x in recorded.states if x is not None and x.shape[:2] == shape]
        values = normgrad(best_score(output.logits), inner or [output.seen.hidden])
    elif name in NEEDS_ATTENTION:
        if recorded is None or not (recorded.attention or recorded.fusion):
            raise ValueError(f"the {name} map needs the recorded attention")
        if name == "relevance":
            more = 0 if output.prior_reads is None else output.prior_reads.shape[1]
            values, recorded.words = relevance(best_score(output.logits), recorded, vision.has_cls, more)
            values = values if isinstance(output, ClassOutput) else output.of_image(values)
        else:
            values = _of_attention(name, output, vision, recorded.attention, tokens)
        if len(values) != output.pairs:  # the encoder has no ξ, so all texts of an image share one pass
            values = values if image_index is None else values[image_index]
    else:
        raise ValueError(f"map '{name}': choose one of {', '.join(MAPS)}")
    rows, columns = vision.grid_size
    values = output.seen.of_all(values, vision.backbone.num_tokens)
    grid = values[:, vision.num_prefix_tokens :].reshape(-1, rows, columns).float()
    return grid.expand(output.pairs, -1, -1)


def _of_attention(
    name: str, output: VLMOutput | ClassOutput, vision: AbSViT, attention: Sequence[Tensor], tokens: int
) -> Tensor:
    """A map (n, N) from the attention of every block (n, heads, N, N) to N `tokens`; other keys are words."""
    last = attention[-1]
    attention = [weights[..., :tokens] for weights in attention]

    def read(weights: Tensor) -> Tensor:
        return weights[..., 0, :] if vision.has_cls else weights.mean(dim=-2)

    if name == "cls":
        return read(attention[-1]).mean(dim=1)
    if name == "rollout":
        rolled = torch.eye(attention[0].shape[-1]).to(attention[0])
        for weights in attention:
            mixed = (weights.mean(dim=1) + torch.eye(weights.shape[-1], device=weights.device)) / 2
            rolled = mixed @ rolled
        return read(rolled)
    gradient = torch.autograd.grad(best_score(output.logits).sum(), last, retain_graph=True)[0]
    return (gradient * last).clamp(min=0).sum(dim=(1, 2))[:, :tokens]


def look(
    model: VisionLanguageModel,
    image: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    names: Sequence[str],
    prior: Tensor | None = None,
    alpha: float | None = None,
) -> tuple[VLMOutput, dict[str, Tensor]]:
    """Run a model on one image with n texts, or on p images that every text is about, and compute maps.

    The map `contrast` is `m / (m_0 + mean(m_0))` (CARVE): m is the map `fusion` of a text, and m_0 that of an empty
    text.

    Args:
        model: in eval mode.
        image: (p, 3, H, W), normalized; on any device. p is 1, except for models of pairs.
        input_ids, attention_mask: (n, T).
        names: names in `MAPS`.
        prior: ξ, (n, D_vision), instead of the texts' own.
        alpha: the strength of the top-down signal instead of the model's own, if it has one.

    Returns:
        The output, and the maps (n p, rows, columns) by name: non-negative, without gradients, on the CPU. The maps of
        a text's images are adjacent.
    """
    return look_and_read(model, image, input_ids, attention_mask, names, prior, alpha)[:2]


def look_and_read(
    model: VisionLanguageModel,
    image: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    names: Sequence[str],
    prior: Tensor | None = None,
    alpha: float | None = None,
) -> tuple[VLMOutput, dict[str, Tensor], np.ndarray | None]:
    """As `look`, and the relevance of each token of a text, (n, T); None unless the map `relevance` is among the names.

    As a measure of words it is poor, see `words_missed`.
    """
    has_gradient = not set(names).isdisjoint(NEEDS_GRADIENT)
    if has_gradient and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # a gradient may be of copies only
            inputs = image.clone(), input_ids.clone(), attention_mask.clone()
            return look_and_read(model, *inputs, names, None if prior is None else prior.clone(), alpha)
    n, pictures = len(input_ids), len(image)
    weight = next(model.parameters())
    image, input_ids, attention_mask = image.to(weight), input_ids.to(weight.device), attention_mask.to(weight.device)
    index = torch.arange(pictures, device=image.device).expand(n, -1)
    shared = not set(names) & {*NEEDS_ATTENTION, *NEEDS_GRADIENT}
    if not shared:
        # Repeat the image for each text: with a shared first pass, a gradient would mix the texts.
        image = image.repeat(n, 1, 1, 1)
        index = torch.arange(n * pictures, device=image.device).view(n, pictures)
    given = index if pictures > 1 else (index[:, 0] if shared else None)
    if has_gradient:
        image.requires_grad_()  # frozen parameters alone would leave no gradient
    with torch.set_grad_enabled(has_gradient), recording(model.vision, names, model.fusion) as recorded:
        output = model(
            image,
            input_ids,
            attention_mask,
            given,
            prior=prior,
            read_image="fusion" in names or "contrast" in names,
            alpha=alpha,
            record=recorded.attention if set(names) & set(NEEDS_ATTENTION) else None,
        )
        own = [name for name in names if name != "contrast"]
        maps = {name: attention_map(output, model.vision, name, recorded).detach() for name in own}
    if "contrast" in names:
        with torch.no_grad():
            empty = _without_words(input_ids, attention_mask)
            plain = model(image, *empty, given, prior=prior, read_image=True, alpha=alpha)
            asked, nothing = (attention_map(one, model.vision, "fusion") for one in (output, plain))
            maps["contrast"] = (asked / (nothing + nothing.mean(dim=(1, 2), keepdim=True)).clamp(min=1e-12)).detach()
    words = recorded.words
    if words is not None:
        words = words.detach().unflatten(0, (-1, pictures)).sum(dim=1).float().cpu().numpy()
    return output, {name: maps[name].cpu() for name in names}, words


@torch.no_grad()
def words_missed(
    model: VisionLanguageModel,
    image: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    words: Sequence[Sequence[int]],
    prior: Tensor | None = None,
    alpha: float | None = None,
) -> np.ndarray:
    """How far the best score of a text falls without each of its words: the attention mask leaves out its tokens.

    Args:
        model, image, alpha: as in `look`.
        input_ids, attention_mask: of one text, (1, T).
        words: for each word the positions of its tokens.
        prior: ξ, (1, D_vision), instead of the text's own.

    Returns:
        (words,), float64: the change of the logit of the best answer or label, or of the ranking score; negative if it
        rises.
    """
    weight = next(model.parameters())
    encoded = model.vision.encode(image.to(weight))
    masks = attention_mask.repeat(len(words) + 1, 1).to(weight.device)
    # Row 0 keeps all words.
    for row, places in zip(masks[1:], words, strict=True):
        row[list(places)] = 0
    logits = []
    for some in masks.split(_COPIES):
        n = len(some)
        index = torch.arange(len(image), device=weight.device).expand(n, -1)
        logits.append(
            model(
                encoded,
                input_ids.to(weight.device).expand(n, -1),
                some,
                index if len(image) > 1 else index[:, 0],
                prior=None if prior is None else prior.to(weight).expand(n, *prior.shape[1:]),
                alpha=alpha,
            ).logits.double()
        )
    scores = torch.cat(logits)
    if scores.ndim > 1:
        # The best answer to the whole text, also where a word's absence changes the answer.
        scores = scores[:, scores[0].argmax()]
    return (scores[0] - scores[1:]).cpu().numpy()  # type: ignore[no-any-return]


def _without_words(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Texts of the same length with no word: what they begin and end with, and then padding."""
    last = attention_mask.sum(dim=1, keepdim=True) - 1
    # The last token moves to place 1, behind the first; all else is masked.
    ids = input_ids.scatter(1, torch.ones_like(last), input_ids.gather(1, last))
    return ids, attention_mask * (torch.arange(ids.shape[1], device=ids.device) < 2)


class Look(NamedTuple):
    """Where a model looks for n texts.

    Attributes:
        output: the model's output.
        maps: (n, p, rows, columns), non-negative, for the p images of each text.
        names: the map that is shown for each text.
        steers: whether ξ of each text is similar to any patch; None if no ξ steers.
    """

    output: VLMOutput
    maps: np.ndarray
    names: list[str]
    steers: list[bool | None]


def legend_of(names: Sequence[str], own_range: bool = False) -> str:
    """The legend of maps with some names, each of which may be shown within its own range."""
    said = [f"bright ({name}): {(LOOK_MAPS | MAPS)[name]}" for name in dict.fromkeys(names)]
    return "; ".join([*said, "each within its own range"] if said and own_range else said)


def look_by(
    model: VisionLanguageModel,
    image: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor,
    name: str,
    prior: Tensor | None = None,
    alpha: float | None = None,
) -> Look:
    """Where a model looks, by one map; by `UNSTEERED` for texts whose token weights are all 0.

    Args:
        name: name of the map; the other arguments are those of `look`.

    Raises:
        UserError: the model does not have the map.
    """
    if name == "weights" and model.prior is None and not model.vision.reads_words:
        raise UserError("the map weights needs a ξ, which this model does not have: choose another")
    given = model, image, input_ids, attention_mask
    output, found = look(*given, [name], prior, alpha)
    if name == "weights" and not found[name].flatten(1).any(dim=1).all():
        found |= look(*given, [UNSTEERED], prior, alpha)[1]
    return _chosen(model, output, found, [name, UNSTEERED], len(image))


def look_of(model: VisionLanguageModel, output: VLMOutput) -> Look:
    """Where a model looked, from its output for n texts about one image each, with `read_image=True`.

    The token weights if ξ steers, else, and for texts whose token weights are all 0, `fusion`, since the output has no
    other map.
    """
    names = ["weights", "fusion"] if default_map(model) == "weights" else ["fusion"]
    found = {one: attention_map(output, model.vision, one).cpu() for one in names}
    return _chosen(model, output, found, names, 1)


def _chosen(
    model: VisionLanguageModel, output: VLMOutput, found: dict[str, Tensor], wanted: Sequence[str], pictures: int
) -> Look:
    """The map that is shown for each text: the first of two names, or the second where the token weights are all 0."""
    n = len(found[wanted[0]]) // pictures
    maps = {one: values.unflatten(0, (n, pictures)).numpy() for one, values in found.items()}
    steered = model.vision.steers(output.seen)
    steers = [None] * n if steered is None else steered.unflatten(0, (n, pictures)).any(dim=1).tolist()
    # False and True as indices: the first name or the second.
    names = [wanted[wanted[0] == "weights" and not of_text.any()] for of_text in maps[wanted[0]]]
    return Look(output, np.stack([maps[one][text] for text, one in enumerate(names)]), names, steers)
