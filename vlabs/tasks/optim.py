"""METER's recipe of optimization: AdamW with a learning rate for each part, linear warm-up and decay."""

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
            UserError: nothing is to be trained, a part has no rate, or a rate no part.
        """
        groups: dict[str, list[nn.Parameter]] = {}
        parts = {name: lr_group(name) for name, _ in module.named_parameters()}
        if unknown := [part for part in self.lr if part not in (*PARTS, *parts.values())]:
            raise UserError(f"task.recipe.lr.{unknown[0]}: no parameter is in this group; there are {', '.join(PARTS)}")
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                part = parts[name]
                if part not in self.lr:
                    raise UserError(f"task.recipe.lr has no rate for {name}: pass +task.recipe.lr.{part}=RATE")
                # As in METER, what has one dimension is a bias or a norm.
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
        """The rate's course over `total_steps` optimizer steps.

        Raises:
            UserError: there is no such schedule, or it is no function of the steps alone.
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
            raise UserError(f"task.recipe.schedule={self.schedule} is no function of the step: choose linear or cosine")
        for group in optimizer.param_groups:  # as before the schedule was made
            group["lr"] = group.pop("initial_lr")
        rate: Callable[[Any], float] = made.lr_lambdas[0]  # of fractions of steps too
        return LambdaLR(optimizer, Course(rate, total_steps))


class Course:
    """How far a training is: the factor of its rates as a function of its optimizer steps.

    The schedule has `total` steps. From step `since`, which stands at `place` in the schedule, the rest of the training
    takes `steps` steps, whatever the schedule's own were: so a training that goes on with another batch size or another
    length has the rate of the share of it that is done. A whole training has `place` = `since` = 0, `steps` = `total`.

    Args:
        rate: of schedule steps, fractions of them too, to the factor.
        total: of the schedule.

    Attributes:
        elapsed: the share of the training that is done, in [0, 1], where it is not steps that end it; else None.
    """

    __slots__ = ("__dict__", "elapsed", "planned", "rate")  # a scheduler's state is `__dict__` alone

    def __init__(self, rate: Callable[[float], float], total: int) -> None:
        self.rate, self.planned = rate, total
        self.elapsed: Callable[[], float] | None = None
        self.go_on(0, 0.0, total, total)

    def go_on(self, since: int, place: float, steps: int, total: int) -> None:
        """See the class."""
        self.since, self.place, self.steps, self.total = since, place, steps, total

    def at(self, step: int) -> float:
        """The place in the schedule after so many steps, in [0, total]."""
        if self.elapsed is not None:
            return self.total * min(1.0, self.elapsed())
        return self.place + (step - self.since) * ((self.total - self.place) / max(1, self.steps))

    def __call__(self, step: int) -> float:
        """The factor after so many steps."""
        return self.rate(self.at(step))
