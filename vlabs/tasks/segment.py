"""Semantic segmentation, and the segmentation of what a text names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from vlabs.data.captions import CaptionBatch, CaptionDataModule
from vlabs.data.masks import MaskBatch, MaskDataModule, WholePicture, stacked
from vlabs.data.module import Wants
from vlabs.data.prepared import IGNORED
from vlabs.errors import UserError
from vlabs.metrics.segmentation import mean_iou, region_iou
from vlabs.models.segmentation import Segmenter, Segments
from vlabs.tasks.base import Losses, Task
from vlabs.utils.options import NonNegative


@dataclass(eq=False, repr=False)
class SegmentationTask(Task):
    """The base of both tasks: pixel cross-entropy of two heads, and the choice of trained parts.

    Args:
        transfer: what is trained: `end_to_end` everything; `linear` everything but the encoder; `top_down` the head,
            and in the encoder only the feedback decoders and ξ.
        auxiliary_weight: weight of the auxiliary head's loss.
        reconstruction_weight: weight of the reconstruction loss of the feedback decoders.
    """

    model: Segmenter
    _: KW_ONLY
    transfer: Literal["end_to_end", "linear", "top_down"] = "end_to_end"
    auxiliary_weight: NonNegative = 0.4
    reconstruction_weight: NonNegative = 0.0

    def __post_init__(self) -> None:
        model = self.model
        if not isinstance(model, Segmenter):
            raise UserError(f"task={self.name} trains a segmenter: leave model out, or pass model=segmenter")
        if self.transfer != "end_to_end" and self.lora is not None and self.lora.rank:
            raise UserError(
                f"task.transfer={self.transfer} leaves the encoder as it is: pass task.transfer=end_to_end with "
                "task.lora.rank, or task.lora.rank=0"
            )
        reads = ("text",) if model.text is not None else ()
        encoder = "vision.vit"  # by its name, because the group `vision` has no pools of `model.vision.tap`
        frozen = {"end_to_end": (), "linear": (encoder, "feedback", *reads), "top_down": (encoder,)}[self.transfer]
        self.freeze = (*frozen, *self.freeze)
        super().__post_init__()
        if model.decoder.auxiliary is None:
            self.auxiliary_weight = 0.0
        elif not self.auxiliary_weight:
            model.decoder.auxiliary.requires_grad_(False)
        if not model.vision.reconstructs:
            self.reconstruction_weight = 0.0
        idle: list[Any] = [] if model.vision.learns_prior else [model.prompt, model.prior]
        idle += [] if model.vision.topdown is None else [model.vision.topdown.pointer]
        for one in idle:
            if one is not None:
                one.requires_grad_(False)  # nothing trains it, and DDP would wait for its gradient

    def lr_group(self, name: str) -> str:
        """The head's parameters are in the group `head`; ξ and the feedback decoders in `feedback`."""
        if name.startswith("model.decoder."):
            return "head"
        if name == "model.prompt":
            return "feedback"
        return super().lr_group(name)

    def pixel_losses(self, found: Segments, masks: Tensor, count: int) -> Losses:
        """Cross-entropy of both heads over the pixels that count.

        Args:
            found: the model's output.
            masks: (n, H, W), the true classes.
            count: number of images or texts.
        """
        others = {}
        if self.auxiliary_weight and found.auxiliary is not None:
            others["auxiliary"] = _cross_entropy(found.auxiliary, masks)
        if found.seen.reconstruction is not None:
            others["reconstruction"] = found.seen.reconstruction
        return Losses({"segment": _cross_entropy(found.logits, masks)}, count, others)


def _cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    total = F.cross_entropy(logits.float(), masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp_min(1)


@dataclass(eq=False, repr=False)
class SegmentTask(SegmentationTask):
    """Semantic segmentation; logs `val/miou` and `val/pixel_accuracy` over the validation split, in percent."""

    name = "segment"
    monitor = "val/miou"
    reads = MaskDataModule

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.text is not None:
            raise UserError("task=segment has no texts: pass model.prior=trained, or task=refer")
        classes = len(self.preprocessing.names)
        self.confusion = MulticlassConfusionMatrix(classes, ignore_index=IGNORED, validate_args=False)

    def sample_ids(self, batch: MaskBatch | list[WholePicture]) -> list[Any]:
        """The images' ids."""
        return [one.image_id for one in batch] if isinstance(batch, list) else batch.image_ids

    def losses(self, batch: MaskBatch) -> Losses:
        """The losses of both heads."""
        found = self.model(
            batch.images, auxiliary=self.auxiliary_weight > 0, reconstruct=self.reconstruction_weight > 0
        )
        return self.pixel_losses(found, batch.masks, len(batch.image_ids))

    def validation_step(self, batch: list[WholePicture], batch_idx: int) -> None:
        """Add images to the confusion matrix, each at its own size."""
        for images, pictures in stacked(batch):
            logits = self.model(images.to(self.device)).logits
            for one, mask in zip(logits, pictures, strict=True):
                self.confusion.update(at_size(one, mask.mask.shape).argmax(dim=0), mask.mask.to(self.device))

    def on_validation_epoch_end(self) -> None:
        """Log the mean IoU of the epoch."""
        counts = self.confusion.compute()
        self.log("val/miou", mean_iou(counts), prog_bar=True)
        self.log("val/pixel_accuracy", 100 * counts.diag().sum() / counts.sum().clamp_min(1))
        self.confusion.reset()


def at_size(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Resize logits (K, H, W) to (K, rows, columns)."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits[None], tuple(size), mode="bilinear", align_corners=False)[0]


@dataclass(eq=False, repr=False)
class ReferTask(SegmentationTask):
    """Segment what a text names: two classes per pixel. Logs `val/iou`, the mean over texts, in percent.

    It reads captions with regions. With `model.prior=trained` the model does not read the text: this is the control.
    """

    name = "refer"
    monitor = "val/iou"
    reads = CaptionDataModule

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.decoder.num_classes != 2:
            raise UserError(f"model.decoder.num_classes={self.model.decoder.num_classes}: task=refer has two classes")
        self.iou = MeanMetric()

    def wants(self, data: CaptionDataModule) -> Wants:
        """The regions of texts, per pixel.

        Raises:
            UserError: the data have no regions.
        """
        if not data.regions_known:
            raise UserError(f"{data.dir} has no regions of texts: prepare data with regions")
        return Wants((self.preprocessing.image_size,) * 2, regions_in_validation=True)

    def sample_ids(self, batch: CaptionBatch) -> list[Any]:
        """The texts' ids."""
        return batch.caption_ids

    def losses(self, batch: CaptionBatch) -> Losses:
        """The losses of both heads."""
        found = segment_texts(
            self.model, batch, auxiliary=self.auxiliary_weight > 0, reconstruct=self.reconstruction_weight > 0
        )
        return self.pixel_losses(found, region_masks(batch, found.logits.shape[-2:]), len(batch.caption_ids))

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        """Add texts to the mean."""
        if batch.caption_ids:
            logits = segment_texts(self.model, batch).logits
            self.iou.update(100 * region_iou(logits.argmax(dim=1), region_masks(batch, logits.shape[-2:]), IGNORED))

    def on_validation_epoch_end(self) -> None:
        """Log the IoU of the epoch."""
        self.log("val/iou", self.iou.compute(), prog_bar=True)
        self.iou.reset()


def segment_texts(model: Segmenter, batch: CaptionBatch, **options: Any) -> Segments:
    """Segment what the n texts of a batch name; `options` are those of `Segmenter.forward`."""
    if model.text is None:
        # The control reads no texts: an image is segmented the same way for each.
        return model(batch.images[batch.image_index], **options)  # type: ignore[no-any-return]
    return model(batch.images, batch.input_ids, batch.attention_mask, batch.image_index, **options)  # type: ignore[no-any-return]


def region_masks(batch: CaptionBatch, size: Sequence[int]) -> Tensor:
    """Masks (n, H, W): 1 inside the region of a text, 0 elsewhere; all `IGNORED` if it has no region."""
    assert batch.coverage is not None
    masks = (batch.coverage > 0.5).long().unflatten(1, tuple(size))
    unknown = ~(batch.coverage > 0).any(dim=1)
    masks[unknown] = IGNORED
    return masks
