"""What a run prints about itself: its first lines, a line per epoch, and the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl

from vlabs.checkpoints.checkpoint import trainings_in_words, words_of
from vlabs.data.module import PreparedDataModule
from vlabs.data.texts import TextDataModule
from vlabs.runs.groups import choices
from vlabs.tasks.base import Task
from vlabs.utils.files import size, typed
from vlabs.utils.ranks import say

_SMALL = 5_000_000  # parameters; too few to learn photographs from scratch


def beginning(task: Task, data: PreparedDataModule, folder: str | Path) -> str:
    """What is trained, on which data, from which weights; what is frozen, and what will be written."""
    everything = sum(p.numel() for p in task.parameters())
    own = {name: value for name, value in task.data.items() if name != "history"}
    history = task.data.get("history", [])
    parts = (getattr(task.model, name, None) for name in ("vision", "encoder", "text"))
    pretrained = any(getattr(part, "origin", None) for part in parts)
    source = trainings_in_words(history) if history else "pre-trained encoders" if pretrained else "scratch"
    side = data.preprocessing.image_size
    lines = [
        f"train: {trainings_in_words([{'task': task.name, 'data': own}])}, images of {side} px, from {source}",
        f"  {everything / 1e6:.1f} M parameters, {_trained(task)}",
        f"  to {folder}: about {size(checkpoint_bytes(task))} of checkpoints (best, last, and the last one before)",
    ]
    is_drawn = str(own.get("name")).startswith(("scenes", "objects-"))
    if source == "scratch" and everything < _SMALL and not is_drawn:
        lines.append(
            "  note: a model this small learns drawn shapes, but little about photographs: for these pass "
            "experiment=photo_vqa, pre-trained encoders (model=photo), or init=RUN"
        )
    return "\n".join([*lines, *_new_words(task, data, history)])


def _new_words(task: Task, data: PreparedDataModule, history: list[dict[str, Any]]) -> list[str]:
    """A line about words that the weights of the text encoder were never trained with; none where nobody knows."""
    known, own = words_of(history), task.data.get("words")
    pretrained = getattr(getattr(task.model, "text", None), "origin", None)
    if not known or pretrained or not isinstance(own, str) or not isinstance(data, TextDataModule):
        return []
    new = {*own.split()} - known
    if not new:
        return []
    most = ", ".join(data.most_frequent(new, 5))
    return [f"  note: earlier training never had {len(new):,} of the {len(own.split()):,} words of these texts: {most}"]


def _trained(task: Task) -> str:
    """How much is trained, and why the rest is not."""
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    reasons = [f"frozen: {', '.join(task.freezes)}"] if task.freezes else []
    if task.lora is not None:
        reasons.append(f"adapters alone in: {', '.join(task.lora.parts)}")
    if not reasons:
        idle = not all(p.requires_grad for p in task.parameters())
        return f"{trained / 1e6:.1f} M trained; this task does not use the others" if idle else "all trained"
    return f"{trained / 1e6:.1f} M trained; {'; '.join(reasons)}"


def checkpoint_bytes(task: Task) -> int:
    """Bytes of a run's checkpoints: best.ckpt has the weights; last.ckpt, kept twice, also AdamW's two moments."""
    everything = sum(p.numel() for p in task.parameters())
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    return 4 * everything + 2 * (4 * everything + 8 * trained)


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, whichever reads best."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} hours"


class EpochLine(pl.Callback):
    """Prints a line per epoch if there is no progress bar, and remembers the best validation.

    Attributes:
        best: best value of the task's monitor; None before the first validation.
        epoch, step: epoch and step of that validation, counted from 1.
    """

    def __init__(self) -> None:
        self.best: float | None = None
        self.epoch = self.step = 0
        self.since = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self.since = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember the best validation."""
        value = trainer.callback_metrics.get(cast(Task, pl_module).monitor)
        if value is not None and not trainer.sanity_checking and (self.best is None or float(value) > self.best):
            self.best, self.epoch, self.step = float(value), trainer.current_epoch + 1, trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the line."""
        if trainer.progress_bar_callback is not None:
            return
        names = ("train/loss", cast(Task, pl_module).monitor)
        metrics = {name: float(trainer.callback_metrics[name]) for name in names if name in trainer.callback_metrics}
        of = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        said = [f"{name} {value:.4g}" for name, value in metrics.items()]
        said += [f"step {trainer.global_step:,}", duration(time.perf_counter() - self.since)]
        say(f"epoch {trainer.current_epoch + 1}{of}: {', '.join(said)}")

    def state_dict(self) -> dict[str, Any]:
        """The best validation so far."""
        return {"best": self.best, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best validation of the run before it was resumed."""
        self.best, self.epoch, self.step = state_dict["best"], state_dict["epoch"], state_dict["step"]


def ending(task: Task, folder: str | Path, line: EpochLine, own: Sequence[str] = ()) -> str:
    """The best value and its epoch, where the run is, and what to do next.

    Args:
        task: the task.
        folder: the run folder.
        line: the line of its epochs.
        own: folders of the user's own configs (`--config-dir`).
    """
    lines = [f"done: {folder}"]
    if line.best is not None:
        lines.append(f"  best {task.monitor}: {line.best:.4g} in epoch {line.epoch} (step {line.step:,})")
    theirs = next((f" --config-dir {one}" for one in own if Path(one, "evaluation", f"{task.name}.yaml").is_file()), "")
    if theirs or task.name in choices("evaluation"):
        chosen = "" if task.name == "vqa" else f" task={task.name}"
        lines.append(f"  next: vlabs evaluate{theirs}{chosen} {typed('ckpt', folder)}")
    else:
        lines.append(f"  next: vlabs train {typed('init', folder)} ...")
    return "\n".join(lines)
