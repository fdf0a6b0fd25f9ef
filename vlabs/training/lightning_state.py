"""The only place that uses Lightning's private state, as of Lightning 2.6.6.

A new minor version may change it, so `pyproject.toml` pins this one, and `tests/test_resume.py` fails if it no longer
holds.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether no gradients are accumulated at the moment."""
    return not trainer.fit_loop._should_accumulate()


def can_go_on(trainer: pl.Trainer) -> bool:
    """Whether a run resumed from a checkpoint of this moment would do the same as this run.

    It would not in the middle of an accumulated step, or after a stop was requested: Lightning still validates then,
    but a resumed run would not.
    """
    return between_steps(trainer) and not trainer.should_stop


def epoch_is_over(trainer: pl.Trainer) -> bool:
    """Whether the epoch has ended by its last batch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def take_over_max_steps(trainer: pl.Trainer) -> int:
    """Return Lightning's limit of steps, or -1, and remove the limit.

    With a limit, Lightning counts an epoch that it cuts short as done, does not validate at the end, and restarts that
    epoch after a resume.
    """
    limit = trainer.max_steps
    trainer.fit_loop.epoch_loop.max_steps = -1
    return limit


def limited(batches: int, limit: float | int | None) -> int:
    """Batches per epoch under Lightning's `limit_train_batches`, which is a number of batches or a share."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def set_epoch_length(trainer: pl.Trainer, batches: int) -> None:
    """Set the length of the current epoch in batches, including those that are done.

    Validations within the epoch move to the same shares of it. The loader continues from its own position.
    """
    fit: Any = trainer.fit_loop
    fit._combined_loader.limits = [batches]
    fit.max_batches = batches
    interval = trainer.val_check_interval
    if isinstance(interval, float) and trainer.val_check_batch is not None:
        trainer.val_check_batch = max(1, int(batches * interval))
    iter(fit._data_fetcher)


def is_in_epoch(trainer: pl.Trainer) -> bool:
    """For a resumed run, before its first batch: whether it is in the middle of an epoch."""
    epochs: Any = trainer.fit_loop.epoch_progress.total
    return epochs.started > epochs.processed


def batches_done(trainer: pl.Trainer) -> tuple[int, bool]:
    """For a resumed run, before its first batch: batches done in the current epoch, and whether these were all."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    return batches.current.processed, batches.is_last_batch


def count_batches_as(trainer: pl.Trainer, batches: int) -> None:
    """For a resumed run, before its first batch: change the number of batches done in the current epoch."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    more = batches - progress.current.processed
    for part in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(part, name, getattr(part, name) + more)


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning will validate after the batch that has just ended; only its own loop knows."""
    fit = trainer.fit_loop
    return (
        trainer.enable_validation
        and fit._data_fetcher is not None
        and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
    )


def go_on_with_validation(loops: dict[str, Any]) -> None:
    """Change the saved state of Lightning's loops to: the batch is done, and the validation after it has begun.

    Between the two, Lightning's own state says that the batch is not done. A resumed run would then skip the validation
    and, at the end of an epoch, lose count of epochs when it is stopped again.
    """
    fit = loops["fit_loop"]
    for part in ("total", "current"):
        batches = fit["epoch_loop.batch_progress"][part]
        batches["completed"] = batches["processed"]
        first = fit["epoch_loop.val_loop.batch_progress"][part]
        if part == "current":
            first.update(processed=0, completed=0)
        first["ready"] = first["started"] = first["completed"] + 1


def validation_is_next(loops: dict[str, Any]) -> bool:
    """Whether a run that resumes from this state of Lightning's loops begins with a validation."""
    batches = loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    return bool(batches["processed"] < batches["started"])


def validation_waits(trainer: pl.Trainer) -> bool:
    """For a resumed run, before its first batch: whether it begins with a validation."""
    batches: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    return bool(trainer.fit_loop.restarting and batches.processed < batches.started)


def place_in_epoch(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """In a checkpoint that is being made: batches of the epoch that are done for callbacks, and for the loop itself."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    return batches["completed"], batches["processed"]


def count_validation_batch_again(trainer: pl.Trainer) -> None:
    """For a run that resumes with a validation: uncount the batch that `go_on_with_validation` marked as begun."""
    batches: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    batches.ready = batches.started = batches.completed


def gradient_scaler(trainer: pl.Trainer) -> Any:
    """The scaler of 16-bit float precision; None with any other."""
    return getattr(trainer.precision_plugin, "scaler", None)
