"""Callbacks that act every few validations."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl


class EveryNValidations(pl.Callback):
    """Acts after every N validations, counted across stops of the run.

    Args:
        every: N; 0 for never.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.validations = 0

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Count a validation; True for every N-th."""
        if trainer.sanity_checking:
            return False
        self.validations += 1
        return bool(self.every) and self.validations % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """The number of validations."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.validations = state_dict["validations"]
