"""Stopping before the last epoch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import pytorch_lightning as pl

from vlabs.errors import UserError
from vlabs.tasks.base import Task
from vlabs.utils.options import Count, NonNegative


class EarlyStopping(pl.callbacks.EarlyStopping):
    """Lightning's early stopping, by default on the metric that chooses the task's best checkpoint.

    Args:
        monitor: metric of a validation; None for the task's own.
        patience: validations without a better value before training stops.
        mode: whether `max` or `min` is better.
        min_delta: smallest change that counts as better.
        options: of Lightning's `EarlyStopping`.
    """

    def __init__(
        self,
        monitor: str | None = None,
        patience: Count = 3,
        mode: Literal["min", "max"] = "max",
        min_delta: NonNegative = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(monitor=monitor or "", patience=patience, mode=mode, min_delta=min_delta, **options)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Ask the task for its metric."""
        assert isinstance(pl_module, Task)
        self.monitor = self.monitor or pl_module.monitor
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the metric."""
        with self._explained():
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the metric, where every epoch ends with a validation."""
        with self._explained():
            super().on_train_epoch_end(trainer, pl_module)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn Lightning's error for an unknown metric into a UserError."""
        try:
            yield
        except RuntimeError as error:
            raise UserError(f"callbacks.early_stopping.monitor={self.monitor}: {error}") from None
