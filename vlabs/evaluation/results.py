"""Results of evaluations, printed and written in one place: rows, means with intervals, tables and figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lightning_fabric.utilities import move_data_to_device
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from vlabs.attention.figures import save_figure
from vlabs.errors import show
from vlabs.metrics.bootstrap import bootstrap_interval
from vlabs.runs.trainer import device_of
from vlabs.utils.files import write_json, write_text
from vlabs.utils.ranks import is_rank_zero
from vlabs.utils.table import table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Setting:
    """How a checkpoint is measured.

    Attributes:
        split: split of the data; empty for an evaluation with data of its own.
        out_dir: folder of the results.
        trainer: Lightning's options, see `vlabs.runs.trainer.make_trainer`.
        keep: share of the patches in the second pass that was asked for; None for the model's own.
        old: files that say that an older evaluation in `out_dir` is whole. They stay until a new file is written.
    """

    split: str
    out_dir: Path
    trainer: DictConfig
    keep: float | None = None
    old: Sequence[Path] = ()

    @property
    def shows_progress(self) -> bool:
        """Whether a progress bar is wanted."""
        return bool(self.trainer.enable_progress_bar)

    @property
    def callbacks(self) -> list[Callback] | None:
        """Lightning's progress bar with the remaining time; None if it is switched off."""
        return [TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50)] if self.shows_progress else None


class Measured(Protocol):
    """What is measured: a checkpoint, or a model of transformers, with the path of its file or its name."""

    path: Path


class Results:
    """Collects, prints and writes the results of an evaluation.

    Args:
        name: name of the evaluation: rows go to `NAME.jsonl`, printed text to `NAME.md`.
        checkpoint, setting: what is measured, and how.

    Attributes:
        split: split of the data.
        rows: one record per sample, plain data, its id first.
        metrics: content of `metrics.json`, plain data.
    """

    def __init__(self, name: str, checkpoint: Measured, setting: Setting) -> None:
        self.name = name
        self.setting = setting
        self.split = setting.split
        self.rows: list[dict[str, Any]] = []
        self.metrics: dict[str, Any] = {"checkpoint": str(checkpoint.path)}
        if setting.split:
            self.metrics["split"] = setting.split
        self._page: list[str] = []
        self._files: list[Path] = []

    @cached_property
    def device(self) -> str:
        """The device to compute on, by `trainer.accelerator`."""
        return device_of(self.setting.trainer)

    def each(self, items: Iterable[Any] | None = None, unit: str = "text", total: int | None = None) -> tqdm:
        """Iterate over items with a progress bar; without items, return a bar to update by hand."""
        return tqdm(items, total=total, unit=unit, desc=self.name, disable=not self.setting.shows_progress)

    def batches(self, loader: Iterable[Any]) -> Iterator[Any]:
        """Iterate over a loader's batches with a progress bar; their tensors are moved to the device."""
        for batch in self.each(loader, "batch"):
            yield move_data_to_device(batch, self.device)  # type: ignore[arg-type]

    def add(self, **columns: Tensor | Sequence[Any]) -> None:
        """Add a row for each sample of a batch; each column has one value per sample."""
        values = [column.tolist() if isinstance(column, Tensor) else column for column in columns.values()]
        self.rows += [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    @property
    def frame(self) -> pandas.DataFrame:
        """The rows as a table; nested values have columns such as `maps/norm/energy`."""
        import pandas

        return pandas.json_normalize(self.rows, sep="/")

    def mean(self, name: str, values: ArrayLike, digits: int = 2) -> str:
        """Add a mean to the metrics, and its 95% bootstrap interval as `NAME_interval`; return both as a table cell.

        Args:
            name: name of the metric.
            values: one value per sample; a single value has no interval, and without values nothing is added.
            digits: digits after the point in the cell.
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
        """Add means to the metrics, and print them as a table with one row each."""
        self.table(["", title], [[name.replace("_", " "), self.mean(name, of)] for name, of in values.items()])

    def say(self, text: str) -> None:
        """Add a paragraph to the printed text."""
        self._page.append(text)

    def table(self, header: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
        """Add a table to the printed text."""
        self.say(table(header, rows))

    def begin(self) -> None:
        """Remove what says that an older evaluation is whole; to be called before a file is written without `Results`.

        Later than this, bad input cannot be found without a loss.
        """
        for path in self.setting.old if is_rank_zero() else ():
            path.unlink(missing_ok=True)

    def figure(self, name: str, figure: Figure) -> None:
        """Save a figure as `figures/NAME.png`."""
        self.begin()
        self.file(save_figure(figure, self.setting.out_dir / "figures" / f"{name}.png"))

    def text(self, name: str, text: str) -> None:
        """Write a text file."""
        self.begin()
        self.file(write_text(self.setting.out_dir / name, text))

    def json(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        self.begin()
        self.file(write_json(self.setting.out_dir / name, content))

    def file(self, path: Path) -> None:
        """Add a file or folder that was written to the list that is printed."""
        self._files.append(path)

    def write(self) -> dict[str, Any]:
        """Print and write everything, the metrics last; return the metrics."""
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
