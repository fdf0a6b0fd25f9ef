"""Log and show the speed of training."""

from __future__ import annotations

import sys
import time
from typing import Any, cast

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

from vlabs.tasks.base import Task


class _Bar(TQDMProgressBar):
    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Leave out the logger's version number."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


def progress_bar(refresh_rate: int | None = None) -> TQDMProgressBar:
    """Lightning's progress bar with the remaining time.

    Args:
        refresh_rate: batches between two updates; None for 1 on a terminal and 50 in a file.
    """
    return _Bar(refresh_rate=refresh_rate or (1 if sys.stderr.isatty() else 50))


class SamplesPerSecond(pl.Callback):
    """Logs `train/samples_per_second`: texts per second of this process since the last value, including loading.

    With each validation it logs the cost of training so far, counted across stops of the run: `seen/texts` of all
    processes, and `seen/minutes` without validation.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.since = 0.0
        self.last = 0.0
        self.texts = 0
        self.seconds = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, also for a run that resumes in mid-epoch."""
        self.samples, self.since = 0, time.perf_counter()
        self.last = self.since

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restart the clock, so that validation does not count."""
        self.samples, self.since = 0, time.perf_counter()
        self.last = self.since

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a batch, and log as often as Lightning logs."""
        count = len(cast(Task, pl_module).sample_ids(batch))
        now = time.perf_counter()
        self.texts += count * trainer.world_size
        self.seconds += now - self.last
        self.last = now
        self.samples += count
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (batch_idx + 1) % every == 0:
            pl_module.log("train/samples_per_second", self.samples / (now - self.since))
            self.samples, self.since = 0, now

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the cost so far next to the validation's metrics."""
        if not trainer.sanity_checking:
            pl_module.log("seen/texts", float(self.texts), rank_zero_only=True)
            pl_module.log("seen/minutes", self.seconds / 60, rank_zero_only=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Exclude a validation in mid-epoch from the clocks."""
        now = time.perf_counter()
        self.since += now - self.last
        self.last = now

    def state_dict(self) -> dict[str, Any]:
        """The cost so far."""
        return {"texts": self.texts, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.texts, self.seconds = state_dict["texts"], state_dict["seconds"]
