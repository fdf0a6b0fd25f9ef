"""The image encoder: a ViT that can run a second time with a top-down signal inside its attention.

"Top-Down Visual Attention from Analysis by Synthesis" (Shi, Darrell, Wang; CVPR 2023), section 5.1:

    z = norm(block_L(… block_1(embed(x))))                      bottom-up pass
    t ← A_l t, td_l = B_l t   from the modulated z downwards    feedback
    v ← v + W_v td_l in the attention of every block            second pass; q and k stay as they are

The second pass may begin at a later block, from the first pass's state there (`start`), and may use only the patches
that ξ points at (`keep`).

The released code adds b_v there once more (`TopDown.bias_again`). Without it, new B_l are zero: a pre-trained encoder
is unchanged until feedback has learned something, and α = 0 is the bottom-up pass. The backbone defines the blocks and
what lies between them (`vlabs.models.backbones`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from timm.layers import HybridEmbed, LayerNormAct2d, build_sincos2d_pos_embed
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlabs.errors import UserError
from vlabs.models import backbones
from vlabs.models.diversity import pool_tokens
from vlabs.models.hub import Shareable
from vlabs.models.registry import register
from vlabs.models.topdown import Kept, Signal, Steering, TopDown, TopDownSignal, Words, cosines, pick, take
from vlabs.utils.options import Count, Part, Size, check_type

_OTHER = "choose another model/topdown"


class NetworkOptions(TypedDict, total=False):
    """The options of timm's networks that are checked here; there are more.

    Attributes:
        embed_dim: width D of the tokens.
        depth: number of blocks.
        num_heads: attention heads of every block; of a Swin a list, those of every stage.
    """

    embed_dim: Size | None
    depth: Size | None
    num_heads: Size | Sequence[Size] | None


@dataclass
class BottomUp:
    """The first pass over B images, and everything that does not depend on a prior.

    Attributes:
        tokens: (B, N, D), z: the output tokens after the final norm (the mean-token classifier has no such norm).
        hidden: (B, N, D), the output of the last block before the final norm.
        embedded: (B, N, D), the input of the second pass's first block, which is the same in both passes.
        first_qkv: (B, N, 3D), q, k, v of that block; None if they are computed from the kept tokens.
        prepared: the variant's own part, (B, N, D) for every block of the second pass; empty if it has none, or if it
            is computed from the kept tokens, once they are known.
        cls: (B, D), z of [cls] or of what the encoder has instead of it: the images, before any text.
        layers: (B, N, D) each, the outputs of the requested blocks; for the last block, `tokens`.
        read: (B, N), how much [cls] (or, without one, all tokens) attends to each token in the last block; set only if
            patches are kept by it.
    """

    tokens: Tensor
    hidden: Tensor
    embedded: Tensor
    first_qkv: Tensor | None
    prepared: list[Tensor]
    cls: Tensor
    layers: list[Tensor] = field(default_factory=list)
    read: Tensor | None = None


class StoredPass(NamedTuple):
    """The part of the first pass over B images from which the rest follows, so that they need not be encoded again.

    Attributes:
        embedded: (B, N, D), as in `BottomUp`; None if there is no second pass to read it.
        tokens: (B, N, D), z; None if blocks of the first pass are still trained, and continue from `embedded`.
        read: (B, N), as in `BottomUp`, if patches are kept by it.
    """

    embedded: Tensor | None
    tokens: Tensor | None
    read: Tensor | None = None


@dataclass
class VisionTokens:
    """The encoder's output for n priors, each with its image; N is M + 1 if only M tokens are kept.

    Attributes:
        tokens: (n, N, D), after the final norm.
        hidden: (n, N, D), before the final norm: its norm is the paper's attention map.
        token_weights: (n, N) in [0, 1], the similarity of prior and token; None without a prior.
        reconstruction: scalar, Σ_l mse(A_l · sg(output of block l), sg(input of block l)); None if not requested.
        layers: (n, N, D) each, the outputs of the requested blocks; for the last block, `tokens`.
        kept: (n, M), the positions of the kept tokens, ascending; None if all are kept. Otherwise there are M + 1
            tokens, and the last is the mean of all others.
        scores: (n, patches), logits of what the text is about, of a variant with scores of its own.
    """

    tokens: Tensor
    hidden: Tensor
    token_weights: Tensor | None = None
    reconstruction: Tensor | None = None
    layers: list[Tensor] = field(default_factory=list)
    kept: Tensor | None = None
    scores: Tensor | None = None

    def of_all(self, values: Tensor, count: int) -> Tensor:
        """Spread values (n, M) of the kept tokens over all `count` tokens of the encoder, with 0 for the others."""
        if self.kept is None or values.shape[1] == count:
            return values
        places = self.kept.expand(len(values), -1)
        return values.new_zeros(len(values), count).scatter(1, places, values[:, : places.shape[1]])


@register
class AbSViT(nn.Module):
    """A ViT with feedback. Without a `topdown` it is the plain ViT, and a prior changes nothing.

    Args:
        architecture: a timm ViT, e.g. `vit_base_patch16_224`, or one of `vlabs.models.backbones.OWN`, e.g. `rvt_small`.
        img_size: side of the square input in pixels.
        patch_size: side of a patch in pixels.
        topdown: what a prior adds inside attention, or None.
        global_pool: what stands for the whole image: `token` ([cls]), `avg` (mean token), `map` (attention pooling) or
            `probe` (attention pooling by many queries, for a frozen encoder); None for the architecture's own.
        num_classes: classes of the classification head; 0 for no head.
        sincos_positions: initialize the position embeddings with sines and cosines instead of noise; small models from
            scratch learn faster.
        stem: what embeds the image: `patch`, one linear map of a patch, or `conv`, strided 3×3 convolutions (Xiao et
            al., Early Convolutions Help Transformers See Better, 2021), with which a small model from scratch learns
            shapes several times sooner. `patch_size` is then a power of 2.
        start: first block, from 1, of the second pass; the feedback has no decoders below it.
        keep: share of the patches that the second pass and the fusion read: those most similar to ξ, or without ξ those
            that [cls] reads most. The others become one token, their mean. A list draws a share at every training
            step, and evaluation takes the largest.
        tap: K of token-aware average pooling before the attention of every block (`TokenPool`): 4 in its paper; 0 for
            none.
        vit_options: any other argument of the architecture's class (`embed_dim`, `depth`, `num_heads`, …).

    Attributes:
        backbone: the encoder as blocks whose values take a signal; its weights are in `vit`.
        origin: which pre-trained weights it has, and how many of them; None without any.
        shares: the shares that it is trained with, see `keep`.
        needs_all: why no patch can be left out; empty if patches can.

    Raises:
        UserError: the architecture does not exist, or feedback cannot be added to it (see `backbones.create`), or
            `start` or `keep` is out of range.
    """

    spec: dict[str, Any]
    hands_on: ClassVar[tuple[type, ...]] = (NetworkOptions,)
    origin: str | None = None
    needs_all = ""

    def __init__(
        self,
        architecture: str,
        img_size: Size = 224,
        patch_size: Size = 16,
        topdown: TopDown | None = None,
        global_pool: str | None = None,
        num_classes: Count = 0,
        sincos_positions: bool = False,
        stem: Literal["patch", "conv"] = "patch",
        start: Size = 1,
        keep: Part | Sequence[Part] = 1.0,
        tap: Count = 0,
        **vit_options: Any,
    ) -> None:
        super().__init__()
        if img_size % patch_size:
            near = max(1, round(img_size / patch_size)) * patch_size
            raise UserError(
                f"image size {img_size} is not a multiple of the patch size {patch_size}: pass data.image_size={near}"
            )
        if stem == "conv" and architecture in backbones.OWN:
            raise UserError(f"{architecture} has a stem of its own: leave stem out")
        self.backbone = backbones.create(
            architecture,
            embed_layer=partial(_conv_stem, stride=patch_size) if stem == "conv" else None,
            img_size=img_size,
            patch_size=patch_size,
            global_pool=global_pool,
            num_classes=num_classes,
            **vit_options,
        )
        self.vit: Any = self.backbone.network
        if sincos_positions:
            if getattr(self.vit, "pos_embed", None) is None or architecture in backbones.OWN:
                raise UserError(f"{architecture} learns no positions of patches: leave sincos_positions out")
            with torch.no_grad():
                positions = build_sincos2d_pos_embed(list(self.grid_size), self.width, temperature=100.0)
                # [cls] and registers come first and have no place: theirs stay noise.
                self.vit.pos_embed[:, -len(positions) :] = positions  # type: ignore[index,operator]
        self.topdown = topdown
        self.recompute = False
        if start > self.backbone.depth:
            raise UserError(f"model.vision.start={start} must be one of the {self.backbone.depth} blocks, from 1")
        self.start = start
        feeds_back = topdown is not None and topdown.needs_decoders
        self.decoders = self.backbone.make_decoders() if feeds_back else nn.ModuleList()
        for index, decoder in enumerate(self.decoders):
            if index < start - 1:
                self.decoders[index] = nn.Identity()  # it keeps the names of the others
            # B_l = 0: the second pass starts as the first. A_l stays random, or B_l would get no gradient.
            elif topdown is not None and not topdown.bias_again:
                nn.init.zeros_(decoder.linear2.weight)  # type: ignore[union-attr,arg-type]
        if not self.backbone.takes_some:
            self.needs_all = f"{architecture} pools or mixes its patches by their places, and needs them all"
        if tap:
            if vit_options.get("dynamic_img_size"):
                raise UserError(f"model.vision.tap={tap} needs images of one size: pass 0")
            pool_tokens(self.backbone, tap)
            self.needs_all = f"model.vision.tap={tap} pools patches by their places, and needs them all"
        if topdown is not None:
            if topdown.plain and type(self.backbone) is not backbones.ViT:
                raise UserError(
                    f"{type(topdown).__name__} changes the blocks of a plain ViT, which {architecture} is not: choose "
                    "another model/topdown, or a ViT as model.vision.architecture"
                )
            topdown.build(self.backbone, start)
            if topdown.scores_patches:
                self.needs_all = f"{type(topdown).__name__} points with its output tokens, and needs them all"
        self.shares = list(keep) if isinstance(keep, Sequence) else [keep]
        self.check_keep(*self.shares)
        self._keep = float(max(self.shares))

    @property
    def width(self) -> int:
        """D, the width of a token."""
        return self.backbone.width

    @property
    def has_cls(self) -> bool:
        """Whether the first output token is a [cls] that stands for the image."""
        return self.backbone.has_cls

    @property
    def needs_prior(self) -> bool:
        """Whether the output of this encoder depends on ξ."""
        return self.topdown is not None and self.topdown.needs_prior

    @property
    def learns_prior(self) -> bool:
        """Whether gradients reach ξ through what it steers (see `TopDown`)."""
        return self.topdown is not None and self.topdown.needs_prior and self.topdown.learns_prior

    @property
    def reads_words(self) -> bool:
        """Whether all words steer, and ξ only says where to look."""
        return self.topdown is not None and self.topdown.reads_words

    @property
    def looks_twice(self) -> bool:
        """Whether there is a second pass from the embedding of the images, under a prior or with feedback."""
        return self.topdown is not None and self.topdown.second_pass

    @property
    def reconstructs(self) -> bool:
        """Whether there are feedback decoders, which the reconstruction loss trains."""
        return len(self.decoders) > 0

    def zero_parameters(self) -> list[nn.Parameter]:
        """What begins at zero in the decoders or in the variant's layers: while it is zero, nothing is steered."""
        decoders: Any = self.decoders[self.start - 1 :]
        own = [] if self.topdown is None else self.topdown.zero_parameters()
        return [decoder.linear2.weight for decoder in decoders] + own

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: [cls] and registers."""
        return self.backbone.num_prefix_tokens

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.backbone.grid_size

    @property
    def keeps_what_is_read(self) -> bool:
        """Whether patches are kept by the attention of [cls] in the first pass, because there is no ξ."""
        return not self.needs_prior

    @property
    def keep(self) -> float:
        """The share of the patches in the second pass and in what reads it; it can be set."""
        return self._keep

    @keep.setter
    def keep(self, share: float) -> None:
        self.check_keep(share)
        self._keep = float(share)

    @contextmanager
    def keeping(self, share: float | None) -> Iterator[None]:
        """Context manager: keep another share of the patches; None changes nothing."""
        usual = self.keep
        self.keep = usual if share is None else share
        try:
            yield
        finally:
            self.keep = usual

    def check_keep(self, *shares: Any) -> None:
        """Raise a UserError unless these are shares of the patches that this encoder can keep."""
        if not shares:
            raise UserError("model.vision.keep=[] must be a share of the patches, or several: pass 1 for all of them")
        for share in shares:
            check_type("keep", share, Part)
            if share < 1 and self.needs_all:
                raise UserError(f"keep={share:g}: {self.needs_all}")

    def steers(self, seen: VisionTokens) -> Tensor | None:
        """(n,), whether each prior is similar to some patch of its image; otherwise it steers nothing.

        None if the encoder is not steered by the similarity of prior and tokens.
        """
        steered = self.topdown is not None and self.needs_prior and self.topdown.by_similarity
        if not steered or seen.token_weights is None:
            return None
        return (seen.token_weights[:, self.num_prefix_tokens :] > 0).any(dim=1)

    def encode(
        self, images: Tensor | StoredPass, layers: Sequence[int] = (), record: list[Tensor] | None = None
    ) -> BottomUp:
        """The bottom-up pass, and what the top-down variant can compute without a prior.

        Args:
            images: (B, 3, H, W), normalized; or their stored pass. `hidden`, which only the norm map reads, is not
                stored, and is then z.
            layers: blocks, counted from 1, whose outputs are kept.
            record: a list that is emptied and filled with the attention of every block, (B, heads, N, N), with
                gradients; slower, because the attention is then computed explicitly.
        """
        backbone = self.backbone
        begin = 0
        if isinstance(images, StoredPass):
            weight = next(self.parameters())
            stored, known, read = (None if one is None else one.to(weight) for one in images)
            if known is not None:
                return self._known(stored, known, read)
            assert stored is not None
            # What is stored lies before `enter`, so the loop begins with it.
            hidden, begin = stored, self.start - 1
        else:
            hidden = backbone.embed(images)
        # Both are replaced when the loop reaches the second pass's first block.
        embedded = first_qkv = hidden
        positions = backbone.positions()
        forget(record)
        kept: list[Tensor] = []
        last: list[Tensor] | None = [] if self.keep < 1 and self.keeps_what_is_read else None
        for index in range(begin, backbone.depth):
            before, hidden = hidden, backbone.enter(index, hidden)
            qkv = None
            if index == self.start - 1:
                embedded, first_qkv = before, (qkv := backbone.qkv(index, hidden))
            # Explicit attention is slow, so where only `read` needs it, it is that of the last block alone.
            taken = last if record is None and index == backbone.depth - 1 else record
            hidden = self._run(index, hidden, positions, None, qkv, taken)
            if index + 1 in layers and index + 1 < backbone.depth:
                kept.append(hidden)
        tokens = backbone.finish(hidden)
        if backbone.depth in layers:
            kept.append(tokens)
        prepared = self._prepared(tokens)
        read = None
        if last is not None:
            attention = (record or last)[-1].detach().mean(dim=1)  # (B, N, N): each row is what one token reads
            read = attention[:, 0] if backbone.has_cls else attention.mean(dim=1)
        return BottomUp(tokens, hidden, embedded, first_qkv, prepared, backbone.pool(tokens), kept, read)

    def _prepared(self, tokens: Tensor, later: bool = True) -> list[Tensor]:
        """The variant's part of z (B, N, D); nothing yet where `_second_pass` may need it of a few tokens only."""
        may_wait = later and self.keep < 1 and not torch.compiler.is_compiling()
        if self.topdown is None or (may_wait and self.topdown.prepares_tokens):
            return []
        return self.topdown.prepare(tokens, self.feedback)

    @torch.no_grad()
    def choose(self, bottom_up: BottomUp, prior: Tensor | None, image_index: Tensor | None) -> Kept | None:
        """The tokens to keep for n priors or, without a prior, of B images; None for all.

        These are the prefix and the first patches by `order`, which also weights the mean of the others.

        Args:
            bottom_up, prior, image_index: as for `attend`.
        """
        prefix = self.num_prefix_tokens
        patches = bottom_up.tokens.shape[1] - prefix
        count = max(1, round(self.keep * patches))
        if count >= patches:
            return None
        order = self.order(bottom_up, prior, image_index).float()
        best = order[:, prefix:].topk(count, dim=1).indices
        best = best.topk(count, dim=1, largest=False).values + prefix  # sorted; ONNX has no sort
        places = torch.cat([torch.arange(prefix, device=best.device).expand(best.shape[0], -1), best], dim=1)
        # Cosines may be negative, and all of them: the floor keeps this a mean.
        rest = order.clamp(min=1e-3).scatter(1, places, 0.0)
        return Kept(places, rest / rest.sum(dim=1, keepdim=True))

    def order(self, bottom_up: BottomUp, prior: Tensor | None, image_index: Tensor | None) -> Tensor:
        """The values by which patches are kept, largest first: the cosine with ξ, (n, N); s_i where it is above 0.

        Without ξ, the attention of [cls], (B, N).
        """
        if not self.keeps_what_is_read:
            assert prior is not None
            return cosines(prior, bottom_up.tokens, image_index)
        if bottom_up.read is None:
            raise ValueError("the first pass was made when all patches were kept")
        return bottom_up.read

    def _known(self, embedded: Tensor | None, tokens: Tensor, read: Tensor | None) -> BottomUp:
        """The bottom-up pass of a stored result."""
        first = self.start - 1
        first_qkv = None
        if embedded is not None and self.keep == 1:
            first_qkv = self.backbone.qkv(first, self.backbone.enter(first, embedded))
        prepared = self._prepared(tokens)
        embedded = tokens if embedded is None else embedded
        return BottomUp(tokens, tokens, embedded, first_qkv, prepared, self.backbone.pool(tokens), read=read)

    def attend(
        self,
        bottom_up: BottomUp,
        prior: Tensor | None,
        image_index: Tensor | None = None,
        *,
        reconstruct: bool = False,
        layers: Sequence[int] = (),
        alpha: float | None = None,
        record: list[Tensor] | None = None,
        words: Words | None = None,
    ) -> VisionTokens:
        """The second pass: the images again, each under a prior.

        Args:
            bottom_up: the first pass over B images.
            prior: ξ, (n, D); not read if `needs_prior` is False.
            image_index: (n,) the image of each prior; None means that prior i belongs to image i, or that all priors
                belong to a single image.
            reconstruct: also compute the reconstruction loss (training).
            layers: as given to `encode`; outputs that do not change come from there.
            alpha: the strength of the top-down signal instead of the variant's own, if it has one.
            record: as in `encode`, for this pass, (n, heads, N, N); without a second pass, that of the first stays.
            words: all states of the n texts; only read by variants that steer by them.

        Without feedback and `image_index`, a single image gives a single output, whatever the number of priors.

        Raises:
            UserError: there are no words for a variant that steers by them, or `alpha` is above its `most_alpha`.
        """
        topdown = self.topdown
        alpha = alpha if hasattr(topdown, "alpha") else None
        if topdown is not None and alpha is not None and alpha > topdown.most_alpha:
            most = topdown.most_alpha
            raise UserError(
                f"alpha {alpha:g}: {type(topdown).__name__} mixes by α, which is at most {most:g}: pass that"
            )
        if self.needs_prior and prior is None:
            raise ValueError("an encoder that is steered by a prior needs one")
        if self.reads_words and words is None:
            raise UserError(f"{type(topdown).__name__} steers by words, and there are none: {_OTHER}")
        kept = self.choose(bottom_up, prior, image_index)
        if topdown is None or not topdown.needs_prior:
            # The same for all texts of an image, so once an image.
            if topdown is None:
                tokens, hidden = (take(one, None, kept) for one in (bottom_up.tokens, bottom_up.hidden))
                once = VisionTokens(tokens, hidden, layers=bottom_up.layers)
            else:
                once = self._second_pass(
                    topdown, bottom_up, bottom_up.cls, None, kept, reconstruct, layers, alpha, record, None
                )
            return VisionTokens(
                pick(once.tokens, image_index),
                pick(once.hidden, image_index),
                None,
                once.reconstruction,
                [pick(one, image_index) for one in once.layers],
                None if kept is None else pick(kept.places, image_index),
            )
        assert prior is not None
        if not topdown.second_pass:
            change, weights = topdown.reweigh(pick(bottom_up.tokens, image_index), prior, alpha)
            # What is reweighted is the output: earlier blocks are as they were.
            outputs = [pick(one, image_index) for one in bottom_up.layers]
            if self.backbone.depth in layers:
                outputs[-1] = change(outputs[-1])
            both = (bottom_up.tokens, bottom_up.hidden)
            tokens, hidden = (take(change(pick(one, image_index)), None, kept) for one in both)
            return VisionTokens(tokens, hidden, weights, None, outputs, None if kept is None else kept.places)
        return self._second_pass(
            topdown, bottom_up, prior, image_index, kept, reconstruct, layers, alpha, record, words
        )

    def _second_pass(
        self,
        topdown: TopDown,
        bottom_up: BottomUp,
        prior: Tensor,
        image_index: Tensor | None,
        kept: Kept | None,
        reconstruct: bool,
        layers: Sequence[int],
        alpha: float | None,
        record: list[Tensor] | None,
        words: Words | None,
    ) -> VisionTokens:
        backbone, first = self.backbone, self.start - 1
        tokens = pick(bottom_up.tokens, image_index)
        # Variants without a strength, and those of a user that have none to be changed, need not take it.
        given = {} if alpha is None else {"alpha": alpha}

        def prepare_kept(kept: Kept) -> list[Tensor]:
            return topdown.prepare(take(bottom_up.tokens, image_index, kept), self.feedback)

        prepare: Callable[[Kept], list[Tensor]] | None = None
        if topdown.prepares_tokens and not bottom_up.prepared:
            # n (M + 1) tokens against B N, whichever are fewer: C_l is linear and takes every token by itself, so it
            # may come before or after the choice of tokens.
            if kept is not None and len(kept.places) * (kept.places.shape[1] + 1) < bottom_up.tokens[..., 0].numel():
                prepare = prepare_kept
            else:  # once, for all texts of these images
                bottom_up.prepared = self._prepared(bottom_up.tokens, later=False)
        if topdown.reads_words:
            assert words is not None
            signal = topdown.read(words, tokens, prior, self._project, **given)
        else:
            signal = topdown.signal(tokens, prior, bottom_up.prepared, image_index, self.feedback, **given)
        self._spread(signal)
        # Of all tokens, also where few are kept: maps and losses are about the whole image.
        weights = signal.similarity
        if kept is not None:
            signal = signal.at(kept, prepare)

        hidden = take(bottom_up.embedded, image_index, kept)
        reconstruction = hidden.new_zeros(()) if reconstruct and self.reconstructs else None
        prefix = self.num_prefix_tokens
        # Positions are of patches alone, counted from 0.
        patches = None if kept is None else Kept(kept.places[:, prefix:] - prefix, kept.rest[:, prefix:])
        positions = backbone.positions(patches)
        forget(record)
        # q, k, v of a mean token are not the mean of q, k, v, because the norm comes first.
        known = None if kept is not None or topdown.changes_first else bottom_up.first_qkv
        # Blocks before the first of this pass are as they were.
        outputs = [pick(one, image_index) for one in bottom_up.layers[: len({n for n in layers if n <= first})]]
        for index in range(first, backbone.depth):
            block = index - first
            before, hidden = hidden, backbone.enter(index, hidden, partial(signal.merge, block))
            entered, hidden = hidden, signal.enter(block, hidden)
            qkv = None
            # `is`: a variant that changes nothing at this place returns the same tensor.
            if known is not None and index == first and hidden is entered:
                qkv = pick(known, image_index)
            output = self._run(index, hidden, positions, Steering(signal, block, topdown.bias_again), qkv, record)
            output = signal.leave(block, output)
            if reconstruction is not None:
                decoder = self.decoders[index]
                decoded = decoder.linear(output.detach())  # type: ignore[operator]
                # The input may still be one image's, (1, N, D), where the output is that of n priors.
                reconstruction = reconstruction + F.mse_loss(decoded, hidden.detach().expand_as(decoded))
                # Tokens were merged before this block: its decoder must undo that as well.
                if entered is not before:
                    undone = backbone.back(index, hidden.detach(), decoder)
                    reconstruction = reconstruction + F.mse_loss(undone, before.detach())
            hidden = output
            if index + 1 in layers and index + 1 < backbone.depth:
                outputs.append(hidden)
        tokens = backbone.finish(hidden)
        if backbone.depth in layers:
            outputs.append(tokens)
        seen = VisionTokens(tokens, hidden, weights, reconstruction, outputs, None if kept is None else kept.places)
        if topdown.scores_patches:
            seen.scores = topdown.score(tokens)[:, prefix:]
            seen.token_weights = F.pad(seen.scores.softmax(dim=1), (prefix, 0))
        return seen

    def _project(self, block: int, x: Tensor) -> Tensor:
        """See `topdown.Project`."""
        index = block + self.start - 1
        return F.linear(x, self.backbone.qkv_weight(index), self.backbone.qkv_bias(index))

    def _spread(self, signal: Signal) -> None:
        """Tell a signal which output token stands for each token of a block, if these differ."""
        if not self.backbone.is_even:
            signal.spread = lambda block, values: self.backbone.spread(block + self.start - 1, values)

    def _run(self, *arguments: Any) -> Tensor:
        """Run a block, with or without keeping its inner activations for the backward pass."""
        if self.recompute and torch.is_grad_enabled():
            output: Tensor = checkpoint(self.backbone.block, *arguments, use_reentrant=False)
            return output
        return self.backbone.block(*arguments)

    def compile_passes(self, backend: str = "inductor") -> None:
        """Compile both passes with `torch.compile`; see `VisionLanguageModel.compile_parts`."""
        compiled = partial(torch.compile, backend=backend, dynamic=True)
        self.encode = compiled(self.encode)  # type: ignore[method-assign]
        self.attend = compiled(self.attend)  # type: ignore[method-assign]

    def first_signal(self, bottom_up: BottomUp, prior: Tensor) -> Tensor:
        """The signal td of the second pass's first block, (n, N, D), before W_v.

        Args:
            bottom_up: the first pass over one image.
            prior: ξ, (n, D).
        """
        assert self.topdown is not None
        tokens = bottom_up.tokens
        prepared = self.topdown.prepare(tokens, self._first_feedback)
        signal = self.topdown.signal(tokens, prior, prepared, None, self._first_feedback)
        assert isinstance(signal, TopDownSignal)
        self._spread(signal)
        return signal.value(0)

    def _first_feedback(self, tokens: Tensor) -> list[Tensor]:
        """`B_l A_l … A_L tokens` of the second pass's first block alone, without W_v."""
        return [self.decoders[self.start - 1].linear2(self._chain(tokens)[0])]  # type: ignore[operator]

    def _chain(self, tokens: Tensor) -> list[Tensor]:
        """`A_l … A_L tokens` for every block l of the second pass, first block first, with what lies between undone."""
        if not self.backbone.is_even and tokens.shape[-2] == 1:
            # One for all tokens becomes other ones where a token is undone into several.
            tokens = tokens.expand(*tokens.shape[:-2], self.backbone.num_tokens, -1)
        decoded: list[Tensor] = []
        # From the last block down: A_L acts first.
        for index in range(self.backbone.depth - 1, self.start - 2, -1):
            decoder = self.decoders[index]
            tokens = decoder.linear(tokens)  # type: ignore[operator]
            decoded.insert(0, tokens)
            tokens = self.backbone.back(index, tokens, decoder)
        return decoded

    def feedback(self, tokens: Tensor) -> list[Tensor]:
        """`C_l tokens = W_v B_l A_l … A_L tokens` for every block of the second pass, first block first; (…, D) each,
        without b_v.

        W_qkv and 3D instead of W_v and D for a signal of q, k and v.
        """
        whole = self.topdown is not None and self.topdown.qkv_signal
        weight_of = self.backbone.qkv_weight if whole else self.backbone.value_weight
        # Of many tokens it is cheaper to multiply the two maps first; a product of maps costs as much as D tokens.
        # An export is for any number of tokens, and cannot decide by it.
        many = torch.compiler.is_exporting() or tokens[..., 0].numel() > 2 * self.width
        signals = []
        for index, decoded in enumerate(self._chain(tokens), self.start - 1):
            weight = weight_of(index)
            out: nn.Linear = self.decoders[index].linear2  # type: ignore[assignment]
            signals.append(F.linear(decoded, weight @ out.weight) if many else F.linear(out(decoded), weight))
        return signals


@register
class AbSViTClassifier(nn.Module, Shareable):
    """AbSViT as an ImageNet classifier: without text, ξ is a trainable vector (paper, section 5.1).

    Args:
        encoder: an AbSViT with a classification head.
    """

    def __init__(self, encoder: AbSViT) -> None:
        super().__init__()
        self.encoder = encoder
        self.prompt = nn.Parameter(torch.empty(encoder.width))
        nn.init.trunc_normal_(self.prompt, std=0.02)

    def forward(
        self,
        images: Tensor,
        prior: Tensor | None = None,
        reconstruct: bool = True,
        alpha: float | None = None,
        record: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, VisionTokens]:
        """Classify images.

        Args:
            images: (B, 3, H, W), normalized.
            prior: ξ, (B, D), instead of the trained vector.
            reconstruct: compute the reconstruction loss.
            alpha: the strength of the top-down signal instead of the variant's own.
            record: filled with the attention of the last pass, see `AbSViT.encode`.

        Returns:
            Logits of the second pass and of the bottom-up pass, both (B, K), the same tensor without feedback; and the
            output of the second pass.
        """
        bottom_up = self.encoder.encode(images, record=record)
        head = self.encoder.backbone.classify
        before = head(bottom_up.tokens)
        if self.encoder.topdown is None:
            return before, before, VisionTokens(bottom_up.tokens, bottom_up.hidden)
        given = self.prompt.expand(images.shape[0], -1) if prior is None else prior
        seen = self.encoder.attend(bottom_up, given, reconstruct=reconstruct, alpha=alpha, record=record)
        return head(seen.tokens), before, seen

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Probabilities of the classes from logits (softmax)."""
        return logits.float().softmax(dim=-1)

    def class_priors(self, labels: Sequence[int]) -> Tensor:
        """ξ that asks for a class: its row of the last linear layer (paper, section 6.1); (n, D) for n labels."""
        weight: Tensor = self.encoder.vit.head.weight  # type: ignore[union-attr,assignment]
        return weight[torch.as_tensor(labels, device=weight.device)]

    def recompute_activations(self) -> None:
        """Keep only the input of each block in the forward pass; see `VisionLanguageModel.recompute_activations`."""
        self.encoder.recompute = True

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile both passes with `torch.compile`.

        Args:
            backend: that of `torch.compile`.
        """
        self.encoder.compile_passes(backend)


def assemble_classifier(vision: AbSViT, alpha: float = 1.0) -> AbSViTClassifier:
    """Build a classifier from its config.

    Args:
        vision: the encoder, with a head.
        alpha: α of a trained ξ, which `model/topdown` reads: 1 on ImageNet (paper, section 6).

    Raises:
        UserError: words steer the encoder.
    """
    if vision.reads_words:
        raise UserError(f"{type(vision.topdown).__name__} steers by words, and a classifier has none: {_OTHER}")
    return AbSViTClassifier(vision)


def _conv_stem(
    *,
    embed_dim: int,
    in_chans: int,
    img_size: int,
    stride: int,
    strict_img_size: bool = True,
    output_fmt: str | None = None,
    **unused: Any,
) -> HybridEmbed:
    """timm's convolutional stem: halves the image until one pixel is one patch, doubling the channels up to D.

    It has layer norm instead of batch norm, so that an image does not depend on the others in its batch.
    """
    depth = stride.bit_length() - 1
    if stride != 2**depth or depth < 1:
        raise UserError(f"stem 'conv' halves the image: patch size {stride} must be a power of 2, at least 2")
    channels = tuple(max(8, embed_dim >> (depth - 1 - layer)) for layer in range(depth))  # …, D/4, D/2, D
    backbone = ConvStem(
        in_chans, depth, channels, stride=(2,) * depth, padding=1, norm_layer=partial(LayerNormAct2d, act_layer=nn.GELU)
    )
    # The last two are for images of any size, by timm's `dynamic_img_size`.
    return HybridEmbed(
        backbone, img_size, feature_ratio=stride, in_chans=in_chans, embed_dim=embed_dim, proj=False,
        strict_img_size=strict_img_size, output_fmt=output_fmt,
    )  # fmt: skip


def forget(record: list[Tensor] | None) -> None:
    """Empty the list that holds the attention of another pass."""
    if record is not None:
        record.clear()
