"""Going on where a run was stopped."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from vlabs.data.loading import GroupLoader
from vlabs.training.lightning_state import (
    count_validation_batch_again,
    go_on_with_validation,
    place_in_epoch,
    validation_follows,
)


class GoOn(pl.Callback):
    """Makes a run that goes on the run that it would have been: generators and place in the epoch as they were.

    Goes with `KeepLast`, which saves where that can be done.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] | None = None
        self.loader: dict[str, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """As plain data and tensors, which load without executing anything."""
        version, internal, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        return {
            "python": [version, list(internal), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training really begins, because getting there may draw."""
        self.saved = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the place in the epoch. Lightning keeps it too, but loads it before it has read the checkpoint where the
        schedule asks for the number of steps.
        """
        completed, processed = place_in_epoch(checkpoint)
        if completed < processed and validation_follows(trainer):
            go_on_with_validation(checkpoint["loops"])
        if isinstance(trainer.train_dataloader, GroupLoader):
            checkpoint["train_loader"] = trainer.train_dataloader.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Kept until there is a loader."""
        self.loader = checkpoint.get("train_loader")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go to the place in the epoch."""
        if self.loader is not None and isinstance(trainer.train_dataloader, GroupLoader):
            trainer.train_dataloader.load_state_dict(self.loader)
        self.loader = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A whole epoch begins with its first batch, also where `limit_train_batches` ended the one before early."""
        if isinstance(trainer.train_dataloader, GroupLoader):
            trainer.train_dataloader.first = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore, before the first batch after a stop."""
        self._restore()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore, where a validation is the first thing after a stop."""
        if not trainer.sanity_checking and self.saved is not None:
            self._restore()
            count_validation_batch_again(trainer)

    def _restore(self) -> None:
        if self.saved is None:
            return
        state, self.saved = self.saved, None
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
