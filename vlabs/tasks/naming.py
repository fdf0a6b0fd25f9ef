"""Naming: each patch of an image predicts the words of the phrases about it. Only the ViT is trained.

A small encoder from scratch learns the words of colors and shapes slowly from questions, because its gradients come
through an answer, the fusion and the text encoder. This task teaches them directly and cheaply: one pass per image,
without text encoder and fusion.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vlabs.data.captions import CaptionBatch, CaptionDataModule
from vlabs.data.module import Wants
from vlabs.errors import UserError
from vlabs.models.naming import WordHead
from vlabs.models.vlm import VisionLanguageModel
from vlabs.tasks.base import Losses, Task


@dataclass(eq=False, repr=False)
class NamingTask(Task):
    """Bottom-up pre-training of the ViT on captions with regions; logs `val/word_precision`.

    All other parts of the model keep their weights. A run that starts from the checkpoint takes only trained parts, so
    the checkpoint is a start for every task and every top-down variant.
    """

    name = "naming"
    monitor = "val/word_precision"
    reads = CaptionDataModule

    model: VisionLanguageModel

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, parameter in self.model.named_parameters():
            if not name.startswith("vision.vit."):
                parameter.requires_grad_(False)
        self.head = WordHead(self.model.vision.width, self.preprocessing.vocab_size)

    def encoders(self) -> dict[str, nn.Module]:
        """See `Task`; the text encoder is not trained."""
        return {"vision": self.model.vision.vit}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record that only the ViT is trained, unless earlier runs trained other parts: `init=` then takes only it."""
        super().on_save_checkpoint(checkpoint)
        if not self.data.get("history"):
            checkpoint["vlabs"]["trained"] = ["vision.vit"]

    def wants(self, data: CaptionDataModule) -> Wants:
        """The regions of texts, on the grid of patches.

        Raises:
            UserError: the data have no regions.
        """
        if not data.regions_known:
            raise UserError(
                "task=naming learns from the regions of texts, but these data have none: prepare data with regions "
                "(`vlabs prepare scenes_captions --phrases`, `refcoco`, `flickr30k --phrases`, ...)"
            )
        return Wants(self.model.vision.grid_size, regions_in_validation=True)

    def sample_ids(self, batch: CaptionBatch) -> list[Any]:
        """The captions' ids."""
        return batch.caption_ids

    def losses(self, batch: CaptionBatch) -> Losses:
        """The loss of the words predicted by patches."""
        return Losses({"naming": self.head.loss(*self._named(batch))}, len(batch.images))

    def validation_step(self, batch: CaptionBatch, batch_idx: int) -> None:
        """Log loss and precision."""
        if not batch.caption_ids:
            return
        named = self._named(batch)
        self.log("val/naming_loss", self.head.loss(*named), batch_size=len(batch.images), sync_dist=True)
        precision = self.head.precision(*named)
        percent = 100 * precision.sum() / max(1, len(precision))
        self.log("val/word_precision", percent, prog_bar=True, batch_size=len(precision), sync_dist=True)

    def _named(self, batch: CaptionBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Patch tokens; token ids, images and regions of the texts."""
        assert batch.coverage is not None
        vision = self.model.vision
        patches = vision.encode(batch.images).tokens[:, vision.num_prefix_tokens :]
        return patches, batch.input_ids, batch.image_index, batch.coverage
