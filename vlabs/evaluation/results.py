"""What evaluations find, printed and written in one place: rows, means with intervals, tables and figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_fabric.utilities import move_data_to_device
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from vlabs.attention.figures import save_figure
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.errors import show
from vlabs.metrics.bootstrap import bootstrap_interval
from vlabs.runs.trainer import device_of
from vlabs.utils.files import write_json, write_text
from vlabs.utils.table import table

if TYPE_CHECKING:
    import pandas


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


class Results:
    """Collects what an evaluation measures, and prints and writes it.

    Args:
        name: of the evaluation: rows go to `NAME.jsonl`, what is printed to `NAME.md`.
        checkpoint, setting: what is measured, and how.

    Attributes:
        split: of the data.
        rows: a record a sample, plain data, its id first.
        metrics: plain data, for `metrics.json`.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, setting: Setting) -> None:
        self.name = name
        self.setting = setting
        self.split = setting.split
        self.rows: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {"checkpoint": str(checkpoint.path), "split": setting.split}
        self._page: list[str] = []
        self._files: list[Path] = []

    @cached_property
    def device(self) -> str:
        """Where to compute, by `trainer.accelerator`."""
        return device_of(self.setting.trainer)

    def each(self, items: Iterable[Any] | None = None, unit: str = "text", total: int | None = None) -> tqdm:
        """The items, with a progress bar; without items, a bar that is moved by hand."""
        return tqdm(items, total=total, unit=unit, desc=self.name, disable=not self.setting.shows_progress)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The batches of a loader, their tensors on the device, with a progress bar."""
        for batch in self.each(loader, "batch"):
            yield move_data_to_device(batch, self.device)  # type: ignore[arg-type]

    def add(self, **columns: Tensor | Sequence[Any]) -> None:
        """Add the rows of a batch's samples, of which every column has a value each."""
        values = [column.tolist() if isinstance(column, Tensor) else column for column in columns.values()]
        self.rows += [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    @property
    def frame(self) -> pandas.DataFrame:
        """The rows as a table; what lies deeper in a row is in columns such as `maps/norm/energy`."""
        import pandas

        return pandas.json_normalize(self.rows, sep="/")

    def mean(self, name: str, values: ArrayLike, digits: int = 2) -> str:
        """Put a mean into the metrics, and its 95% bootstrap interval as `NAME_interval`; returns both as a cell.

        Args:
            values: one a sample; of fewer than two there is no interval, and of none nothing.
        """
        import numpy as np

        array = np.asarray(values, dtype=np.float64)
        if not len(array):
            return "–"
        if len(array) == 1:
            self.metrics[name] = float(array[0])
            return f"{array[0]:.{digits}f}"
        mean, low, high = bootstrap_interval(array)
        self.metrics |= {name: mean, f"{name}_interval": [low, high]}
        return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def means(self, values: Mapping[str, ArrayLike], title: str = "percent") -> None:
        """A table of means, a line each, by the names that they have in the metrics."""
        self.table(["", title], [[name.replace("_", " "), self.mean(name, of)] for name, of in values.items()])

    def say(self, text: str) -> None:
        """A paragraph of what is printed."""
        self._page.append(text)

    def table(self, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
        """A table of what is printed."""
        self.say(table(header, rows))

    def figure(self, name: str, figure: Figure) -> None:
        """An image, `figures/NAME.png`."""
        self.file(save_figure(figure, self.setting.out_dir / "figures" / f"{name}.png"))

    def text(self, name: str, text: str) -> None:
        """A file of its own."""
        self.file(write_text(self.setting.out_dir / name, text))

    def json(self, name: str, content: Any) -> None:
        """A JSON file of its own."""
        self.file(write_json(self.setting.out_dir / name, content))

    def file(self, path: Path) -> None:
        """Name a file or folder that was written."""
        self._files.append(path)

    def write(self) -> dict[str, Any]:
        """Print and write it all, the metrics last; returns them."""
        page = "\n\n".join(self._page)
        if page:
            show(f"\n{page}\n")
            self.text(f"{self.name}.md", f"{page}\n")
        if self.rows:
            self.text(f"{self.name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in self.rows))
        self.json("metrics.json", self.metrics)
        for path in self._files:
            print(path)
        return self.metrics
