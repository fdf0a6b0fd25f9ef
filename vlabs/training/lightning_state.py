"""All that vlabs knows of Lightning's private state, as read from the source of Lightning 2.6.6.

A new minor version may move any of it, so `pyproject.toml` pins the one that this was read from, and
`tests/test_resume.py` fails where it no longer holds.
"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


def can_go_on(trainer: pl.Trainer) -> bool:
    """Whether a run could go on from a checkpoint of now: no gradients wait for those of the next batch, and steps are
    left; of a run that has made its last step, Lightning would not do the validation after it.
    """
    return not trainer.fit_loop._should_accumulate() and trainer.global_step != trainer.max_steps


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
