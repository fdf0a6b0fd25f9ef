"""ξ, the prior that steers the image encoder, and the losses that align it with the image.

`PriorLoss` is the paper's and compares whole images. The others are not in the paper and work on patches: the
top-down signal is α · sᵢ · zᵢ with sᵢ the similarity of ξ and zᵢ, so where a text looks is decided by the patch tokens
that are close to ξ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.models.registry import register
from vlabs.models.topdown import cosines, whole
from vlabs.utils.options import Positive, Share, Size, checked

PRIOR_TOKENS = ("cls", "mean", "eos")
EOS_TOKEN_ID = 2


@register
class PriorMap(nn.Module):
    """ξ = W · text state + b (paper, appendix C: a linear map of the text into the space of the visual tokens).

    Args:
        text_dim: width of the text encoder.
        vision_dim: width of the image encoder.
        token: which state is mapped. `cls`: the first token (paper). `mean`: the mean over all positions, padding
            included (released VQA code; it depends on the padded length). `eos`: the first `</s>` (released retrieval).
        count: M; if above 1, M learned queries q_m each read the words, `softmax_j(q_m · t_j / √D_text)`, and what they
            read takes the place of `token`.
    """

    def __init__(self, text_dim: int, vision_dim: int, token: str = "cls", count: Size = 1) -> None:
        super().__init__()
        self.count = count
        if token not in PRIOR_TOKENS:
            raise ValueError(f"prior_token '{token}': choose one of {', '.join(PRIOR_TOKENS)}")
        self.token = token
        self.project = nn.Linear(text_dim, vision_dim)
        nn.init.trunc_normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)
        if count > 1:
            self.queries = nn.Parameter(torch.randn(count, text_dim) / 2)

    def forward(self, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Map text states (n, T, D_text) to priors (n, D_vision), or (n, M, D_vision) if there are several.

        Args:
            text_states: from the text encoder.
            input_ids, attention_mask: (n, T), the tokens.
        """
        if hasattr(self, "queries"):
            scores = text_states @ self.queries.T / text_states.shape[-1] ** 0.5
            read = scores.masked_fill(attention_mask[..., None] == 0, float("-inf")).softmax(dim=1)  # (n, T, M)
            state = read.transpose(1, 2) @ text_states
        elif self.token == "cls":
            state = text_states[:, 0]
        elif self.token == "mean":
            state = text_states.mean(dim=1)
        else:
            # argmax returns the first of equal values, so this is the first `</s>`.
            position = (input_ids == EOS_TOKEN_ID).to(torch.int8).argmax(dim=1)
            state = text_states[torch.arange(text_states.shape[0], device=text_states.device), position]
        return self.project(state)


@register
class PriorTokens(nn.Module):
    """A token for each ξ with what it points at, `Σ_i softmax_i(cos(ξ_m, z_i) / τ) x_i` plus a learned type of m.

    x are the tokens after the second pass, z those before it. What the fusion would have to find among all patches
    stands here in one place, and several ξ in an order. Not in the paper.

    Args:
        count: M, the ξ per text.
        width: D.
        temperature: τ, as of `RegionPriorLoss`, which teaches the same distribution.
    """

    def __init__(self, count: Size, width: Size, temperature: Positive = 0.1) -> None:
        super().__init__()
        self.kind = nn.Parameter(0.02 * torch.randn(count, width))
        self.temperature = temperature

    def reads(self, prior: Tensor, patches: Tensor) -> Tensor:
        """How much of each patch is read for each ξ, (n, M, P).

        Args:
            prior: ξ, (n, D) or (n, M, D).
            patches: z without [cls], (n, P, D), or (1, P, D) of one image.
        """
        prior = F.normalize(prior[:, None] if prior.ndim == 2 else prior, dim=-1)
        return (prior @ F.normalize(patches, dim=-1).transpose(1, 2) / self.temperature).softmax(dim=-1)

    def forward(self, reads: Tensor, tokens: Tensor) -> Tensor:
        """Append M tokens, (n, N + M, D), to tokens (n, N, D) or (1, N, D), by how much of each is read, (n, M, N)."""
        read = reads.to(tokens.dtype) @ tokens + self.kind
        return torch.cat([tokens.expand(read.shape[0], -1, -1), read], dim=1)


@checked("task.prior_loss")
class PriorLoss(nn.Module):
    """−log p_ξ(z_L) of the paper's Eq. 15 in CLIP's form: cross-entropy over the batch of ξ · z / temperature.

    Only matched pairs are positives. Outputs of the same image under another text are neither positive nor negative.

    Args:
        temperature: initial temperature; 1 / temperature is capped at 100.
        learnable: whether the temperature is trained.
        directions: `both` (text to image and image to text, averaged), `text` (each ξ against all z, as in Eq. 15) or
            `image`.
        normalize: use the cosine similarity; False for the dot product of Eq. 15.
    """

    def __init__(
        self,
        temperature: Positive = 0.07,
        learnable: bool = True,
        directions: Literal["both", "text", "image"] = "both",
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)), requires_grad=learnable)
        self.directions = directions
        self.normalize = normalize

    def forward(self, prior: Tensor, seen: Tensor, image_ids: Tensor) -> Tensor:
        """The loss of n matched pairs; zero without pairs.

        Args:
            prior: ξ, (n, D), or (n, M, D), whose mean is compared.
            seen: (n, D), the second pass's [cls] state under each prior.
            image_ids: (n,), which image each pair is about.
        """
        prior = whole(prior)
        if not len(prior):
            # A mean over nothing is NaN; the sum keeps every parameter in the graph, which DDP asks for.
            return prior.sum() + seen.sum() + 0 * self.log_scale
        if self.normalize:
            prior, seen = F.normalize(prior, dim=-1), F.normalize(seen, dim=-1)
        logits = self.log_scale.exp().clamp(max=100) * prior @ seen.T
        matched = torch.eye(len(prior), dtype=torch.bool, device=prior.device)
        same_image = image_ids[:, None] == image_ids[None, :]
        logits = logits.masked_fill(same_image & ~matched, float("-inf"))
        labels = torch.arange(len(prior), device=prior.device)
        losses = []
        if self.directions != "image":
            losses.append(F.cross_entropy(logits, labels))
        if self.directions != "text":
            losses.append(F.cross_entropy(logits.T, labels))
        return torch.stack(losses).mean()


@checked("RegionPriorLoss")
class RegionPriorLoss(nn.Module):
    """ξ points at a region: cross-entropy of softmax_i(cos(ξ, z_i) / τ) against the share of the region in patch i.

    Args:
        temperature: τ, fixed.
    """

    def __init__(self, temperature: Positive = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(
        self,
        prior: Tensor,
        tokens: Tensor,
        image_index: Tensor | None,
        coverage: Tensor,
        scores: Tensor | None = None,
    ) -> Tensor:
        """The mean over n texts. Texts without a region add zero, so the loss does not depend on batching.

        Args:
            prior: ξ, (n, D), or (n, M, D) of several, of which the most similar counts.
            tokens: z of the patches, (B, N, D), from the bottom-up pass.
            image_index: (n,), the image of each text; None if text i is about image i.
            coverage: (n, N), how much of each patch a text's region covers; zeros without a region. (n, M, N), a region
                for each of several ξ; the loss is their mean.
            scores: (n, N), logits instead of cos(ξ, z_i) / τ, of a variant that has its own (`TopDown.score`).
        """
        if coverage.ndim == 3 and scores is not None:
            coverage = coverage.amax(dim=1)
        elif coverage.ndim == 3:
            # Each ξ and its own region become a text of their own: n · M texts.
            count = coverage.shape[1]
            index = torch.arange(len(prior), device=prior.device) if image_index is None else image_index
            prior, coverage = prior.flatten(0, 1), coverage.flatten(0, 1)
            image_index = index.repeat_interleave(count)
        scores = cosines(prior, tokens, image_index) / self.temperature if scores is None else scores
        pointed = scores.log_softmax(dim=1)
        size = coverage.sum(dim=1, keepdim=True)
        # Without a region the target is 0 everywhere, and with it this text's loss.
        target = coverage / size.clamp_min(1e-6)
        return -(target * pointed).sum() / max(1, len(prior))


@checked("AlivePriorLoss")
class AlivePriorLoss(nn.Module):
    """Keeps ξ similar to some patch of its own image: relu(margin − max_i cos(ξ, z_i)).

    The other losses compare texts, images or patches with each other, and do not care where zero is. What steers is
    clamp(cos, 0, 1), which has neither a value nor a gradient if ξ is similar to no patch.

    Args:
        margin: the required cosine, in [0, 1].
    """

    def __init__(self, margin: Share = 0.1) -> None:
        super().__init__()
        self.margin = margin

    def forward(
        self, prior: Tensor, tokens: Tensor, image_index: Tensor | None, coverage: Tensor | None = None
    ) -> Tensor:
        """The mean over n texts, where texts with a region add zero.

        Args:
            prior, tokens, image_index, coverage: as in `RegionPriorLoss`; `coverage` is None if no text has a region.
        """
        short = (self.margin - cosines(prior, tokens, image_index).amax(dim=1)).relu()
        if coverage is not None:
            short = short * (coverage.flatten(1).sum(dim=1) == 0)
        return short.sum() / max(1, len(prior))


@checked("TokenPriorLoss")
class TokenPriorLoss(nn.Module):
    """Teaches ξ to point without regions: its most similar patches must tell its image from the others in the batch.

    The similarity of text n and image b is a soft maximum over patches, `logsumexp_i(cos(ξ_n, z_bi) / τ)`: an image
    belongs to a text if some part of it does. The loss is cross-entropy over the batch, in both directions as in
    `PriorLoss`. Which patches are the best is left to learning, as in multiple-instance learning.

    Args:
        temperature: τ, fixed.
    """

    def __init__(self, temperature: Positive = 0.1) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, prior: Tensor, tokens: Tensor, image_index: Tensor | None) -> Tensor:
        """The loss of n texts about B images; zero without texts. An image without a text only serves as a negative.

        Args:
            prior: ξ, (n, D).
            tokens: z of the patches, (B, N, D), from the bottom-up pass.
            image_index: (n,), the image of each text; None if text i is about image i.
        """
        n = len(prior)
        if not n:
            return prior.sum() + 0 * tokens.sum()
        index = torch.arange(n, device=prior.device) if image_index is None else image_index
        prior, tokens = F.normalize(prior.float(), dim=-1), F.normalize(tokens.float(), dim=-1)
        alike = torch.einsum("nmd,bid->nmbi", prior.view(n, -1, prior.shape[-1]), tokens).amax(dim=1)
        logits = (alike / self.temperature).logsumexp(dim=-1)  # (n, B), of (n, B, N)
        to_image = F.cross_entropy(logits, index)
        # Each text against those of other images: the texts of one image are neither right nor wrong for one another.
        own = index[:, None] == torch.arange(len(tokens), device=index.device)
        # No infinity: where all texts are of one image, its gradient would be NaN.
        others = logits.masked_fill(own, torch.finfo(logits.dtype).min / 2).logsumexp(dim=0)[index]  # (n,)
        chosen = logits.gather(1, index[:, None])[:, 0]
        to_text = (torch.logaddexp(chosen, others) - chosen).mean()
        return (to_image + to_text) / 2


@checked("FocusPriorLoss")
class FocusPriorLoss(nn.Module):
    """FocusCLIP's third branch (Khan et al., 2024): the image through its region, beside the image and the text.

    Contrasts (NT-Xent, in CLIP's form) ξ, [cls] of the image and [cls] of the image times `a + (1 − a) · region`, all
    three with each other; images of zeros are black. The branch is for training alone.

    Args:
        floor: a, what is left outside the region.
        temperature: initial temperature, see `PriorLoss`.
    """

    def __init__(self, floor: Share = 0.5, temperature: Positive = 0.07) -> None:
        super().__init__()
        self.floor = floor
        self.contrast = PriorLoss(temperature)

    def mask(
        self, images: Tensor, coverage: Tensor, grid: tuple[int, int], mean: Sequence[float], std: Sequence[float]
    ) -> Tensor:
        """Normalized images (n, 3, H, W) through regions; between patches, regions are interpolated linearly.

        Args:
            images: (n, 3, H, W), normalized.
            coverage: (n, patches), how much of each patch the region covers.
            grid: rows and columns of patches.
            mean, std: of the normalization, by channel.
        """
        heat = F.interpolate(coverage.view(-1, 1, *grid).to(images), images.shape[-2:], mode="bilinear")
        share = self.floor + (1 - self.floor) * heat
        black = -(images.new_tensor(mean) / images.new_tensor(std))[:, None, None]  # 0, normalized
        return black + share * (images - black)

    def forward(self, prior: Tensor, cls: Tensor, focused: Tensor, image_ids: Tensor) -> Tensor:
        """The mean of the three contrasts of n texts; zero without texts.

        Args:
            prior: ξ, (n, D).
            cls: [cls] of each text's image, (n, D).
            focused: [cls] of the image through the text's region, (n, D).
            image_ids: (n,), see `PriorLoss`.
        """
        pairs = (prior, cls), (prior, focused), (focused, cls)
        return torch.stack([self.contrast(one, other, image_ids) for one, other in pairs]).mean()


def overlap(prior: Tensor) -> Tensor:
    """How alike the M priors (n, M, D) of a text are: the mean of relu(cos(ξ_m, ξ_m')) over m ≠ m' and texts."""
    prior = F.normalize(prior.float(), dim=-1)
    cosine = (prior @ prior.transpose(1, 2)).relu()
    count = prior.shape[1]
    off = cosine.sum(dim=(1, 2)) - cosine.diagonal(dim1=1, dim2=2).sum(dim=1)  # without m = m'
    return off.sum() / max(1, len(prior)) / (count * (count - 1))
