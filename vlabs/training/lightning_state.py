"""All that vlabs knows of Lightning's private state, as read from the source of Lightning 2.6.6.

A new minor version may move any of it, so `pyproject.toml` pins the one that this was read from, and
`tests/test_resume.py` fails where it no longer holds.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether no gradients wait for those of the next batch."""
    return not trainer.fit_loop._should_accumulate()


def can_go_on(trainer: pl.Trainer) -> bool:
    """Whether a run could go on from a checkpoint of now as it goes on itself: not in half a step, and not where a stop
    was asked for, after which Lightning still validates: a run that goes on would not.
    """
    return between_steps(trainer) and not trainer.should_stop


def epoch_is_over(trainer: pl.Trainer) -> bool:
    """Whether the epoch has ended with its last batch, and not before."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def take_over_max_steps(trainer: pl.Trainer) -> int:
    """Lightning's limit of steps, or -1; it has none from here on.

    With one, Lightning counts an epoch that the limit cuts short as done and does not validate at the end, and begins
    an epoch anew that it goes on with.
    """
    limit = trainer.max_steps
    trainer.fit_loop.epoch_loop.max_steps = -1
    return limit


def limited(batches: int, limit: float | int | None) -> int:
    """Batches of an epoch under Lightning's `limit_train_batches`: a number of them, or a share."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def set_epoch_length(trainer: pl.Trainer, batches: int) -> None:
    """Let the epoch that begins, or goes on, have so many batches, those included that are over; validation within it
    is where the share of them says. The loader is asked for batches from its own place on.
    """
    fit: Any = trainer.fit_loop
    fit._combined_loader.limits = [batches]
    fit.max_batches = batches
    interval = trainer.val_check_interval
    if isinstance(interval, float) and trainer.val_check_batch is not None:
        trainer.val_check_batch = max(1, int(batches * interval))
    iter(fit._data_fetcher)


def is_in_epoch(trainer: pl.Trainer) -> bool:
    """Of a run that goes on, before its first batch: whether an epoch has begun that is not counted as done."""
    epochs: Any = trainer.fit_loop.epoch_progress.total
    return epochs.started > epochs.processed


def batches_done(trainer: pl.Trainer) -> tuple[int, bool]:
    """Of a run that goes on, before its first batch: batches of the begun epoch, and whether these were all."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    return batches.current.processed, batches.is_last_batch


def count_batches_as(trainer: pl.Trainer, batches: int) -> None:
    """Of a run that goes on, before its first batch: let the begun epoch have had another number of batches."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    more = batches - progress.current.processed
    for part in (progress.current, progress.total):
        for name in ("ready", "started", "processed", "completed"):
            setattr(part, name, getattr(part, name) + more)


def validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after the batch that has just ended. It tells nobody, so its own loop is asked."""
    fit = trainer.fit_loop
    return (
        trainer.enable_validation
        and fit._data_fetcher is not None
        and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
    )


def go_on_with_validation(loops: dict[str, Any]) -> None:
    """Write into the state of Lightning's loops that a batch is over and that the validation after it has begun.

    Lightning's own state between the two stands for a batch that is not over: it leaves the validation out when it goes
    on, and where the epoch was over too, loses count of the epochs when that run is stopped in its turn.
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
    """Whether a run that goes on from this state of Lightning's loops begins with a validation."""
    batches = loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    return bool(batches["processed"] < batches["started"])


def validation_waits(trainer: pl.Trainer) -> bool:
    """Of a run that goes on, before its first batch: whether it begins with a validation."""
    batches: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    return bool(trainer.fit_loop.restarting and batches.processed < batches.started)


def place_in_epoch(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """Batches of the epoch that are over for callbacks, and for the loop itself, in a checkpoint that is being made."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    return batches["completed"], batches["processed"]


def count_validation_batch_again(trainer: pl.Trainer) -> None:
    """Of a run that goes on with a validation: the batch with which it is said to have begun is counted once more."""
    batches: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
    batches.ready = batches.started = batches.completed


def gradient_scaler(trainer: pl.Trainer) -> Any:
    """The scaler of 16-bit float precision; None with any other."""
    return getattr(trainer.precision_plugin, "scaler", None)
