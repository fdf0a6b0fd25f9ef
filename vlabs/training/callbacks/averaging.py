"""A moving average of the weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor

from vlabs.utils.options import Share, Size, checked


@checked("callbacks.ema")
class WeightAverage(WeightAveraging):
    """An exponential moving average of the weights, used by validation, best.ckpt and the final model.

    The decay grows to its final value, `min(decay, (1 + n) / (10 + n))` at step n, as in TensorFlow and timm: a fixed
    decay would keep the initial weights for about 1 / (1 - decay) steps.

    Lightning restores the trained weights at the end of a validation, before a task's own measurements and before
    best.ckpt is written, which would then not hold the measured weights. This class restores them when training
    continues.

    Args:
        decay: decay of the moving average.
        update_every_n_steps: steps between updates.
        device: device of the average; None for the model's.
    """

    def __init__(self, decay: Share = 0.999, update_every_n_steps: Size = 1, device: str | None = None) -> None:
        super().__init__(device=device, multi_avg_fn=partial(_update, decay))
        self.update_every_n_steps = update_every_n_steps
        self.validating = False

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Whether to update the average after this step."""
        return step_idx is not None and step_idx % self.update_every_n_steps == 0

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Swap in the average."""
        if not self.validating:
            super().on_validation_epoch_start(trainer, pl_module)
        self.validating = True

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Do not restore the trained weights yet."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the trained weights."""
        self._give_back(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the trained weights before the epoch is saved."""
        self._give_back(trainer, pl_module)
        super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make the average the final model."""
        self._give_back(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _give_back(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.validating:
            super().on_validation_epoch_end(trainer, pl_module)
        self.validating = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the weights of the checkpoint, and the trained weights beside it."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        # During validation the two are swapped, so Lightning has saved each under the other's name.
        if self.validating:
            state = checkpoint["state_dict"], checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = state


@torch.no_grad()
def _update(decay: float, averages: list[Tensor], current: list[Tensor], count: Tensor) -> None:
    """Move averages of one dtype toward the current values; `count` updates were made before."""
    n = int(count)
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))
    else:
        torch._foreach_copy_(averages, current)
