"""Resuming a run exactly where it was stopped."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from vlabs.data.loading import GroupLoader
from vlabs.errors import UserError
from vlabs.tasks.optim import Course
from vlabs.training.lightning_state import (
    batches_done,
    count_batches_as,
    count_validation_batch_again,
    go_on_with_validation,
    is_in_epoch,
    limited,
    place_in_epoch,
    set_epoch_length,
    take_over_max_steps,
    validation_follows,
    validation_waits,
)
from vlabs.utils.options import as_given
from vlabs.utils.ranks import say

# Settings of a group of parameters, and their options `task.recipe.NAME`.
_SETTINGS = {"initial_lr": "lr", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}
# Keys of `EpochSampler.how` that are not options `data.NAME`.
_NO_OPTIONS = ("texts", "pictures", "processes")


class GoOn(pl.Callback):
    """Restores a resumed run to the state in which it stopped: generators, position in the epoch and in the schedule.

    With another batch size, accumulation, number of processes or epoch length, the remaining texts of the epoch come
    once each, and learning rates continue at the share of the training that is done. With another number of epochs or
    steps the share is that of the longer, or shorter, training: learning rates are what they would have been if it had
    had this length from the beginning.

    It also ends a training after `trainer.max_steps`, with a validation. It needs `KeepLast`, which saves where a run
    can resume.

    Args:
        options: the options that changed, with old and new values; they are printed.
    """

    def __init__(self, options: Mapping[str, tuple[Any, Any]] | None = None) -> None:
        self.options = dict(options or {})
        self.generators: dict[str, Any] | None = None
        self.loader: dict[str, Any] | None = None
        self.plan: dict[str, Any] | None = None
        self.max_steps = -1
        self.settings: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The states of all generators as plain data and tensors, which load without executing code."""
        version, internal, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        return {
            "python": [version, list(internal), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first batch: what happens before may draw random numbers."""
        self.generators = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the position in the epoch.

        Lightning saves it too, but its loader would be asked for the number of steps before it has read its state.
        """
        completed, processed = place_in_epoch(checkpoint)
        if completed < processed and validation_follows(trainer):
            go_on_with_validation(checkpoint["loops"])
        if isinstance(trainer.train_dataloader, GroupLoader):
            checkpoint["train_loader"] = trainer.train_dataloader.state_dict()
        loader, batches = trainer.train_dataloader, trainer.num_training_batches
        whole = (
            limited(loader.whole_length, trainer.limit_train_batches) if isinstance(loader, GroupLoader) else batches
        )
        checkpoint["plan"] = self._plan(trainer) | {"epoch_batches": batches, "whole_epoch": whole}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the position until there is a loader."""
        self.loader, self.plan = checkpoint.get("train_loader"), checkpoint.get("plan")

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the settings of the config before the checkpoint's optimizer state overwrites them."""
        self.max_steps = take_over_max_steps(trainer)
        self.settings = [{name: group.get(name) for name in _SETTINGS} for group in _groups(trainer)]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go to the position in the epoch and in the schedule.

        Raises:
            UserError: the data are not those that the run began with.
        """
        loader = trainer.train_dataloader if isinstance(trainer.train_dataloader, GroupLoader) else None
        if self.loader is not None and loader is not None:
            loader.load_state_dict(self.loader)
        if self.plan is not None:
            changed = self._changes(trainer)
            for name in ("texts", "pictures"):
                if name in changed:
                    raise UserError(f"resume: {changed[name]}: a run can only resume with the data that it began with")
            if changed:
                self._go_on_otherwise(trainer, loader)
            elif is_in_epoch(trainer) and self.plan["epoch_batches"] != trainer.num_training_batches:
                # The options are the same, but this epoch was already continued once under other options.
                if loader is not None:
                    loader.begun = batches_done(trainer)[0] - loader.groups.first
                set_epoch_length(trainer, self.plan["epoch_batches"])
            others = {n: f"{n}={as_given(new)}, was {as_given(old)}" for n, (old, new) in self.options.items()}
            changed = others | changed | self._apply_settings(trainer)
            if changed:
                done = [f"{100 * course.at(one.last_epoch) / course.total:.1f}%" for one, course in _courses(trainer)]
                said = f" after {done[0]} of the training" if done else ""
                say(f"resuming{said} with {', '.join(changed.values())}")
        self.loader = self.plan = None
        if not validation_waits(trainer):
            self._stop_after_max_steps(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a whole epoch with its first batch, also if `limit_train_batches` ended the previous one early."""
        loader = trainer.train_dataloader
        if isinstance(loader, GroupLoader):
            went_on = loader.begun or loader.groups.before
            loader.begin()
            if went_on:
                set_epoch_length(trainer, limited(len(loader), trainer.limit_train_batches))

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore the generators before the first batch after a stop."""
        self._restore()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the training after its last step."""
        self._stop_after_max_steps(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the generators if a validation is the first thing after a stop."""
        if not trainer.sanity_checking and self.generators is not None:
            self._restore()
            count_validation_batch_again(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_train_batch_end`, for a run that resumed with this validation."""
        if not trainer.sanity_checking:
            self._stop_after_max_steps(trainer)

    def _stop_after_max_steps(self, trainer: pl.Trainer) -> None:
        if self.max_steps != -1 and trainer.global_step >= self.max_steps:
            trainer.should_stop = True

    def _plan(self, trainer: pl.Trainer) -> dict[str, Any]:
        """Everything that decides the length of a training and what a step is, as plain data."""
        limits: dict[str, Any] = {"max_epochs": trainer.max_epochs, "max_steps": self.max_steps}
        limits |= {name: getattr(trainer, name) for name in ("accumulate_grad_batches", "limit_train_batches")}
        found = {f"trainer.{name}": value for name, value in limits.items()}
        recipe = getattr(trainer.lightning_module, "recipe", None)
        if recipe is not None:
            found |= {f"task.recipe.{name}": getattr(recipe, name) for name in ("schedule", "warmup")}
        if isinstance(trainer.train_dataloader, GroupLoader):
            how = trainer.train_dataloader.groups.how
            found |= {name if name in _NO_OPTIONS else f"data.{name}": number for name, number in how.items()}
        return found

    def _changes(self, trainer: pl.Trainer) -> dict[str, str]:
        """What has changed since the checkpoint was written: a phrase by name."""
        before = self.plan or {}
        return {
            name: f"{name}={value}, was {before[name]}"
            for name, value in self._plan(trainer).items()
            if name in before and before[name] != value
        }

    def _go_on_otherwise(self, trainer: pl.Trainer, loader: GroupLoader | None) -> None:
        """Divide the rest of the current epoch anew, and stretch the rest of the schedule over the steps left."""
        assert self.plan is not None
        whole = int(trainer.num_training_batches)
        steps_an_epoch = math.ceil(whole / trainer.accumulate_grad_batches)
        steps, epochs = 0.0, trainer.current_epoch
        if is_in_epoch(trainer):
            steps, epochs = (
                math.ceil(self._share_out_epoch(trainer, loader) / trainer.accumulate_grad_batches),
                epochs + 1,
            )
        steps += math.inf if trainer.max_epochs in (-1, None) else (trainer.max_epochs - epochs) * steps_an_epoch
        if self.max_steps != -1:
            steps = min(steps, self.max_steps - trainer.global_step)
        before = _length(self.plan, self.plan["whole_epoch"])
        for scheduler, course in _courses(trainer):
            if course.elapsed is not None or course.total == 0 or not math.isfinite(steps):
                continue
            # The share that is done, of the training's new length. The rest of the schedule covers the steps left.
            now = _length(self._plan(trainer), whole)
            share = course.at(scheduler.last_epoch) / course.total * _ratio(before, now)
            course.go_on(scheduler.last_epoch, min(1.0, share) * course.planned, max(0, int(steps)), course.planned)

    def _share_out_epoch(self, trainer: pl.Trainer, loader: GroupLoader | None) -> int:
        """Continue the current epoch with what is left of it; return its number of batches."""
        assert self.plan is not None
        batches, over = batches_done(trainer)
        whole, accumulate = int(trainer.num_training_batches), trainer.accumulate_grad_batches
        if over:
            set_epoch_length(trainer, batches)
            return 0
        if loader is None:  # a user's own loader, which keeps its own position
            set_epoch_length(trainer, max(whole, batches + 1))
            return max(whole - batches, 1)
        share = batches / self.plan["epoch_batches"]
        left = len(loader.groups) - loader.groups.first
        if whole < loader.whole_length:  # under `trainer.limit_train_batches`
            left = min(left, max(1, round((1 - share) * whole)))
        if left <= 0:
            raise UserError("resume: under these options the current epoch has no batch left: pass those that it had")
        # Lightning counts batches. Set its count to the batches, in whole steps, that are this share of a new epoch.
        done = max(1, round(share * whole / accumulate)) * accumulate
        count_batches_as(trainer, done)
        loader.begun = done - loader.groups.first
        set_epoch_length(trainer, done + left)
        return left

    def _apply_settings(self, trainer: pl.Trainer) -> dict[str, str]:
        """Use the config's settings instead of the checkpoint's; return what that changes, in words."""
        changed: dict[str, str] = {}
        for group, settings in zip(_groups(trainer), self.settings, strict=True):
            for name, value in settings.items():
                if value is not None and group.get(name) != value:
                    option = _SETTINGS[name] + (f".{group['name'].split('/')[0]}" if name == "initial_lr" else "")
                    changed[f"task.recipe.{option}"] = f"task.recipe.{option}={value}, was {group.get(name)}"
                    group[name] = value
        for scheduler, course in _courses(trainer):
            scheduler.base_lrs = [group["initial_lr"] for group in scheduler.optimizer.param_groups]
            for group in scheduler.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * course(scheduler.last_epoch)
        return changed

    def _restore(self) -> None:
        if self.generators is None:
            return
        state, self.generators = self.generators, None
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, place, *rest = state["numpy"]
        if not 0 <= place <= len(keys):
            raise ValueError(f"numpy's generator is at {place}")  # numpy would read out of bounds
        np.random.set_state((name, keys.numpy().astype(np.uint32), place, *rest))
        torch.set_rng_state(state["torch"].cpu())
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


def _groups(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """The groups of parameters of all optimizers."""
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]


def _courses(trainer: pl.Trainer) -> list[tuple[Any, Course]]:
    """The schedulers with a `Course`, and their courses."""
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    courses = [(one, next(iter(getattr(one, "lr_lambdas", [None])))) for one in schedulers]
    return [(scheduler, course) for scheduler, course in courses if isinstance(course, Course)]


def _length(plan: dict[str, Any], batches_an_epoch: int) -> tuple[str, float, float]:
    """The unit that ends a training (epochs or steps), how many of them, and the length in epochs."""
    per_epoch = math.ceil(batches_an_epoch / plan["trainer.accumulate_grad_batches"])
    epochs, steps = plan["trainer.max_epochs"], plan["trainer.max_steps"]
    by_epochs = epochs not in (-1, None)
    if steps == -1 or (by_epochs and epochs * per_epoch <= steps):
        return "epochs", epochs, epochs
    return "steps", steps, steps / per_epoch


def _ratio(before: tuple[str, float, float], now: tuple[str, float, float]) -> float:
    """The old length of a training divided by its new length."""
    return before[1] / now[1] if before[0] == now[0] else before[2] / now[2]
