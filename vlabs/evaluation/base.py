"""What an evaluation is: options, the checkpoints and data that it takes, and a measurement."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, TQDMProgressBar

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.module import PreparedDataModule


@dataclass(frozen=True)
class Setting:
    """How a checkpoint is measured.

    Attributes:
        split: of the data.
        out_dir: where what comes out goes.
        trainer: Lightning's options, see `vlabs.runs.trainer.make_trainer`.
    """

    split: str
    out_dir: Path
    trainer: DictConfig

    @property
    def shows_progress(self) -> bool:
        """Whether a progress bar is wanted."""
        return bool(self.trainer.enable_progress_bar)

    @property
    def callbacks(self) -> list[Callback] | None:
        """Lightning's progress bar, with the time left, unless it is switched off."""
        return [TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50)] if self.shows_progress else None


class Evaluation:
    """Measures a checkpoint on data. A class of one's own is named in a config of the group `evaluation`.

    Its constructor takes the options of that config, and checks them before anything is loaded.
    """

    trained_for: ClassVar[tuple[str, ...]]
    """The tasks (`VisionLanguageTask.name`) whose checkpoints it takes."""
    reads: ClassVar[type[PreparedDataModule]] = PreparedDataModule
    """The kind of data that it is measured on."""

    def run(self, checkpoint: Checkpoint, data: Any, setting: Setting) -> dict[str, Any]:
        """Measure, print and write what comes out, and return the metrics as plain data.

        Args:
            checkpoint: of one of the tasks in `trained_for`.
            data: of the kind `reads`, with the checkpoint's preprocessing.
        """
        raise NotImplementedError
