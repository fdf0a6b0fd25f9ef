"""METER's recipe of optimisation: AdamW with a learning rate for each part, linear warm-up and decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from vlabs.errors import UserError

PARTS = ("vision", "text", "fusion", "head", "feedback")


def _default_lr() -> dict[str, float]:
    return {"vision": 1e-5, "text": 1e-5, "fusion": 5e-5, "head": 5e-4, "feedback": 3e-5}


@dataclass
class Recipe:
    """How the parts of a model are optimised.

    Attributes:
        lr: peak learning rate of `vision`, `text`, `fusion`, `head` and `feedback` (decoders, FiLM's maps, ξ map,
            temperature), and of any group that a task adds.
        weight_decay: on matrices; biases and norms have none.
        betas, eps: of AdamW.
        warmup: share of the optimiser steps in which the rate rises from 0, in [0, 1).
        schedule: a name of transformers' schedules after warm-up, e.g. `linear` (to 0), `cosine`.
        schedule_options: of that schedule, e.g. `min_lr_rate` of `cosine_with_min_lr`.
        fused: AdamW in one kernel.
        no_decay: parameters without weight decay, by the end of their name, beside those of one dimension.
    """

    lr: dict[str, float] = field(default_factory=_default_lr)
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: float = 0.1
    schedule: str = "linear"
    schedule_options: dict[str, float] = field(default_factory=dict)
    fused: bool = True
    no_decay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for part, rate in self.lr.items():
            if not isinstance(rate, int | float) or rate < 0:
                raise UserError(f"task.recipe.lr.{part}={rate} must be a number, at least 0")
        if not 0 <= self.warmup < 1:
            raise UserError(f"task.recipe.warmup={self.warmup} must be a share of the steps, in [0, 1)")
        if self.weight_decay < 0:
            raise UserError(f"task.recipe.weight_decay={self.weight_decay} must be at least 0")
        if self.eps <= 0:
            raise UserError(f"task.recipe.eps={self.eps} must be above 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"task.recipe.betas={list(self.betas)} must be two numbers in [0, 1)")

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
        """The rate's course over `total_steps` optimiser steps."""
        try:
            return get_scheduler(
                self.schedule,
                optimizer,
                num_warmup_steps=round(self.warmup * total_steps),
                num_training_steps=total_steps,
                scheduler_specific_kwargs=dict(self.schedule_options) or None,
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"task.recipe.schedule={self.schedule}: {error}") from None
