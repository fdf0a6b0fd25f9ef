"""Where a run starts: from another run's weights, which are trained first if necessary, or its own last checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlabs.checkpoints.checkpoint import check_header, packaged_starts, read_tensors
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.lora import merge_adapters
from vlabs.models.registry import build, check_spec
from vlabs.runs.folders import will_make
from vlabs.runs.record import is_summary, read_summary
from vlabs.tasks.base import Task
from vlabs.training.callbacks.checkpoints import previous_of
from vlabs.training.callbacks.recording import Recorder
from vlabs.training.lightning_state import validation_is_next
from vlabs.utils.files import locked
from vlabs.utils.plain import check_plain
from vlabs.utils.plugins import imported
from vlabs.utils.ranks import say

T = TypeVar("T")


def make_start(folder: Path, overrides: list[str]) -> None:
    """Train the run that another run starts from, unless it is there. Processes of one machine wait for each other.

    Args:
        folder: the run folder, as in `init=`.
        overrides: the options of its training, as in `init_by=`.

    Raises:
        UserError: its training failed.
    """
    if folder.is_file() or str(folder) in packaged_starts():
        return
    will_make(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent, "", wait=True, name=f"{folder.name}.lock"):
        if (read_summary(folder) or {}).get("status") == "done":
            return
        if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
            raise UserError(
                f"init={folder} is not there yet, and a run of several processes cannot train it: first run "
                f"vlabs train {' '.join(overrides)} hydra.run.dir={folder}"
            )
        arguments = [*overrides, f"hydra.run.dir={folder}"]
        if any(path.is_file() for path in _checkpoints(folder)):
            say(f"init: the training of {folder} was stopped, so it is resumed first")
            arguments = [f"resume={folder}"]
        else:
            say(f"init: {folder} is not there yet, so it is trained first: {' '.join(overrides)}")
        own = [f"import={','.join(imported)}"] if imported else []
        if subprocess.run([sys.executable, "-m", "vlabs.train", *arguments, *own]).returncode:
            raise UserError(f"init={folder}: its training (init_by) failed, see above")


@dataclass
class Last:
    """The checkpoint that a run resumes from, without its tensors, which Lightning reads.

    Attributes:
        path: path of the checkpoint.
        header: its `"vlabs"` entry.
        step: optimizer steps that are done.
        validates: whether the run resumes with a validation.
        callbacks: the states of the callbacks.
        shapes: shapes of the weights by name, with adapters merged.
        weights: the model's weights by name, without values (meta tensors).
        groups: name and number of parameters of each group of the optimizer.
        moments: shapes by name of the optimizer's state, for each of its parameters in order.
        changed: the options that changed, with old and new values.
    """

    path: Path
    header: dict[str, Any]
    step: int
    validates: bool
    callbacks: dict[str, Any]
    shapes: dict[str, torch.Size]
    weights: dict[str, Tensor]
    groups: list[tuple[str, int]]
    moments: list[dict[str, torch.Size]]
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        """The config that the run was trained with until then; empty if the checkpoint does not have it."""
        state = self.callbacks.get(Recorder.__qualname__)
        config = state.get("config") if isinstance(state, dict) else None
        return config if isinstance(config, dict) else {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """The earlier trainings of its weights, before this run."""
        return list(self.header.get("data", {}).get("history", []))

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing of images and texts, with tokenizer and vocabulary."""
        return self._made(lambda: check_header(self.header, self.path))

    def model(self) -> nn.Module:
        """Build the model with new weights. Nothing outside the run is read, e.g. no pre-trained encoder.

        Raises:
            UserError: the checkpoint has no valid architecture, or its weights do not fit it.
        """
        spec: Any = self.header.get("architecture")
        self._made(lambda: check_spec(spec, self.weights))
        return self._made(lambda: build(spec))

    def _made(self, make: Callable[[], T]) -> T:
        try:
            return make()
        except Exception as error:  # a manipulated header makes the parts fail with any kind of error
            reason = str(error) or type(error).__name__
            raise UserError(f"{self.path} does not fit its own architecture entry: {reason}") from None

    def differs_from(self, task: Task) -> str | None:
        """The first weight or optimizer group that differs in a task; None if the run can resume with the task."""
        state = task.state_dict()
        if task.lora is not None:
            state = merge_adapters(state, task.lora.scale)
        shapes = _shapes(state)
        for name in dict.fromkeys([*self.shapes, *shapes]):
            if self.shapes.get(name) != shapes.get(name):
                return name
        optimizer = task.recipe.optimizer(task, task.lr_group)
        groups = _groups(optimizer.state_dict())
        for one in [*groups, *self.groups]:
            if one not in groups or one not in self.groups:
                return one[0]
        # Fused optimizers do not check the sizes of moments: wrong ones would be written out of bounds.
        sizes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
        for size, moments in zip(sizes, self.moments, strict=True):
            for name, found in moments.items():
                if (name == "step" and found) or (name in _MOMENTS and found != size):
                    return f"{name} of the optimizer"
        return None


_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum")


def last_whole(run_dir: Path, resume: str) -> Last:
    """The last checkpoint of a run, or the one before if the last is damaged or gone.

    Raises:
        UserError: there is none, or neither can be read.
    """
    last, older = _checkpoints(run_dir)
    if not last.is_file() and not older.is_file():
        raise UserError(
            f"resume={resume}: {last} does not exist, so there is nothing to resume from: start the run again"
        )
    try:
        if last.is_file():
            return _read(last, resume)
        error = UserError(f"{last} does not exist")
    except UserError as damaged:
        error = damaged
    if not older.is_file():
        raise error
    say(f"{error}; resuming from the one before, {older}")
    return _read(older, resume)


def _checkpoints(run_dir: Path) -> tuple[Path, Path]:
    last = run_dir / "checkpoints" / "last.ckpt"
    return last, previous_of(last)


def _read(path: Path, resume: str) -> Last:
    content = read_tensors(path)
    try:
        _check_record(content["callbacks"], path)
        state, optimizer = content["state_dict"], content["optimizer_states"][0]
        return Last(
            path,
            dict(content["vlabs"]),
            int(content["global_step"]),
            validation_is_next(content["loops"]),
            dict(content["callbacks"]),
            _shapes(state),
            {name.removeprefix("model."): one.to("meta") for name, one in state.items() if name.startswith("model.")},
            _groups(optimizer),
            [_shapes(optimizer["state"].get(n, {})) for group in optimizer["param_groups"] for n in group["params"]],
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        raise UserError(f"resume={resume}: {path} is not a checkpoint that a run of vlabs can resume from") from None


def _check_record(callbacks: Mapping[str, Any], path: Path) -> None:
    """Raise an error if a checkpoint's record of its run is not valid."""
    kept = callbacks.get(Recorder.__qualname__)
    if kept is None:  # a checkpoint of an earlier version
        return
    check_plain(kept, f"{path}: the record of its run", finite=False)
    summary = kept.get("summary") or {}
    if not (isinstance(kept["folder"], str) and isinstance(kept.get("config", {}), dict)):
        raise TypeError
    if summary and not is_summary(summary):
        raise TypeError


def _shapes(state: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in state.items() if isinstance(value, Tensor)}


def _groups(optimizer: Mapping[str, Any]) -> list[tuple[str, int]]:
    return [(str(group["name"]), len(group["params"])) for group in optimizer["param_groups"]]
