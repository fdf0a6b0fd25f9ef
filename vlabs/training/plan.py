"""Estimate the cost of a training from a few measured steps: `vlabs train plan=true ...`."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, open_dict

from vlabs.runs.trainer import make_trainer
from vlabs.tasks.base import Task
from vlabs.training.words import checkpoint_bytes, duration
from vlabs.utils.files import size
from vlabs.utils.ranks import say

# Numbers of batches: warm-up, measured, and validation.
_WARM_UP, _MEASURED, _VALIDATION = 3, 8, 3


class _Clock(pl.Callback):
    """Seconds of every training batch, loading included, and of every validation batch."""

    def __init__(self) -> None:
        self.training: list[float] = []
        self.validation: list[float] = []
        self.since = 0.0

    def _lap(self, laps: list[float]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        laps.append(now - self.since)
        self.since = now

    def on_train_start(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self._lap(self.training)

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def on_validation_batch_end(self, *_: Any) -> None:
        self._lap(self.validation)


def plan_run(config: DictConfig, task: Task, data: pl.LightningDataModule) -> dict[str, Any]:
    """Train for a few steps without writing anything, and print and return the cost of the whole run.

    Args:
        config: the config of `vlabs train`.
        task, data: the task and data of the run; the task's weights change.
    """
    short = config.trainer.copy()
    with open_dict(short):
        short.max_epochs, short.max_steps, short.check_val_every_n_epoch, short.val_check_interval = 1, -1, 1, None
        accumulate = int(config.trainer.accumulate_grad_batches)
        short.limit_train_batches = _WARM_UP + max(_MEASURED, accumulate)
        short.limit_val_batches, short.num_sanity_val_steps = _VALIDATION, 0
        short.enable_progress_bar, short.log_every_n_steps, short.overfit_batches = False, 1, 0.0
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            short, callbacks=[clock], logger=False, enable_checkpointing=False, default_root_dir=folder
        )
        task.shorten_validation()
        trainer.fit(task, datamodule=data)
    numbers = _numbers(config, task, data, trainer, clock)
    if trainer.is_global_zero:
        _print(numbers)
    return numbers


def _numbers(config: DictConfig, task: Task, data: Any, trainer: pl.Trainer, clock: _Clock) -> dict[str, Any]:
    options = config.trainer
    accumulate, devices = int(options.accumulate_grad_batches), trainer.world_size
    loader = data.train_dataloader()
    few = options.get("overfit_batches") or None
    batches = _limited(len(loader), few or options.limit_train_batches)
    steps_an_epoch = math.ceil(batches / accumulate)
    epochs = int(options.max_epochs) if options.max_epochs is not None and options.max_epochs >= 0 else 1000
    steps = steps_an_epoch * epochs
    if options.max_steps is not None and 0 <= options.max_steps < steps:
        steps = int(options.max_steps)
    second = statistics.median(clock.training[_WARM_UP:] or clock.training)
    checked = _limited(len(data.val_dataloader()), few or options.limit_val_batches)
    validation = checked * statistics.median(clock.validation) if clock.validation else 0.0
    validations = steps / steps_an_epoch / (options.check_val_every_n_epoch or 1)
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in task.parameters())
    cuda = trainer.strategy.root_device.type == "cuda"
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {
        "batch_per_device": data.batch_size,
        "devices": devices,
        "accumulate_grad_batches": accumulate,
        "global_batch": data.batch_size * devices * accumulate,
        "steps_per_epoch": steps_an_epoch,
        "epochs": round(steps / steps_an_epoch, 2),
        "steps": steps,
        "trained_parameters": trained,
        # Four bytes per weight; for trained weights also four for the gradient and for each of AdamW's two moments.
        "gib_weights_and_optimizer": round((4 * everything + 12 * trained) / 2**30, 2),
        "gib_peak_per_device": round(peak / 2**30, 2),
        "seconds_per_step": round(second * accumulate, 4),
        "texts_per_second": round(data.batch_size * devices / second, 1),
        "seconds_per_validation": round(validation, 1),
        "gb_checkpoints": round(checkpoint_bytes(task) / 1e9, 3),
        "hours": round((steps * accumulate * second + validations * validation) / 3600, 4),
    }


def _limited(batches: int, limit: float | int | None) -> int:
    """Batches per epoch under one of Lightning's limits, which is a number of batches or a share."""
    if limit is None:
        return batches
    return min(batches, int(limit)) if isinstance(limit, int) else int(batches * limit)


def _print(numbers: dict[str, Any]) -> None:
    n = numbers
    batch = f"{n['batch_per_device']} x {n['devices']} devices x {n['accumulate_grad_batches']} accumulated"
    say("plan (nothing is kept):")
    say(f"  global batch  {n['global_batch']:,} = {batch}")
    say(f"  steps         {n['steps']:,} = {n['steps_per_epoch']:,} per epoch x {n['epochs']:g} epochs")
    say(
        f"  memory        {n['gib_peak_per_device']:.2f} GiB at the peak per device, of which "
        f"{n['gib_weights_and_optimizer']:.2f} GiB weights, gradients and AdamW"
    )
    say(
        f"  speed         {n['seconds_per_step']:.3f} s per step, {n['texts_per_second']:,.1f} texts/s, loading "
        f"included; {n['seconds_per_validation']:.0f} s per validation"
    )
    say(f"  disk          {size(1e9 * n['gb_checkpoints'])} of checkpoints")
    say(f"  time          {duration(3600 * n['hours'])}")
