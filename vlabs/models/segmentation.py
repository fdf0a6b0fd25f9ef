"""Semantic segmentation: an AbSViT under UperNet (paper, section 6.4), steered by a trained ξ or by a text.

The maps are the patch tokens of the second pass after four blocks, the last with the final norm. All have the stride of
a patch and go straight to the head, as in the released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, VisionTokens
from vlabs.models.hub import Shareable
from vlabs.models.prior import PriorMap
from vlabs.models.registry import register
from vlabs.models.text import TextEncoder
from vlabs.models.topdown import Words
from vlabs.utils.options import Count, Share, Size


@register
class UperNet(nn.Module):
    """UperNet (Xiao et al., 2018) and the auxiliary FCN head of transformers, with the dropout that those leave out.

    Args:
        in_channels: D, of every map.
        num_classes: classes of the logits.
        maps: maps that it reads.
        channels: channels of the head; None for D, at most 512.
        aux_channels: channels of the auxiliary head; None for half of `channels`, 0 for no such head.
        dropout: dropout of channels before the classifiers.
        pool_scales: of the pyramid pooling.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        in_channels: int,
        num_classes: Size,
        maps: Size = 4,
        channels: Size | None = None,
        aux_channels: Count | None = None,
        dropout: Share = 0.1,
        pool_scales: Sequence[int] = (1, 2, 3, 6),
    ) -> None:
        from transformers import UperNetConfig  # not for the models that segment nothing
        from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

        super().__init__()
        channels = min(in_channels, 512) if channels is None else channels
        aux_channels = channels // 2 if aux_channels is None else aux_channels
        config = UperNetConfig(
            backbone_config={"model_type": "vit"},
            hidden_size=channels,
            pool_scales=list(pool_scales),
            num_labels=num_classes,
            auxiliary_channels=max(1, aux_channels),
            auxiliary_num_convs=1,
            auxiliary_concat_input=False,
        )
        self.num_classes = num_classes
        widths = [in_channels] * maps
        self.head = UperNetHead(config, widths)
        self.head.classifier = nn.Sequential(nn.Dropout2d(dropout), self.head.classifier)
        self.auxiliary = UperNetFCNHead(config, widths, in_index=maps - 1) if aux_channels else None
        if self.auxiliary is not None:
            self.auxiliary.classifier = nn.Sequential(nn.Dropout2d(dropout), self.auxiliary.classifier)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for head in (self.head, self.auxiliary):
            if head is not None:
                nn.init.normal_(head.classifier[1].weight, std=0.01)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Maps (n, D, rows, columns) to logits (n, K, rows, columns) of both heads; None without the auxiliary one."""
        # A single image pooled to a single value has no variance: these layers then use what they have seen before.
        alone = self.training and len(maps[0]) == 1
        for module in self.head.psp_modules.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(self.training and not alone)
        # The head adds in place into its list's entries, and the auxiliary one reads the list again.
        return self.head(list(maps)), None if self.auxiliary is None else self.auxiliary(list(maps))


class Segments(NamedTuple):
    """The output of a segmenter.

    Attributes:
        logits: (n, K, H, W), at the images' size.
        auxiliary: the same from the auxiliary head; None unless requested.
        seen: the second pass.
        prior: ξ, (n, D) or (B, D).
    """

    logits: Tensor
    auxiliary: Tensor | None
    seen: VisionTokens
    prior: Tensor | None


@register
class Segmenter(nn.Module, Shareable):
    """Maps images of any size to a class per pixel, under a trained ξ or that of a text.

    Args:
        vision: an encoder whose blocks all have the same tokens, and that takes any image size.
        decoder: the head that reads its maps.
        layers: the blocks, counted from 1, after which a map is taken.
        text, prior: the text encoder and the map to ξ; None for a trained ξ.

    Raises:
        UserError: the encoder's blocks have other tokens than its output.
    """

    spec: dict[str, Any]

    def __init__(
        self,
        vision: AbSViT,
        decoder: UperNet,
        layers: Sequence[int],
        text: TextEncoder | None = None,
        prior: PriorMap | None = None,
    ) -> None:
        super().__init__()
        if not vision.backbone.is_even:
            raise UserError(
                "segmentation reads maps of one stride from every block: choose a ViT as model.vision.architecture"
            )
        if not layers or min(layers) < 1 or max(layers) > vision.backbone.depth:
            raise UserError(f"model.layers={list(layers)} must be among the {vision.backbone.depth} blocks, from 1")
        vision.needs_all = "segmentation maps every patch"
        vision.check_keep(*vision.shares)
        self.vision = vision
        self.decoder = decoder
        self.layers = [int(layer) for layer in layers]
        self.text = text
        self.prior = prior
        if text is not None and vision.topdown is not None and vision.topdown.reads_words:
            vision.topdown.hear(text.width, vision.backbone, vision.start)
        self.prompt = nn.Parameter(torch.empty(vision.width)) if text is None else None
        if self.prompt is not None:
            nn.init.trunc_normal_(self.prompt, std=0.02)

    @property
    def patch(self) -> int:
        """Side of a patch in pixels."""
        size = self.vision.vit.patch_embed.img_size
        return int(size[0] // self.vision.grid_size[0])

    @property
    def pads_to_fixed_length(self) -> bool:
        """See `VisionLanguageModel`."""
        return self.prior is not None and self.prior.token == "mean"

    def recompute_activations(self) -> None:
        """See `VisionLanguageModel.recompute_activations`."""
        self.vision.recompute = True
        if self.text is not None:
            self.text.recompute_activations()

    def compile_parts(self, backend: str = "inductor") -> None:
        """See `VisionLanguageModel.compile_parts`."""
        self.vision.compile_passes(backend)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_index: Tensor | None = None,
        *,
        auxiliary: bool = False,
        reconstruct: bool = False,
    ) -> Segments:
        """Segment images.

        Args:
            images: (B, 3, H, W), normalized. Sides need not be multiples of the patch: they are padded, and the logits
                of the padding are cut off.
            input_ids, attention_mask: (n, T), if the model reads texts.
            image_index: (n,), the image of each text; None if text i is about image i.
            auxiliary: also compute the auxiliary head's logits.
            reconstruct: compute the reconstruction loss.
        """
        height, width = images.shape[-2:]
        below, right = -height % self.patch, -width % self.patch
        padded = F.pad(images, (0, right, 0, below)) if below or right else images
        bottom_up = self.vision.encode(padded, self.layers)
        prior: Tensor | None
        words = None
        if self.text is not None and self.prior is not None:
            if input_ids is None or attention_mask is None:
                raise ValueError("the model is steered by texts, and none is given")
            states = self.text(input_ids, attention_mask)
            words = Words(states, attention_mask)
            prior = self.prior(states, input_ids, attention_mask)
        else:
            assert self.prompt is not None
            prior = self.prompt.expand(len(images), -1)
            image_index = None
        seen = self.vision.attend(
            bottom_up, prior, image_index, reconstruct=reconstruct, layers=self.layers, words=words
        )
        grid = padded.shape[-2] // self.patch, padded.shape[-1] // self.patch
        maps = [tokens[:, self.vision.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid) for tokens in seen.layers]
        logits, of_auxiliary = self.decoder(maps)

        def at_pictures(values: Tensor) -> Tensor:
            large = F.interpolate(values, padded.shape[-2:], mode="bilinear", align_corners=False)
            return large[..., :height, :width]

        wanted = auxiliary and of_auxiliary is not None
        return Segments(at_pictures(logits), at_pictures(of_auxiliary) if wanted else None, seen, prior)

    @torch.no_grad()
    def slide(self, images: Tensor, crop: tuple[int, int], stride: tuple[int, int], **texts: Any) -> Tensor:
        """Logits (n, K, H, W) of windows over the images, averaged where they overlap.

        Args:
            images: (B, 3, H, W).
            crop: rows and columns of a window; a smaller image is a single window.
            stride: rows and columns between windows; the last windows end at the image's border.
            texts: as in `forward`.
        """
        total: Tensor | None = None
        count = images.new_zeros(images.shape[-2:])
        for top in _starts(images.shape[-2], crop[0], stride[0]):
            for left in _starts(images.shape[-1], crop[1], stride[1]):
                rows, columns = slice(top, top + crop[0]), slice(left, left + crop[1])
                logits = self(images[..., rows, columns], **texts).logits
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], *images.shape[-2:])
                total[..., rows, columns] += logits
                count[rows, columns] += 1
        assert total is not None
        return total / count


def _starts(length: int, crop: int, stride: int) -> list[int]:
    last = max(0, length - crop)
    return [*range(0, last, stride), last]


def assemble_segmenter(
    vision: AbSViT,
    decoder: Callable[..., UperNet],
    layers: Sequence[int] | None = None,
    alpha: float = 1.0,
    prior: Literal["trained", "text"] = "trained",
    text: TextEncoder | None = None,
    prior_token: str = "cls",
) -> Segmenter:
    """Build a segmenter from its config.

    Args:
        vision: the encoder.
        decoder: makes the head, called with `in_channels` and `maps`.
        layers: blocks, from 1, whose outputs are the maps; None for the ends of the four quarters of the encoder.
        alpha: α of a trained ξ, which `model/topdown` reads: 1 in the paper (section 6).
        prior: what ξ is: a `trained` vector, or of the `text`.
        text: the text encoder, for `prior=text`.
        prior_token: text state that becomes ξ, for `prior=text`: `cls`, `mean` or `eos`.

    Raises:
        UserError: parts that do not fit each other.
    """
    if prior == "text" and not isinstance(text, TextEncoder):
        raise UserError("model.prior=text needs a text encoder: pass model/text=mini, or another")
    if prior == "trained" and vision.reads_words:
        kind = type(vision.topdown).__name__
        raise UserError(f"{kind} steers by words: choose another model/topdown, or task=refer with model.prior=text")
    if prior == "text" and not vision.needs_prior:
        raise UserError("model.prior=text steers by ξ: choose a model/topdown that reads it")
    depth = vision.backbone.depth
    chosen = list(layers) if layers is not None else sorted({max(1, depth * n // 4) for n in (1, 2, 3, 4)})
    head = decoder(in_channels=vision.width, maps=len(chosen))
    if prior == "trained" or text is None:
        return Segmenter(vision, head, chosen)
    return Segmenter(vision, head, chosen, text, PriorMap(text.width, vision.width, prior_token))
