"""METER's training recipe: AdamW with a learning rate per part, linear warm-up and decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from vlabs.errors import UserError
from vlabs.utils.options import NonNegative, Positive, ShareBelowOne, checked

PARTS = ("vision", "text", "fusion", "head", "feedback")


def _default_lr() -> dict[str, float]:
    return {"vision": 1e-5, "text": 1e-5, "fusion": 5e-5, "head": 5e-4, "feedback": 3e-5}


@checked("task.recipe")
@dataclass
class Recipe:
    """How the parts of a model are optimized.

    Attributes:
        lr: peak learning rate of a part: `vision`, `text`, `fusion`, `head`, `feedback` (decoders, ξ and its
            temperature), or a group that a task adds.
        weight_decay: weight decay of matrices; biases and norms have none.
        betas: β1 and β2 of AdamW.
        eps: ε of AdamW.
        warmup: share of the optimizer steps in which the learning rate rises from 0.
        schedule: name of a learning rate schedule of transformers, such as `linear` (to 0) or `cosine`.
        schedule_options: options of that schedule, such as `min_lr_rate` of `cosine_with_min_lr`.
        fused: run AdamW as one kernel.
        no_decay: parameters without weight decay, by the end of their name, beside those of one dimension.
    """

    lr: dict[str, NonNegative] = field(default_factory=_default_lr)
    weight_decay: NonNegative = 0.01
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.98)
    eps: Positive = 1e-8
    warmup: ShareBelowOne = 0.1
    schedule: str = "linear"
    schedule_options: dict[str, float] = field(default_factory=dict)
    fused: bool = True
    no_decay: tuple[str, ...] = ()

    def optimizer(self, module: nn.Module, lr_group: Callable[[str], str]) -> AdamW:
        """AdamW over the trainable parameters of a task, in groups `part` and `part/no_decay`.

        Args:
            lr_group: the part that a parameter belongs to, by its name.

        Raises:
            UserError: no parameter is trainable, a group has no learning rate, or a learning rate has no group.
        """
        groups: dict[str, list[nn.Parameter]] = {}
        parts = {name: lr_group(name) for name, _ in module.named_parameters()}
        if unknown := [part for part in self.lr if part not in (*PARTS, *parts.values())]:
            raise UserError(f"task.recipe.lr.{unknown[0]}: no parameter is in this group; groups: {', '.join(PARTS)}")
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                part = parts[name]
                if part not in self.lr:
                    raise UserError(f"task.recipe.lr has no learning rate for {name}: pass +task.recipe.lr.{part}=RATE")
                # As in METER, parameters with one dimension are biases or belong to norms.
                plain = parameter.ndim > 1 and not name.endswith(tuple(self.no_decay))
                key = part if plain else f"{part}/no_decay"
                groups.setdefault(key, []).append(parameter)
        if not groups:
            raise UserError("task.freeze leaves nothing to train")
        return AdamW(
            [
                {
                    "params": parameters,
                    "name": key,
                    "lr": self.lr[key.split("/")[0]],
                    "weight_decay": 0.0 if key.endswith("/no_decay") else self.weight_decay,
                }
                for key, parameters in groups.items()
            ],
            betas=self.betas,
            eps=self.eps,
            fused=self.fused,
        )

    def scheduler(self, optimizer: AdamW, total_steps: int) -> LambdaLR:
        """The learning rate schedule over `total_steps` optimizer steps.

        Raises:
            UserError: there is no such schedule, or it is not a function of the step alone.
        """
        try:
            made = get_scheduler(
                self.schedule,
                optimizer,
                num_warmup_steps=round(self.warmup * total_steps),
                num_training_steps=total_steps,
                scheduler_specific_kwargs=dict(self.schedule_options) or None,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"task.recipe.schedule={self.schedule}: {error}") from None
        if not isinstance(made, LambdaLR):
            raise UserError(
                f"task.recipe.schedule={self.schedule} is not a function of the step: choose linear or cosine"
            )
        # Take only the function of transformers' schedule: undo its first step, and wrap it so that a resumed run can
        # continue at another position (`Course`).
        for group in optimizer.param_groups:
            group["lr"] = group.pop("initial_lr")
        rate: Callable[[Any], float] = made.lr_lambdas[0]  # also defined for fractions of steps
        return LambdaLR(optimizer, Course(rate, total_steps))


class Course:
    """Position in a learning rate schedule: the factor of learning rates as a function of optimizer steps.

    The schedule has `total` steps. Optimizer step `since` is at `place` in the schedule, and the remaining part of the
    schedule is stretched over `steps` further steps. So a run that is resumed with another batch size or length has the
    learning rate of the share of the training that is done. Without that, `place` = `since` = 0 and `steps` = `total`.

    Args:
        rate: the schedule: from schedule steps, also fractions, to the factor.
        total: number of steps of the schedule.

    Attributes:
        elapsed: gives the share of the training that is done, in [0, 1], if time ends it instead of steps; else None.
    """

    # LambdaLR saves the `__dict__` of its functions. What is in slots is left out of checkpoints.
    __slots__ = ("__dict__", "elapsed", "planned", "rate")

    def __init__(self, rate: Callable[[float], float], total: int) -> None:
        self.rate, self.planned = rate, total
        self.elapsed: Callable[[], float] | None = None
        self.go_on(0, 0.0, total, total)

    def go_on(self, since: int, place: float, steps: int, total: int) -> None:
        """Set the position; see the class."""
        self.since, self.place, self.steps, self.total = since, place, steps, total

    def at(self, step: int) -> float:
        """The position in the schedule after `step` optimizer steps, in [0, total]."""
        if self.elapsed is not None:
            return self.total * min(1.0, self.elapsed())
        return self.place + (step - self.since) * ((self.total - self.place) / max(1, self.steps))

    def __call__(self, step: int) -> float:
        """The factor of learning rates after `step` optimizer steps."""
        return self.rate(self.at(step))
