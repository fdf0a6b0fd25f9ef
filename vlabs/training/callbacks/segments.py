"""Figures of segmentations, after validations."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import WandbLogger

from vlabs.attention.figures import as_view, save_figure
from vlabs.attention.segments import Segmented, segment_figure
from vlabs.runs.logging import send
from vlabs.tasks.segment import SegmentTask, at_size
from vlabs.training.callbacks.schedule import EveryNValidations
from vlabs.utils.options import Count


class SegmentPictures(EveryNValidations):
    """Every N validations of task=segment, show some images with predicted and true classes, as a file and in W&B.

    Args:
        every_n_validations: number of validations between two figures; 0 for never.
        num_images: number of images of the validation split.
    """

    def __init__(self, every_n_validations: Count = 1, num_images: Count = 4) -> None:
        super().__init__(every_n_validations)
        self.num_images = num_images

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figure."""
        if not isinstance(pl_module, SegmentTask) or not self.is_due(trainer) or not trainer.is_global_zero:
            return
        dataset = trainer.datamodule.val_dataloader().dataset  # type: ignore[attr-defined]
        shown = []
        for index in range(min(self.num_images, len(dataset.rows))):
            picture = dataset.whole(index)
            if picture is not None:
                logits = pl_module.model(picture.image.to(pl_module.device)).logits[0]
                found = at_size(logits, picture.mask.shape).argmax(dim=0).cpu().numpy()
                shown.append(Segmented(as_view(picture.shown), found, picture.mask.numpy(), picture.name))
        figure = segment_figure(shown, pl_module.preprocessing.names)
        name = f"segments_step{trainer.global_step:06d}.png"
        path = save_figure(figure, Path(trainer.default_root_dir) / "figures" / name)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                log = partial(logger.log_image, "val/segments", [str(path)], step=trainer.global_step)
                send("the figure of segments", log)
