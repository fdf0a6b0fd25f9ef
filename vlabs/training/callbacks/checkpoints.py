"""Checkpoints of a run: written completely or not at all, and only at points where a run can resume."""

from __future__ import annotations

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

from vlabs.errors import write_to_no_terminal
from vlabs.runs.record import resumable
from vlabs.training.lightning_state import between_steps, can_go_on, epoch_is_over, validation_follows
from vlabs.utils.files import replacing, typed
from vlabs.utils.ranks import is_rank_zero, say


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, so that a stop leaves the previous one.

    The previous `last.ckpt`, from which a run resumes, is kept as `last.ckpt.previous`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            UserError: the disk is full or the folder cannot be written to; what was there before is untouched.
        """
        path = Path(path)
        with resumable(path.parent.parent), replacing(path) as partial:
            with open(partial, "wb") as file:
                try:
                    torch.save(checkpoint, file)
                except RuntimeError as error:  # closing the incomplete archive raises an error that hides the cause
                    raise error.__context__ or error from None
                # On the disk before it gets its name: after a power failure the name must not be that of an empty file.
                file.flush()
                os.fsync(file.fileno())
            if path.name == "last.ckpt" and path.is_file():
                # First give the old file a second name, so that there is a checkpoint at every moment.
                older = path.with_name(path.name + ".older")
                older.unlink(missing_ok=True)
                try:
                    older.hardlink_to(path)
                    older.replace(previous_of(path))
                except OSError:  # a file system without hard links: for a moment there is only the previous one
                    path.replace(previous_of(path))


def previous_of(path: Path) -> Path:
    """Path of the checkpoint before this one."""
    return path.with_name(path.name + ".previous")


class Stopped(SIGTERMException):
    """Raised by a run that was asked to stop, by SIGTERM or Ctrl-C, and has saved what it needs to resume.

    Attributes:
        signal: the signal.
    """

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class KeepLast(pl.callbacks.Checkpoint):
    """Keeps `last.ckpt`, which has everything that a run needs to resume.

    It is saved before and after each validation, at the end of each epoch, at intervals, at the end of the training,
    and on signals. After SIGTERM, Ctrl-C or the end of the terminal the run stops; after SIGUSR1, which SLURM sends
    before it takes a job's machine, it continues. A second Ctrl-C stops at once. It is saved only between two optimizer
    steps, because it does not hold the gradients of a partly accumulated step.

    Args:
        path: path of the checkpoint.
        every_minutes: largest number of minutes between two saves.
        every_n_steps: number of optimizer steps between two saves.
    """

    def __init__(self, path: Path, every_minutes: float | None = None, every_n_steps: int | None = None) -> None:
        self.path = path
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.saved_at = time.monotonic()
        self.save_asked = False
        self.stop_asked: int | None = None
        self.stops = self.saving = False
        self.handlers: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Install signal handlers before Lightning does.

        After SIGUSR1 Lightning would look for its own kind of checkpoint, and it treats Ctrl-C as an error.
        """
        self._listen(signal.SIGUSR1, self._ask_save)
        for number in _STOPS:
            # Until the first step there is nothing new to save.
            self._listen(number, self._stop_now)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers of SIGTERM and Ctrl-C, which would stop in the middle of a step."""
        self.saved_at = time.monotonic()
        for number in _STOPS:
            self._listen(number, self._ask_stop)

    def _listen(self, number: int, handler: Any) -> None:
        is_ignored = number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN  # run by nohup
        if threading.current_thread() is threading.main_thread() and not is_ignored:
            # The first handler found is the one to restore: this is called twice for the same signal.
            self.handlers.setdefault(number, signal.getsignal(number))
            signal.signal(number, handler)

    def listen_no_more(self) -> None:
        """Restore the signal handlers. To be called after the training: Lightning restores those that it found."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _ask_save(self, *_: Any) -> None:
        self.save_asked = True

    def _stop_now(self, number: int, *_: Any) -> None:
        if number == signal.SIGHUP:
            write_to_no_terminal()
        raise Stopped(number)

    def _ask_stop(self, number: int, *_: Any) -> None:
        if number == signal.SIGINT:
            if self.stop_asked == number and not self.saving:
                raise Stopped(number)
            if is_rank_zero():
                # Not `print`: the signal may have interrupted a `print`, which is not reentrant.
                os.write(2, b"\nCtrl-C: the run stops when this step is saved; a second one stops it at once\n")
        if number == signal.SIGHUP:
            write_to_no_terminal()
        self.save_asked, self.stop_asked = True, number

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is due; on all ranks, if any of them got a signal or its interval is over."""
        if not between_steps(trainer):
            return
        late = self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes
        due = trainer.strategy.reduce_boolean_decision(self.save_asked or late, all=False)
        due |= self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        if trainer.should_stop:  # the end is saved after its validation
            due, follows = not validation_follows(trainer), False
        else:
            follows = validation_follows(trainer)
        # An epoch that ends without validation is saved once it has ended.
        if follows or (due and not trainer.is_last_batch):
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
        """Stop if asked to; all is saved. Several ranks finish the validation first: their batches may differ."""
        if self.stop_asked is not None and trainer.world_size == 1 and can_go_on(trainer):
            raise Stopped(self.stop_asked)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation in mid-epoch, so that a resumed run does not repeat it."""
        if between_steps(trainer) and not (trainer.sanity_checking or trainer.is_last_batch):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save, unless the training ends in mid-epoch: then it is already saved, and can resume there."""
        if epoch_is_over(trainer):
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if asked to; the batch before has been logged now."""
        self._stop_if_saved()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_train_batch_start`."""
        self._stop_if_saved()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_train_batch_start`."""
        self._stop_if_saved()

    def _stop_if_saved(self) -> None:
        if self.stops:
            raise Stopped(self.stop_asked or signal.SIGTERM)

    def _save(self, trainer: pl.Trainer) -> None:
        """Save, and stop after this if one of the ranks was asked to."""
        self.saving = True
        try:
            trainer.save_checkpoint(self.path)
        finally:
            self.saving = False
        self.saved_at = time.monotonic()
        self.stops = trainer.strategy.reduce_boolean_decision(self.stop_asked is not None, all=False)
        if trainer.strategy.reduce_boolean_decision(self.save_asked, all=False):
            self.save_asked = False
            # A run that stops says how to resume it in its last line; one that goes on may be killed without a word.
            way_on = "" if self.stops else f"; continue with {typed('resume', self.path.parent.parent)}"
            say(f"saved {self.path} because of a signal{way_on}")
