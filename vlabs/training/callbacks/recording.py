"""The record of a run (`vlabs.runs.record`), kept during training."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from vlabs.runs.record import Record


class Recorder(pl.Callback):
    """Calls `begin` when nothing can refuse the run any more, and keeps the run's record in its checkpoints.

    A run whose folder was moved, renamed or copied finds its own checkpoints in the new place.

    Args:
        record: the record of the run.
        begin: called before the first batch.
        config: the config of the run, as plain data.
    """

    def __init__(self, record: Record, begin: Callable[[], None], config: dict[str, Any]) -> None:
        self.record = record
        self.begin = begin
        self.config = config

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count the steps of this part of the run."""
        self.record.first_step = trainer.global_step
        self.record.step = lambda: trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin."""
        self._begin()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin, if a run resumes with a validation."""
        if not trainer.sanity_checking:
            self._begin()

    def _begin(self) -> None:
        if not self.record.begun:
            self.begin()

    def state_dict(self) -> dict[str, Any]:
        """The record as plain data."""
        folder = os.path.realpath(self.record.folder)
        return {"folder": folder, "config": self.config, "summary": self.record.summary("running")}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Update paths in the states of other callbacks.

        Paths in the run folder are moved to where the folder is now. Forget a best checkpoint that is gone, and paths
        outside a callback's own folder: it would delete those files when it has better ones.
        """
        states = checkpoint["callbacks"]
        then, now = _folder_of(states), os.path.realpath(self.record.folder)
        if then is not None:
            states.update(_moved(states, then, now))
        folders = {str(getattr(one, "dirpath", None)) for one in trainer.checkpoint_callbacks}
        for name, state in list(states.items()):
            if isinstance(state, dict) and "best_model_path" in state:
                best = state["best_model_path"]
                if state.get("dirpath") not in folders or not _is_at_home(state) or (best and not Path(best).is_file()):
                    del states[name]


def _folder_of(states: dict[str, Any]) -> str | None:
    """The folder of a run when the states of its callbacks were saved."""
    if (own := states.get(Recorder.__qualname__)) is not None:
        return str(own["folder"])
    kept = [Path(str(state["dirpath"])) for state in states.values() if isinstance(state, dict) and "dirpath" in state]
    return next((str(path.parent) for path in kept if path.name == "checkpoints"), None)


def _is_at_home(state: dict[str, Any]) -> bool:
    """Whether all files in a callback's state are in its own folder."""
    names = ("best_model_path", "kth_best_model_path", "last_model_path")
    paths = [Path(path) for path in (*map(state.get, names), *(state.get("best_k_models") or {})) if path]
    return all(path.is_relative_to(state["dirpath"]) and ".." not in path.parts for path in paths)


def _moved(value: Any, then: str, now: str) -> Any:
    """Replace the folder `then` by `now` in all paths of plain data."""
    if isinstance(value, dict):
        return {_moved(key, then, now): _moved(one, then, now) for key, one in value.items()}
    if isinstance(value, list):
        return [_moved(one, then, now) for one in value]
    if isinstance(value, str) and (value == then or value.startswith(then + os.sep)):
        return now + value.removeprefix(then)
    return value
