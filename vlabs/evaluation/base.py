"""What an evaluation is: options, what it asks of a model and of data, and a measurement."""

from __future__ import annotations

from typing import Any, ClassVar

from vlabs.checkpoints.abilities import Ability
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.module import PreparedDataModule
from vlabs.evaluation.results import Results, Setting
from vlabs.utils.options import checked
from vlabs.utils.ranks import is_rank_zero


class Evaluation:
    """Measures a checkpoint on data. A class of your own is named in a config of the group `evaluation`.

    Its constructor takes the options of that config. Their annotations are checked before anything is loaded
    (`vlabs.utils.options`).
    """

    name: ClassVar[str]
    """Of the files that it writes, see `Results`."""
    needs: ClassVar[tuple[str | Ability, ...]] = ()
    """What a model has to be able to do, of `vlabs.checkpoints.abilities.ABILITIES` or others, whatever it was trained
    for."""
    reads: ClassVar[type[PreparedDataModule]] = PreparedDataModule
    """The kind of data that it is measured on."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked("task")(cls)

    def measure(self, checkpoint: Checkpoint, data: Any, results: Results) -> None:
        """Measure, and give the results what is found: rows, means, tables, figures. They print and write it.

        Args:
            checkpoint: of a model that does what it `needs`, on the CPU.
            data: of the kind `reads`, with the checkpoint's preprocessing.
        """
        raise NotImplementedError

    def run(self, checkpoint: Checkpoint, data: Any, setting: Setting) -> dict[str, Any]:
        """Measure, print and write what comes out, and return the metrics as plain data."""
        results = Results(self.name, checkpoint, setting)
        self.measure(checkpoint, data, results)
        return results.write() if is_rank_zero() else results.metrics
