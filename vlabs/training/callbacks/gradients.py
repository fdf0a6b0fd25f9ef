"""Handle gradients that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch import nn

from vlabs.errors import UserError
from vlabs.tasks.base import Task
from vlabs.training.lightning_state import gradient_scaler
from vlabs.utils.files import typed
from vlabs.utils.ranks import say


class FiniteGradients(pl.Callback):
    """Stops a run before a step whose gradient is not finite, or skips some such steps. Logs the gradient norm.

    With a gradient scaler (16-mixed) such steps are part of its search for a scale, and it skips them itself.

    Args:
        max_bad_steps: largest number of steps to skip.
        checkpoint: path of the checkpoint to resume from, for the message.
    """

    def __init__(self, max_bad_steps: int, checkpoint: Path) -> None:
        self.max_bad_steps = max_bad_steps
        self.checkpoint = checkpoint
        self.bad_steps = 0
        self.seen: list[Any] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the samples of the step."""
        self.seen += cast(Task, pl_module).sample_ids(batch)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradient. All ranks decide together, because each has only its part of a sharded model (FSDP).

        Raises:
            UserError: it is not finite, and no more steps may be skipped.
        """
        texts, self.seen = self.seen, []
        norm = nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            pl_module.log("train/gradient_norm", norm)
        if gradient_scaler(trainer) is not None:
            return
        if trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(norm))):
            return
        self.bad_steps += 1
        named = ", ".join(map(str, texts[:20])) + (", …" if len(texts) > 20 else "")
        what = f"the gradient is not finite at step {trainer.global_step} (texts {named})"
        if self.bad_steps > self.max_bad_steps:
            go_on = (
                f"{self.checkpoint} is from before it: continue with {typed('resume', self.checkpoint.parent.parent)}"
                if self.checkpoint.is_file()
                else "there is no checkpoint yet"
            )
            raise UserError(f"{what}; {go_on}; lower task.recipe.lr, or allow some such steps with max_bad_steps=N")
        say(f"{what}: skipped, {self.bad_steps} of at most {self.max_bad_steps}")
        for parameter in pl_module.parameters():
            parameter.grad = None  # optimizers skip parameters without a gradient
