"""A moving average of the weights."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EMAWeightAveraging


class WeightAverage(EMAWeightAveraging):
    """Lightning's exponential moving average, that a validation and all that follows from it is of.

    Lightning gives the trained weights back before a task's own measurements at the end of a validation and before
    best.ckpt is written, which would then hold other weights than those that were measured. This one gives them back
    when training goes on.

    Args:
        decay: of the average.
        options: of Lightning's `EMAWeightAveraging`.
    """

    def __init__(self, decay: float = 0.999, **options: Any) -> None:
        super().__init__(decay=decay, **options)
        self.validating = False

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        if not self.validating:
            super().on_validation_epoch_start(trainer, pl_module)
        self.validating = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Not yet."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Train on."""
        self._give_back(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Train on, before the epoch is saved."""
        self._give_back(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The trained model is the average."""
        self._give_back(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _give_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validating:
            super().on_validation_epoch_end(trainer, pl_module)
        self.validating = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep both the average, as the weights of the checkpoint, and what is trained."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self.validating:  # then each is in the place of the other
            state = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = state
