"""Naming: every patch of an image names the words of the phrases that are about it. It trains the ViT alone.

A small encoder from scratch learns words of colors and shapes from questions only slowly, because it is told them
through a text encoder, a fusion and an answer. This tells it directly, and is the cheapest stage there is: one pass
over each image, without text encoder and fusion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vlabs.data.captions import CaptionBatch, CaptionDataModule
from vlabs.data.module import Wants
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.naming import WordHead
from vlabs.models.vlm import VisionLanguageModel
from vlabs.tasks.base import Losses
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vision_language import VisionLanguageTask


class NamingTask(VisionLanguageTask):
    """Pre-training of the ViT, bottom-up, on captions that say what they are about; logs `val/word_precision`.

    All other parts of the model keep the weights that they had. What starts from the checkpoint takes what is trained
    in it, so that it is a start for every task and every variant of feedback.

    Args:
        model, preprocessing, data, recipe, recompute_activations, compile: as in `VisionLanguageTask`.
        freeze: further parameters that are not trained.
    """

    name = "naming"
    monitor = "val/word_precision"
    reads = CaptionDataModule

    def __init__(
        self,
        model: VisionLanguageModel,
        preprocessing: Preprocessing,
        data: dict[str, Any],
        recipe: Recipe,
        freeze: Sequence[str] = (),
        recompute_activations: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(
            model,
            preprocessing,
            data,
            recipe,
            reconstruction_weight=0.0,
            prior_weight=0.0,
            freeze=freeze,
            recompute_activations=recompute_activations,
            compile=compile,
        )
        for name, parameter in model.named_parameters():
            if not name.startswith("vision.vit."):
                parameter.requires_grad_(False)
        if not model.vision.has_bottom_up:
            raise UserError(
                "task=naming trains the bottom-up pass, which model/topdown=film does not have: train it with "
                "model/topdown=none, its checkpoint is a start for every variant"
            )
        self.head = WordHead(model.vision.width, preprocessing.vocab_size)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say that what stands beside the ViT is not trained, unless it was before: others start from the ViT alone."""
        super().on_save_checkpoint(checkpoint)
        if not self.data.get("history"):
            checkpoint["vlabs"]["trained"] = ["vision.vit"]

    def wants(self, data: CaptionDataModule) -> Wants:
        """What every text is about, on the patches.

        Raises:
            UserError: the data do not know it.
        """
        if not data.regions_known:
            raise UserError(
                "task=naming learns from what texts are about, and these data do not say it: prepare them with regions "
                "(`vlabs prepare scenes_captions --phrases`, `refcoco`, `flickr30k --phrases`, ...)"
            )
        return Wants(self.model.vision.grid_size, regions_in_validation=True)

    def sample_ids(self, batch: CaptionBatch) -> list[Any]:
        """The captions' ids."""
        return batch.caption_ids

    def losses(self, batch: CaptionBatch) -> Losses:
        """The loss of the words on the patches."""
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
        """Patch tokens, and the texts with where in which image they belong."""
        assert batch.coverage is not None
        vision = self.model.vision
        patches = vision.encode(batch.images).tokens[:, vision.num_prefix_tokens :]
        return patches, batch.input_ids, batch.image_index, batch.coverage
