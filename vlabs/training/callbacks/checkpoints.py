"""Checkpoints of a run: written whole, and the last one whenever a run could go on from it."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException

from vlabs.errors import UserError
from vlabs.runs.logging import say
from vlabs.training.lightning_state import can_go_on, validation_follows


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, so that a stop leaves the one before.

    Of `last.ckpt`, which a run goes on from, the one before is kept too, as `last.ckpt.previous`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            UserError: the disk is full or the folder cannot be written to; what was there before is untouched.
        """
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if path.name == "last.ckpt" and path.is_file():
                # A second name of the old file first: at no time is there no checkpoint.
                older = path.with_name(path.name + ".older")
                older.unlink(missing_ok=True)
                older.hardlink_to(path)
                older.replace(previous_of(path))
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if not isinstance(error, OSError) and not full:
                raise
            reason = "the disk is full" if full else str(error)
            raise UserError(
                f"checkpoint {path} could not be written: {reason}; the one before it is untouched, "
                "make room and go on with resume=RUN_DIR"
            ) from None


def previous_of(path: Path) -> Path:
    """Where the checkpoint before this one is."""
    return path.with_name(path.name + ".previous")


class KeepLast(pl.callbacks.Checkpoint):
    """Keeps `last.ckpt`, all that a run needs to go on.

    It is saved before and after every validation, at the end of every epoch, at intervals, and when SIGTERM (then the
    run stops) or SIGUSR1 (then it goes on) comes, as SLURM sends them before it takes a job's machine. It is saved
    between two optimiser steps only: the gradients of a step that is half accumulated are not in it.

    Args:
        path: of the checkpoint.
        every_minutes: save so often, at least.
        every_n_steps: save after so many optimiser steps.
    """

    def __init__(self, path: Path, every_minutes: float | None = None, every_n_steps: int | None = None) -> None:
        self.path = path
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.saved_at = time.monotonic()
        self.save_asked = False
        self.stop_asked = False
        self.stops = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen for SIGUSR1 before Lightning does: it would look for its own kind of checkpoint after a requeue."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._ask_save)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for SIGTERM in the place of Lightning, which would stop in mid-validation and in half a step."""
        self.saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask_stop)

    def _ask_save(self, *_: Any) -> None:
        self.save_asked = True

    def _ask_stop(self, *_: Any) -> None:
        self.save_asked = self.stop_asked = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, on all ranks if one of them was asked to or has its clock ahead."""
        if not can_go_on(trainer):
            return
        late = self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes
        due = trainer.strategy.reduce_boolean_decision(self.save_asked or late, all=False)
        due |= self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        # An epoch that ends without validation is saved once it has ended.
        if validation_follows(trainer) or (due and not trainer.is_last_batch):
            self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if asked to: all is saved. Several ranks end the validation first, as they may have unequal batches."""
        if self.stop_asked and trainer.world_size == 1 and can_go_on(trainer):
            raise SIGTERMException

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation in mid-epoch, so that it is not done again."""
        if can_go_on(trainer) and not (trainer.sanity_checking or trainer.is_last_batch):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save. Where steps are counted and not epochs, Lightning would end the epoch a second time if it went on from
        here; the checkpoint from before its validation does as well.
        """
        if trainer.max_steps == -1 or trainer.global_step >= trainer.max_steps:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if asked to, now that the batch before has been logged."""
        self._stop_if_saved()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_train_batch_start`."""
        self._stop_if_saved()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_train_batch_start`."""
        self._stop_if_saved()

    def _stop_if_saved(self) -> None:
        if self.stops:
            raise SIGTERMException

    def _save(self, trainer: pl.Trainer) -> None:
        """Save; nothing more is to be done if one of the ranks was asked to stop."""
        trainer.save_checkpoint(self.path)
        self.saved_at = time.monotonic()
        if trainer.strategy.reduce_boolean_decision(self.save_asked, all=False):
            self.save_asked = False
            say(f"saved {self.path} because of a signal; go on with resume={self.path.parent.parent}")
        self.stops = trainer.strategy.reduce_boolean_decision(self.stop_asked, all=False)
