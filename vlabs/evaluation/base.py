"""The base of all evaluations: options, requirements on model and data, and a measurement."""

from __future__ import annotations

import contextlib
from typing import Any, ClassVar

from vlabs.checkpoints.abilities import Ability
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.module import PreparedDataModule, Wants
from vlabs.errors import UserError
from vlabs.evaluation.results import Results, Setting
from vlabs.runs.trainer import autocast_of
from vlabs.utils.options import checked
from vlabs.utils.ranks import is_rank_zero


class Evaluation:
    """Measures a checkpoint on data. To use a class of your own, name it in a config of the group `evaluation`.

    Its constructor takes the options of that config. They are checked by their annotations before anything is loaded
    (`vlabs.utils.options`).
    """

    name: ClassVar[str]
    """Name of the files that it writes, see `Results`."""
    needs: ClassVar[tuple[str | Ability, ...]] = ()
    """The required abilities of a model: names in `vlabs.checkpoints.abilities.ABILITIES`, or other abilities."""
    reads: ClassVar[type[PreparedDataModule]] = PreparedDataModule
    """The kind of data that it reads."""
    measured_on: ClassVar[str] = ""
    """Which data of this kind it is measured on, in words, where that is not all of them."""
    may_be_blind: ClassVar[bool] = False
    """Whether it can be measured with `data.blind`."""
    keeps_all: ClassVar[bool] = False
    """Whether it reads all patches after the second pass, whatever share of them the model keeps."""
    brings_data: bool = False
    """Whether it has data of its own; `data` is then not read."""
    in_trainer: bool = False
    """Whether the model runs in Lightning's own loop; otherwise `run` takes care of `trainer.precision`."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked("task")(cls)

    def wants(self, checkpoint: Checkpoint, data: Any) -> Wants:
        """What it needs from its data besides texts and images; the data module gets it before the measurement.

        Args:
            checkpoint, data: as in `measure`.
        """
        return Wants()

    def measure(self, checkpoint: Checkpoint, data: Any, results: Results) -> None:
        """Measure, and add rows, means, tables and figures to `results`, which prints and writes them.

        Args:
            checkpoint: a model with all abilities in `needs`, on the CPU.
            data: data of the kind `reads`, with the checkpoint's preprocessing; None if it `brings_data`.
            results: collects what is measured.
        """
        raise NotImplementedError

    def run(self, checkpoint: Checkpoint, data: Any, setting: Setting) -> dict[str, Any]:
        """Measure, print and write the results, and return the metrics as plain data."""
        results = Results(self.name, checkpoint, setting)
        if data is not None and data.blind:
            if not self.may_be_blind:
                raise UserError(f"data.blind=true: task={self.name} is about images: leave it out")
            results.say("data.blind=true: every image is one of a single color, so this is what the texts give")
            results.metrics["blind"] = True
        if checkpoint.keep < 1 and not self.keeps_all:
            results.metrics["keep"] = checkpoint.keep
        elif self.keeps_all and setting.keep not in (None, 1):
            raise UserError(f"keep={setting.keep:g}: task={self.name} reads all patches: leave it out")
        if data is not None:
            data.wants = self.wants(checkpoint, data)
        with contextlib.nullcontext() if self.in_trainer else autocast_of(setting.trainer):
            self.measure(checkpoint, data, results)
        return results.write() if is_rank_zero() else results.metrics
