"""What a run starts from: another run's weights, which are trained first if need be, or its own last checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock
from torch import Tensor, nn

from vlabs.checkpoints.checkpoint import packaged_starts, read_tensors
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.lora import merge_adapters
from vlabs.models.registry import build
from vlabs.runs.record import read_summary
from vlabs.tasks.base import Task
from vlabs.training.callbacks.checkpoints import previous_of
from vlabs.training.callbacks.recording import Recorder
from vlabs.training.lightning_state import validation_is_next
from vlabs.utils.ranks import say

T = TypeVar("T")


def make_start(folder: Path, overrides: list[str]) -> None:
    """Train the run that another starts from, unless it is there; processes of one machine wait for each other.

    Args:
        folder: the run folder, as in `init=`.
        overrides: of its training, as in `init_by=`.

    Raises:
        UserError: its training failed.
    """
    if folder.is_file() or str(folder) in packaged_starts():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (read_summary(folder) or {}).get("status") == "done":
            return
        if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
            raise UserError(
                f"init={folder} is not there yet, and only a run of one process trains it by itself: first run "
                f"python -m vlabs.train {' '.join(overrides)} hydra.run.dir={folder}"
            )
        arguments = [*overrides, f"hydra.run.dir={folder}"]
        if any(path.is_file() for path in _checkpoints(folder)):
            say(f"init: the training of {folder} was stopped, so it goes on first")
            arguments = [f"resume={folder}"]
        else:
            say(f"init: {folder} is not there yet, so it is trained first: {' '.join(overrides)}")
        if subprocess.run([sys.executable, "-m", "vlabs.train", *arguments]).returncode:
            raise UserError(f"init={folder}: its training (init_by) failed, see above")


@dataclass
class Last:
    """What a run goes on from, but for the tensors, which Lightning reads.

    Attributes:
        path: of the checkpoint.
        header: its `"vlabs"` entry.
        step: optimiser steps that are done.
        validates: the run goes on with a validation.
        callbacks: the states of the callbacks.
        shapes: of the weights, by name; adapters are merged.
        groups: of the optimiser: name, and how many parameters it has.
        changed: the options that are not as they were, with the values of then and now.
    """

    path: Path
    header: dict[str, Any]
    step: int
    validates: bool
    callbacks: dict[str, Any]
    shapes: dict[str, torch.Size]
    groups: list[tuple[str, int]]
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """What the run was trained with until then; empty where the checkpoint does not say."""
        state = self.callbacks.get(Recorder.__qualname__)
        config = state.get("config") if isinstance(state, dict) else None
        return config if isinstance(config, dict) else {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The trainings that its weights had been through before this run."""
        return list(self.header.get("data", {}).get("history", []))

    @property
    def preprocessing(self) -> Preprocessing:
        """Of images and texts, with tokenizer and vocabulary."""
        return self._made(lambda: Preprocessing.from_plain(self.header["preprocessing"]))

    def model(self) -> nn.Module:
        """The model, with fresh weights: nothing outside the run is asked for its parts.

        Raises:
            UserError: the checkpoint does not say of which parts it is made.
        """
        return self._made(lambda: build(self.header["architecture"]))

    def _made(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except Exception as error:  # a header that was tampered with makes the parts fail in every way there is
            reason = str(error) or type(error).__name__
            raise UserError(f"{self.path} does not fit the architecture that it names: {reason}") from None

    def differs_from(self, task: Task) -> str | None:
        """The first weight, or group of the optimiser, that a task has otherwise; None if a run may go on with it."""
        state = task.state_dict()
        if task.lora is not None:
            state = merge_adapters(state, task.lora.scale)
        shapes = _shapes(state)
        for name in dict.fromkeys([*self.shapes, *shapes]):
            if self.shapes.get(name) != shapes.get(name):
                return name
        groups = _groups(task.recipe.optimizer(task, task.lr_group).state_dict())
        return next((one[0] for one in [*groups, *self.groups] if one not in groups or one not in self.groups), None)


def last_whole(run_dir: Path, resume: str) -> Last:
    """The last checkpoint of a run, or the one before it where the last is damaged or gone.

    Raises:
        UserError: there is none, or neither can be read.
    """
    last, older = _checkpoints(run_dir)
    if not last.is_file() and not older.is_file():
        raise UserError(
            f"resume={resume}: {last} does not exist, so there is nothing to go on from: start the run again"
        )
    try:
        if last.is_file():
            return _read(last, resume)
        error = UserError(f"{last} does not exist")
    except UserError as damaged:
        error = damaged
    if not older.is_file():
        raise error
    say(f"{error}; going on from the one before, {older}")
    return _read(older, resume)


def _checkpoints(run_dir: Path) -> tuple[Path, Path]:
    last = run_dir / "checkpoints" / "last.ckpt"
    return last, previous_of(last)


def _read(path: Path, resume: str) -> Last:
    content = read_tensors(path)
    try:
        return Last(
            path,
            dict(content["vlabs"]),
            int(content["global_step"]),
            validation_is_next(content["loops"]),
            dict(content["callbacks"]),
            _shapes(content["state_dict"]),
            _groups(content["optimizer_states"][0]),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(f"resume={resume}: {path} is not a checkpoint that a run of vlabs goes on from") from None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items()}


def _groups(optimizer: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(str(group["name"]), len(group["params"])) for group in optimizer["param_groups"]]
