"""The whole model: an image encoder steered by the text, a text encoder, fusion and a task head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, BottomUp, StoredPass, VisionTokens
from vlabs.models.flair import TextPool
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.hub import Shareable
from vlabs.models.prior import PRIOR_TOKENS, PriorMap, PriorTokens
from vlabs.models.registry import register
from vlabs.models.text import RobertaEncoder, TextEncoder
from vlabs.models.topdown import Words, pick, similarity
from vlabs.utils.options import Count, Size


@dataclass
class VLMOutput:
    """The model's output for n texts about their images.

    If a text has p images, n is the number of text-image pairs in all attributes but the first two; the p pairs of a
    text are adjacent.

    Attributes:
        logits: the task head's output: (n, answers), or (n,) for ranking.
        pooled_features: (n, 2D) from the fusion; (n, 2D p) if a text has p images, in order.
        text_features, image_features: (n, T, D) and (n, N, D) from the fusion; one token each unless all are requested.
        prior: ξ, (n, D_vision), or (n, M, D_vision) of several; None if there is none.
        seen: the second pass over the images.
        bottom_up: the first pass over the B images.
        image_index: (n,) the image of each text; None if text i is about image i, or all are about a single image.
        text_states: (n, T, D_text), from the text encoder.
        text_mask: (n, T), 0 for padding.
        image_read: (n, N), the fusion's text-to-image attention; None unless requested.
        prior_reads: (n, M, N), how much of each image token is in the token of each ξ; None without such tokens.
        losses: unweighted losses that the model itself computes, by name: `reconstruction`, if requested.
    """

    logits: Tensor
    pooled_features: Tensor
    text_features: Tensor
    image_features: Tensor
    prior: Tensor | None
    seen: VisionTokens
    bottom_up: BottomUp
    image_index: Tensor | None
    text_states: Tensor
    text_mask: Tensor
    image_read: Tensor | None = None
    prior_reads: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pairs(self) -> int:
        """n, the number of text-image pairs."""
        return len(self.text_states)

    def of_image(self, values: Tensor) -> Tensor:
        """Values of the fusion's image tokens, (n, N + M), for the image's own, (n, N): M tokens hand theirs on."""
        if self.prior_reads is None:
            return values
        count = self.prior_reads.shape[2]
        handed = values[:, None, count:] @ self.prior_reads.to(values.dtype)  # (n, 1, M) · (n, M, N)
        return values[:, :count] + handed[:, 0]


@register
class VisionLanguageModel(nn.Module, Shareable):
    """METER with a steerable image encoder.

    Args:
        vision, text, fusion, head: the parts, already built to fit each other (`assemble` does that).
        prior: the map from text to ξ; None without ξ. The encoder need not read it, see `assemble`.
        pool: pools an image's patches for ξ, for retrieval; or None.
        prior_tokens: the tokens of what ξ points at; None to fuse the image's own tokens only.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        vision: AbSViT,
        text: TextEncoder,
        fusion: CoAttentionFusion,
        head: nn.Module,
        prior: PriorMap | None = None,
        pool: TextPool | None = None,
        prior_tokens: PriorTokens | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.fusion = fusion
        self.head = head
        self.prior = prior
        self.pool = pool
        self.prior_tokens = prior_tokens
        if vision.topdown is not None and vision.topdown.reads_words:
            vision.topdown.hear(text.width, vision.backbone, vision.start)

    @property
    def prior_count(self) -> int:
        """M, the number of ξ per text."""
        return 1 if self.prior is None else self.prior.count

    @property
    def pads_to_fixed_length(self) -> bool:
        """Whether ξ depends on the padding, so that every text must be padded to the same length."""
        return self.prior is not None and self.prior.count == 1 and self.prior.token == "mean"

    def recompute_activations(self) -> None:
        """Keep only the input of each layer in the forward pass, and recompute the rest in the backward pass.

        This saves memory for a third more time, and does not change the numbers.
        """
        self.vision.recompute = self.fusion.recompute = True
        self.text.recompute_activations()

    def compile_parts(self, backend: str = "inductor") -> None:
        """Compile both passes and the fusion with `torch.compile`; numbers change within rounding.

        The text encoder is not compiled: it takes few tokens, and their number changes from batch to batch.

        Args:
            backend: that of `torch.compile`.
        """
        compiled = partial(torch.compile, backend=backend, dynamic=True)
        self.vision.compile_passes(backend)
        self.fusion.forward = compiled(self.fusion.forward)  # type: ignore[method-assign]

    def forward(
        self,
        images: Tensor | StoredPass | BottomUp,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_index: Tensor | None = None,
        text_index: Tensor | None = None,
        prior: Tensor | None = None,
        *,
        reconstruct: bool = False,
        all_features: bool = False,
        read_image: bool = False,
        alpha: float | None = None,
        record: list[Tensor] | None = None,
    ) -> VLMOutput:
        """Encode images and texts, and join them.

        Args:
            images: (B, 3, H, W), normalized; or their first pass, whole or as stored.
            input_ids, attention_mask: (n, T).
            image_index: (n,) the image of each text; None means that text i belongs to image i; (n, p) if each text is
                about p images together.
            text_index: (p,), the text of each of p pairs; `image_index` and the output then have p entries too. A text
                is encoded once, however many images it is paired with.
            prior: ξ, (n, D_vision), instead of the texts' own.
            reconstruct: compute the reconstruction loss.
            all_features: return the fused features of all tokens, not only of the first.
            read_image: return the fusion's text-to-image attention.
            alpha: the strength of the top-down signal instead of the variant's own, if it has one.
            record: filled with the attention of the last pass over the images, see `AbSViT.encode`.
        """
        bottom_up = images if isinstance(images, BottomUp) else self.vision.encode(images, record=record)
        text_states = self.text(input_ids, attention_mask)
        prior = self.prior_of(text_states, input_ids, attention_mask) if prior is None else prior
        if text_index is not None:
            text_states, attention_mask = text_states[text_index], attention_mask[text_index]
            prior = None if prior is None else prior[text_index]
        pictures = 1
        if image_index is not None and image_index.ndim == 2:
            pictures, image_index = image_index.shape[1], image_index.flatten()
            text_states, attention_mask = (t.repeat_interleave(pictures, dim=0) for t in (text_states, attention_mask))
            prior = None if prior is None else prior.repeat_interleave(pictures, dim=0)
        return self.join(
            bottom_up,
            prior,
            text_states,
            attention_mask,
            image_index,
            pictures,
            reconstruct=reconstruct,
            all_features=all_features,
            read_image=read_image,
            alpha=alpha,
            record=record,
        )

    def prior_of(self, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        """ξ of texts, see `PriorMap.forward`; None if the model has no prior."""
        return self.prior(text_states, input_ids, attention_mask) if self.prior is not None else None

    def join(
        self,
        bottom_up: BottomUp,
        prior: Tensor | None,
        text_states: Tensor,
        attention_mask: Tensor,
        image_index: Tensor | None = None,
        pictures: int = 1,
        *,
        reconstruct: bool = False,
        all_features: bool = False,
        read_image: bool = False,
        alpha: float | None = None,
        record: list[Tensor] | None = None,
    ) -> VLMOutput:
        """Second pass, fusion and head for encoded images and texts; arguments as in `forward`.

        Without `image_index`, a single image may serve all texts.

        Args:
            pictures: p, the images per text: each text then occurs p times in a row; `image_index` names its images.
        """
        words = Words(text_states, attention_mask)
        seen = self.vision.attend(
            bottom_up, prior, image_index, reconstruct=reconstruct, alpha=alpha, record=record, words=words
        )
        if prior is not None and not self.vision.needs_prior:
            # Where ξ steers nothing, what it points at is still worth knowing.
            z = bottom_up.tokens if image_index is None else bottom_up.tokens.index_select(0, image_index)
            seen.token_weights = similarity(prior, z)
        tokens, reads = seen.tokens, None
        if self.prior_tokens is not None and prior is not None:
            reads = self._prior_reads(self.prior_tokens, bottom_up, prior, image_index, seen)
            tokens = self.prior_tokens(reads, tokens)
        # The p pairs of a text are adjacent: 0, 1, …, p - 1, 0, 1, …
        picture = torch.arange(text_states.shape[0], device=text_states.device) % pictures if pictures > 1 else None
        fused = self.fusion(
            text_states, attention_mask, tokens, picture, pooled_only=not all_features, read_image=read_image
        )
        # (n, 2D) of pairs to (texts, p · 2D).
        pooled = fused.pooled if pictures == 1 else fused.pooled.unflatten(0, (-1, pictures)).flatten(1)
        losses = {} if seen.reconstruction is None else {"reconstruction": seen.reconstruction}
        output = VLMOutput(
            logits=self.head(pooled),
            pooled_features=pooled,
            text_features=fused.text,
            image_features=fused.image[:, : seen.tokens.shape[1]],
            prior=prior,
            seen=seen,
            bottom_up=bottom_up,
            image_index=image_index,
            text_states=text_states,
            text_mask=attention_mask,
            prior_reads=reads,
            losses=losses,
        )
        output.image_read = None if fused.image_read is None else output.of_image(fused.image_read)
        return output

    def _prior_reads(
        self, tokens: PriorTokens, bottom_up: BottomUp, prior: Tensor, image_index: Tensor | None, seen: VisionTokens
    ) -> Tensor:
        """See `VLMOutput`: of the patches that are kept, and nothing of the mean of the others."""
        prefix = self.vision.num_prefix_tokens
        reads = tokens.reads(prior, pick(bottom_up.tokens[:, prefix:], image_index))
        reads = F.pad(reads, (prefix, 0))
        if seen.kept is None:
            return reads
        reads = reads.gather(2, seen.kept[:, None].expand(*reads.shape[:2], -1))
        # A distribution over the kept patches again; the last token, the mean of the others, gets 0.
        return F.pad(reads / reads.sum(dim=2, keepdim=True).clamp_min(1e-6), (0, 1))


def assemble(
    vision: AbSViT,
    text: TextEncoder,
    fusion: Callable[..., CoAttentionFusion],
    head: Callable[..., nn.Module],
    prior_token: str = "cls",
    unused_prior: bool = False,
    prior_count: Size = 1,
    pool_heads: Count = 0,
    prior_tokens: bool = False,
) -> VisionLanguageModel:
    """Build the parts that depend on the encoders' widths, and the whole model.

    Args:
        vision, text: the encoders.
        fusion: makes the fusion, called with `text_dim` and `image_dim`.
        head: makes the task head, called with `in_features`.
        prior_token: text state that becomes ξ: `cls`, `mean` or `eos` (see `PriorMap`).
        unused_prior: make and train ξ also where the image encoder does not read it: the control of steering itself.
        prior_count: M, the number of ξ per text; a patch is as similar to them as to the most similar one.
        pool_heads: heads of FLAIR's text-conditioned pooling (`TextPool`), which ranks instead of the similarity of ξ
            and patches; 0 for none.
        prior_tokens: the fusion also gets a token for each ξ, of what it points at (`PriorTokens`).

    Raises:
        ValueError: `prior_token` is `eos` and the text encoder is not a RoBERTa.
        UserError: the variant reads one ξ only, or none; `prior_token` is given for several ξ.
    """
    if prior_count > 1 and vision.topdown is not None and not vision.topdown.takes_several:
        raise UserError(f"model.prior_count={prior_count}: {type(vision.topdown).__name__} reads one ξ: pass 1")
    if prior_count > 1 and prior_token != PRIOR_TOKENS[0]:
        raise UserError(
            f"model.prior_token={prior_token}: of several ξ (model.prior_count={prior_count}) each reads all words: "
            "leave it out"
        )
    if prior_token == "eos" and not isinstance(text, RobertaEncoder):
        raise ValueError("prior_token 'eos' is RoBERTa's </s>: choose cls or mean for another text encoder")
    # Without a [cls] the pooler reads the mean of the image tokens, as METER's does of a Swin.
    pooling = {} if vision.has_cls else {"image_pool": "mean"}
    joined = fusion(text_dim=text.width, image_dim=vision.width, **pooling)
    has_prior = vision.needs_prior or unused_prior
    if prior_count > 1 and not has_prior:
        raise UserError(f"model.prior_count={prior_count}: this model/topdown reads no ξ: pass 1, or another one")
    if pool_heads and not has_prior:
        raise UserError(f"model.pool_heads={pool_heads} pools for ξ, which this model/topdown does not have: pass 0")
    if prior_tokens and not has_prior:
        raise UserError("model.prior_tokens=true: this model/topdown reads no ξ: pass false, or another one")
    prior = PriorMap(text.width, vision.width, prior_token, prior_count) if has_prior else None
    pool = TextPool(vision.width, pool_heads) if pool_heads else None
    pointed = PriorTokens(prior_count, vision.width) if prior_tokens else None
    return VisionLanguageModel(vision, text, joined, head(in_features=2 * joined.width), prior, pool, pointed)
