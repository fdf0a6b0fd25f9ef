"""How a prior steers the image encoder: what it adds inside the attention of every block, or does to the tokens.

The feedback decoders are linear, and the paper's modulation is one scalar per token. The top-down signal in value space
therefore factors exactly: with `C_l = W_v B_l A_l A_{l+1} … A_L` (A_L acts first),

    W_v td_l = C_l (w_i z_i) = w_i · (C_l z)_i

A variant with feedback defines the scalars `w_i` and the directions `C_l ·`. It never builds a whole top-down token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.models.registry import register

if TYPE_CHECKING:
    from vlabs.models.backbones.base import Backbone

Feedback = Callable[[Tensor], list[Tensor]]
"""Takes tokens (…, D), returns `C_l tokens` for every block of the second pass, first one first, without W_v's bias.

With `qkv_signal` it is W_qkv instead of W_v, and 3D instead of D.
"""

Project = Callable[[int, Tensor], Tensor]
"""Takes a block of the second pass and (n, T, D); gives q, k and v of these as if they were tokens, (n, T, 3D)."""

Spread = Callable[[int, Tensor], Tensor]
"""Takes a block of the second pass and a number for every output token, (n, N, 1); one for every token of the block."""


def _same(block: int, values: Tensor) -> Tensor:
    """For encoders whose blocks all have the tokens of the output."""
    return values


@dataclass
class Words:
    """All states of n texts.

    Attributes:
        states: (n, T, D_text), from the text encoder.
        mask: (n, T), 0 for padding.
    """

    states: Tensor
    mask: Tensor

    def bias(self) -> Tensor:
        """(n, 1, 1, T), added to attention scores: -inf for padding."""
        padding = self.mask[:, None, None] == 0
        return torch.zeros_like(padding, dtype=self.states.dtype).masked_fill(padding, float("-inf"))


class Signal:
    """What n priors or texts change in the second pass; by default nothing. Subclasses say what they change.

    Attributes:
        similarity: (n, N) in [0, 1], where the prior asks to look; None if there is no such map.
        spread: see `Spread`.
    """

    similarity: Tensor | None = None
    spread: Spread = staticmethod(_same)

    def merge(self, block: int, x: Tensor) -> Tensor:
        """The four tokens side by side that one block's tokens are merged from, (n, N, 4D); only asked by Swin."""
        return x

    def enter(self, block: int, x: Tensor) -> Tensor:
        """The tokens before one block of the second pass: (n, N, D), or (1, N, D) of one image if nothing changed."""
        return x

    def norm(self, block: int, place: int, x: Tensor) -> Tensor:
        """The output of one block's norm, (n, N, D): place 0 before the attention, 1 before the MLP; see `plain`."""
        return x

    def steer(self, block: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of one block; see `TopDownSignal.steer`. k and v may have more tokens, after the others."""
        return q, k, v

    def scores(self, block: int) -> Tensor | None:
        """What is added to the attention scores of one block, e.g. -inf for padding; see `TopDown.plain`."""
        return None

    def project(self, block: int, mixed: Tensor, out: Tensor) -> Tensor:
        """The attention's output after its output map, of its `mixed` values, (n, N, D) both; see `TopDown.plain`."""
        return out

    def leave(self, block: int, x: Tensor) -> Tensor:
        """The tokens after one block, (n, N, D)."""
        return x

    def at(self, kept: Kept, prepare: Callable[[Kept], list[Tensor]] | None = None) -> Signal:
        """The signal of the kept tokens; itself where every token is treated the same."""
        return self


@dataclass
class Steering:
    """A signal as one block sees it; called, it gives q, k and v of the block.

    Attributes:
        signal: the signal of n priors or texts.
        block: which block of the second pass.
        bias_again: see `TopDown`.
    """

    signal: Signal
    block: int
    bias_again: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See `Signal.steer`."""
        return self.signal.steer(self.block, q, k, v, bias if self.bias_again else None)

    def norm(self, place: int, x: Tensor) -> Tensor:
        """See `Signal`."""
        return self.signal.norm(self.block, place, x)

    def scores(self) -> Tensor | None:
        """See `Signal`."""
        return self.signal.scores(self.block)

    def project(self, mixed: Tensor, out: Tensor) -> Tensor:
        """See `Signal`."""
        return self.signal.project(self.block, mixed, out)


@dataclass
class TopDownSignal(Signal):
    """The top-down signal of all blocks, factored: `scale · directions[l]`.

    Attributes:
        scale: (n, N, 1), the scalar w_i of every token of every prior.
        directions: for every block, (B, N, D) if it depends on the image, (n, 1, D) if it depends on the prior; 3D for
            the signal of q, k and v.
        image_index: (n,) the image of each prior; None if `directions` are per prior, or B is n or 1.
        similarity: (n, N), cosine of prior and token clamped to [0, 1]: where the prior asks to look; None without ξ.
        spread: see `Spread`.
    """

    scale: Tensor
    directions: Sequence[Tensor]
    image_index: Tensor | None
    similarity: Tensor | None
    spread: Spread = _same

    def value(self, block: int) -> Tensor:
        """`W_v td` of one block without the bias b_v, (n, N, D); `W_qkv td`, (n, N, 3D), for q, k and v."""
        direction = self.directions[block]
        if self.image_index is not None:
            direction = direction.index_select(0, self.image_index)
        return self.spread(block, self.scale) * direction

    def steer(self, block: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`v ← v + (W_v td + b_v)` in one block, and the same for q and k where the signal is for all three.

        Args:
            q, k, v: (n, N, D), or (1, N, D) if they are the same for all priors.
            bias: (3D,), that of W_qkv; None if none is added (see `TopDown.bias_again`).
        """
        value = self.value(block)
        width = v.shape[-1]
        if value.shape[-1] == width:
            return q, k, v + (value if bias is None else value + bias[2 * width :])
        parts = (value if bias is None else value + bias).split(width, dim=-1)
        return q + parts[0], k + parts[1], v + parts[2]

    def at(self, kept: Kept, prepare: Callable[[Kept], list[Tensor]] | None = None) -> TopDownSignal:
        """The signal of the kept tokens; the last one has the mean of the others.

        Args:
            prepare: computes the directions of the kept tokens, (n, M + 1, D), if there are none of all tokens.
        """
        scale = take(self.scale, None, kept)
        # One direction per prior, for all tokens: nothing but scales to choose.
        if prepare is None and self.directions[0].shape[1] == 1:
            return replace(self, scale=scale)
        # The last token has the mean of w_i · C_l z_i, which is not the mean of w_i times that of C_l z_i. So each w_i
        # goes into the weights of the mean, and the mean's own scale is 1.
        scale = torch.cat([scale[:, :-1], torch.ones_like(scale[:, -1:])], dim=1)
        scaled = replace(kept, rest=kept.rest * self.scale[..., 0])
        if prepare is not None:
            directions = prepare(scaled)
        else:
            directions = [take(one, self.image_index, scaled) for one in self.directions]
        # `take` has already chosen the image of each prior.
        return replace(self, scale=scale, directions=directions, image_index=None)


@dataclass
class ValueMask(Signal):
    """A soft mask on the values, instead of a signal.

    Attributes:
        similarity: (n, N), cosine of prior and token clamped to [0, 1].
        spread: see `Spread`.
    """

    similarity: Tensor
    spread: Spread = _same

    def steer(self, block: int, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """`v_i ← s_i v_i`; arguments as in `TopDownSignal.steer`."""
        return q, k, self.spread(block, self.similarity.unsqueeze(-1)) * v

    def at(self, kept: Kept, prepare: Callable[[Kept], list[Tensor]] | None = None) -> ValueMask:
        """See `TopDownSignal`."""
        return replace(self, similarity=take(self.similarity.unsqueeze(-1), None, kept)[..., 0])


def pick(per_image: Tensor, image_index: Tensor | None) -> Tensor:
    """Select the entry of each prior's image, (n, …); without `image_index` nothing changes."""
    return per_image if image_index is None else per_image.index_select(0, image_index)


@dataclass
class Kept:
    """What n priors keep of N tokens: M of them, and one more token, the mean of all others.

    Attributes:
        places: (n, M), ascending.
        rest: (n, N), the weights of that mean: they sum to 1, and are 0 for the kept tokens.
    """

    places: Tensor
    rest: Tensor


def take(per_image: Tensor, image_index: Tensor | None, kept: Kept | None) -> Tensor:
    """The tokens (B, N, D) of each prior's image: all of them, or the kept ones, (n, M + 1, D)."""
    if kept is None:
        return pick(per_image, image_index)
    places, width = kept.places, per_image.shape[2]
    if image_index is None:
        of = per_image.expand(places.shape[0], -1, -1).gather(1, places[..., None].expand(-1, -1, width))
    else:
        # Rows of (B · N, D): the tokens of all images, one image after the other.
        place = image_index[:, None] * per_image.shape[1] + places
        of = per_image.flatten(0, 1).index_select(0, place.flatten()).view(*places.shape, width)
    rest = kept.rest.unsqueeze(1).to(per_image.dtype) @ pick(per_image, image_index)
    return torch.cat([of, rest], dim=1)


class TopDown(nn.Module):
    """Base class of top-down variants. Subclasses declare what they need, and compute the signal of n priors.

    Attributes:
        needs_prior: it reads ξ. If not, the second pass is the same for every text and is computed once per image.
        needs_decoders: it feeds tokens back.
        reads_words: it reads all states of the text: `hear` and `read` are then called, and ξ is only the map.
        by_similarity: ξ steers by its similarity to patches, so one that is similar to none steers nothing.
        takes_several: there may be several ξ per text, (n, M, D): it reads them by `similarity` only.
        learns_prior: gradients reach ξ through what it steers. If not, ξ is only the map, and learns from losses on it.
        second_pass: it changes what the blocks do, so the image goes through them again. If not, it has `reweigh`.
        scores_patches: it has `score`, which takes the place of the similarity of ξ as map and in the region loss; a
            layer of it alone is named `head`.
        plain: it changes norms, scores or output maps, so blocks must be those of a timm `VisionTransformer`.
        changes_first: it changes norms or merged tokens, so q, k and v of its first block are not those that are known.
        qkv_signal: the signal is for q, k and v.
        prepares_tokens: `prepare` maps every token by itself, linearly: it may be given some of them, or means.
        begins_at_zero: names of the parameters of its layers, as a pattern, that begin at zero and steer nothing until
            they are learned; empty if there are none.
        most_alpha: largest α where it mixes two states by it, and beyond would not mix but extrapolate; infinite
            elsewhere.
        bias_again: `W_v td + b_v` is added to the values, as in the released code. They then contain b_v twice, and
            without a signal the second pass differs from the first. If False, `W_v td` is added; new decoders give
            zero, so a new encoder's second pass equals its first.
    """

    needs_prior = True
    needs_decoders = True
    reads_words = False
    by_similarity = True
    takes_several = True
    learns_prior = True
    second_pass = True
    scores_patches = False
    plain = False
    changes_first = False
    qkv_signal = False
    prepares_tokens = False
    begins_at_zero = ""
    most_alpha = math.inf
    bias_again = True
    spec: dict[str, Any]

    def zero_parameters(self) -> list[nn.Parameter]:
        """The parameters that `begins_at_zero` names."""
        pattern = self.begins_at_zero
        return [one for name, one in self.named_parameters() if pattern and re.fullmatch(pattern, name)]

    @property
    def pointer(self) -> nn.Module | None:
        """The layer of `score` alone, if there is one; only the region loss trains it."""
        return getattr(self, "head", None) if self.scores_patches else None

    def add_bias_again(self, again: bool) -> bool:
        """Set `bias_again` as other weights need it; returns whether it changed."""
        if self.spec.get("bias_again", again) == again:
            return False
        self.bias_again = self.spec["bias_again"] = again
        return True

    def build(self, backbone: Backbone, start: int) -> None:
        """Make the variant's own layers, for the blocks of the second pass.

        Args:
            backbone: the encoder; only its sizes are to be read, because its weights may not be loaded yet.
            start: the first of these blocks, counted from 1.

        Raises:
            UserError: the encoder has no place for them.
        """

    def hear(self, text_dim: int, backbone: Backbone, start: int) -> None:
        """Make the layers that read words; called once.

        Args:
            text_dim: width of the text's states.
            backbone, start: as in `build`.
        """

    def read(self, words: Words, tokens: Tensor, prior: Tensor, project: Project, alpha: float | None = None) -> Signal:
        """The signal of n texts, for variants that read words; `tokens`, `prior` and `alpha` as for `signal`.

        Args:
            words: all states of the texts.
            project: W_qkv x + b of every block of the second pass.
        """
        raise NotImplementedError

    def reweigh(
        self, tokens: Tensor, prior: Tensor, alpha: float | None = None
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Without a second pass: what becomes of output tokens (n, N, D), and the map s; arguments as for `signal`.

        Returns:
            A function of tokens, and (n, N).
        """
        raise NotImplementedError

    def score(self, tokens: Tensor) -> Tensor:
        """How much each output token of the second pass, (n, N, D), is what the text is about: logits (n, N)."""
        raise NotImplementedError

    def prepare(self, tokens: Tensor, feedback: Feedback) -> list[Tensor]:
        """Compute what does not depend on a prior, once per image, from z (B, N, D): (B, N, …) for every block."""
        return []

    def signal(
        self,
        tokens: Tensor,
        prior: Tensor,
        prepared: list[Tensor],
        image_index: Tensor | None,
        feedback: Feedback,
        alpha: float | None = None,
    ) -> Signal:
        """The signal of n priors.

        Args:
            tokens: z of each prior's image, (n, N, D), or (1, N, D) of a single image.
            prior: ξ, (n, D).
            prepared: the output of `prepare`.
            image_index: (n,) the image of each prior in `prepared`; None if prior i has image i or there is one image.
            feedback: see `Feedback`.
            alpha: the strength of the signal instead of the variant's own; only passed to variants that have one.
        """
        raise NotImplementedError


def per_block(backbone: Backbone, start: int, make: Callable[[int], nn.Module], every: int = 1) -> nn.ModuleList:
    """A layer, made from its width, for each block of the second pass (or every second one); nothing for the others.

    They are numbered by the blocks of the encoder, so that weights fit the block that they are of, whatever `start` is.
    """
    layers = nn.ModuleList()
    for index, width in enumerate(backbone.widths):
        here = index >= start - 1 and (index - start + 1) % every == 0
        layers.append(make(width) if here else nn.Identity())
    return layers


def cosines(prior: Tensor, tokens: Tensor, image_index: Tensor | None) -> Tensor:
    """cos(ξ, z_i), (n, N), of n priors with the tokens (B, N, D) of their own images, or of a single image.

    Of several priors per text, (n, M, D), the largest.
    """
    # Normalized before each text picks its image: B images rather than n. In float32, because patches are ranked by it.
    return _cosine(prior.float(), pick(F.normalize(tokens.float(), dim=-1), image_index))


def _cosine(prior: Tensor, unit: Tensor) -> Tensor:
    prior = F.normalize(prior, dim=-1)
    if prior.ndim == 2:
        return torch.einsum("nd,nid->ni", prior, unit)
    return torch.einsum("nmd,nid->nmi", prior, unit).amax(dim=1)


def whole(prior: Tensor) -> Tensor:
    """One prior (n, D) for each text: the mean of several, (n, M, D)."""
    return prior if prior.ndim == 2 else prior.mean(dim=1)


def similarity(prior: Tensor, tokens: Tensor) -> Tensor:
    """Cosine of each prior with each of its tokens, clamped to [0, 1] (paper, section 5.1).

    Args:
        prior: (n, D); of several, (n, M, D), the most similar counts.
        tokens: (n, N, D), or (1, N, D) if all priors belong to one image.

    Returns:
        (n, N).
    """
    return _cosine(prior, F.normalize(tokens, dim=-1)).clamp(0, 1)


@register
class AbSTopDown(TopDown):
    """The paper's modulation, `z_i → α · clamp(cos(ξ, z_i), 0, 1) · z_i` (section 5.1, "Design of token modulation").

    `C_l z` does not depend on the prior: it is computed once per image, and a prior costs N scalars.

    Args:
        alpha: scale α of the top-down signal: 1 on ImageNet, 10 for multi-object scenes and language.
        bias_again: add b_v to the values once more, as the released code does; the default is for checkpoints that do
            not say it.
    """

    prepares_tokens = True

    def __init__(self, alpha: float = 10.0, bias_again: bool = True) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.bias_again = bias_again

    def prepare(self, tokens: Tensor, feedback: Feedback) -> list[Tensor]:
        """`C_l z` of every block, each (B, N, D)."""
        return feedback(tokens)

    def signal(
        self,
        tokens: Tensor,
        prior: Tensor,
        prepared: list[Tensor],
        image_index: Tensor | None,
        feedback: Feedback,
        alpha: float | None = None,
    ) -> TopDownSignal:
        """See `TopDown`."""
        weights = similarity(prior, tokens)
        alpha = self.alpha if alpha is None else alpha
        return TopDownSignal((alpha * weights).unsqueeze(-1), prepared, image_index, weights)


@register
class AbSTopDownQKV(AbSTopDown):
    """The same signal added to q, k and v (paper, Table 5): `C_l` has W_qkv instead of W_v.

    Args:
        alpha, bias_again: as in `AbSTopDown`.
    """

    qkv_signal = True


@register
class FeedbackOnly(TopDown):
    """Feeds the output tokens back without weights (paper, section 6, baseline iii): no ξ, the same for all texts.

    Args:
        alpha: scale of the top-down signal.
        bias_again: add b_v to the values once more, as in `AbSTopDown`.
    """

    needs_prior = False
    prepares_tokens = True

    def __init__(self, alpha: float = 1.0, bias_again: bool = True) -> None:
        super().__init__()
        self.alpha = float(alpha)
        self.bias_again = bias_again

    def prepare(self, tokens: Tensor, feedback: Feedback) -> list[Tensor]:
        """`C_l z` of every block, each (B, N, D)."""
        return feedback(tokens)

    def signal(
        self,
        tokens: Tensor,
        prior: Tensor,
        prepared: list[Tensor],
        image_index: Tensor | None,
        feedback: Feedback,
        alpha: float | None = None,
    ) -> TopDownSignal:
        """See `TopDown`; `prior` is not read."""
        alpha = self.alpha if alpha is None else alpha
        return TopDownSignal(torch.full_like(tokens[..., :1], alpha), prepared, image_index, None)


@register
class MaskAttention(TopDown):
    """The soft mask on the values of the attention in every block, instead of a signal (paper, baseline ii)."""

    needs_decoders = False

    def signal(
        self,
        tokens: Tensor,
        prior: Tensor,
        prepared: list[Tensor],
        image_index: Tensor | None,
        feedback: Feedback,
        alpha: float | None = None,
    ) -> ValueMask:
        """See `TopDown`."""
        return ValueMask(similarity(prior, tokens))


@register
class PerceiverIO(TopDown):
    """Weights the output tokens, `z_i → α · s_i · z_i`, and feeds nothing back (paper, section 6, baseline i).

    Args:
        alpha: scale of the reweighted tokens.
    """

    needs_decoders = False
    second_pass = False

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = float(alpha)

    def reweigh(
        self, tokens: Tensor, prior: Tensor, alpha: float | None = None
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """See `TopDown`."""
        weights = similarity(prior, tokens)
        scale = ((self.alpha if alpha is None else alpha) * weights).unsqueeze(-1)
        return partial(torch.mul, scale), weights


@register
class ReleasedTopDown(TopDown):
    """The modulation of the released vision-language code, `5 · clamp(cos(ξ, z_i), 0, 1) · (z_i · ξ) ξ`.

    Neither z nor ξ is normalized outside the cosine. The direction is ξ itself, so a text costs L vectors `C_l ξ`
    and no token is decoded.

    Args:
        alpha: scale of the top-down signal, 5 in the released code.
    """

    takes_several = False

    def __init__(self, alpha: float = 5.0) -> None:
        super().__init__()
        self.alpha = float(alpha)

    def signal(
        self,
        tokens: Tensor,
        prior: Tensor,
        prepared: list[Tensor],
        image_index: Tensor | None,
        feedback: Feedback,
        alpha: float | None = None,
    ) -> TopDownSignal:
        """See `TopDown`."""
        weights = similarity(prior, tokens)
        scale = (self.alpha if alpha is None else alpha) * weights * torch.einsum("nd,nid->ni", prior, tokens)
        # The directions are (n, 1, D): C_l ξ, the same for all tokens.
        return TopDownSignal(scale.unsqueeze(-1), feedback(prior.unsqueeze(1)), None, weights)
