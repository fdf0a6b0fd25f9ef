"""Evaluation of labelled statements: accuracy, the confusion matrix, NLVR2's consistency, and a file of predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torchmetrics.classification import MulticlassConfusionMatrix
from tqdm import tqdm

from vlabs.attention.figures import save_figure
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.statements import StatementDataModule
from vlabs.errors import UserError, show
from vlabs.evaluation.base import Evaluation, Setting
from vlabs.metrics.bootstrap import bootstrap_interval
from vlabs.metrics.statements import consistency
from vlabs.runs.trainer import device_of
from vlabs.tasks.optim import Recipe
from vlabs.tasks.statements import NLVR2Task, SNLIVETask, StatementTask
from vlabs.utils.files import write_json, write_text

TASKS: dict[str, type[StatementTask]] = {task.name: task for task in (SNLIVETask, NLVR2Task)}


class StatementEvaluation(Evaluation):
    """Labels every statement of a split; scores the labels, where they are known.

    Args:
        of: the task, `snli_ve` or `nlvr2`.

    Raises:
        UserError: there is no such task.
    """

    reads = StatementDataModule

    def __init__(self, of: str) -> None:
        if of not in TASKS:
            raise UserError(f"task.of={of}: choose one of {', '.join(TASKS)}")
        self.of = of
        self.trained_for = (of,)  # type: ignore[misc]

    @torch.inference_mode()
    def run(self, checkpoint: Checkpoint, data: StatementDataModule, setting: Setting) -> dict[str, Any]:
        """See `Evaluation`; accuracies in percent."""
        names = list(checkpoint.preprocessing.names)
        if data.labels != names or data.pictures != TASKS[self.of].pictures:
            raise UserError(
                f"{data.dir} has the labels {', '.join(data.labels)} of {data.pictures} pictures a statement, and the "
                f"model of task={self.of} tells {', '.join(names)}: pass data.dir=FOLDER of its own kind"
            )
        device = device_of(setting.trainer)
        task = TASKS[self.of](checkpoint.model.to(device), checkpoint.preprocessing, data={}, recipe=Recipe())
        task.eval()
        keys: list[str] = []
        labels: list[int] = []
        probabilities: list[list[float]] = []
        loader = data.eval_dataloader(setting.split)
        for batch in tqdm(loader, unit="batch", desc=self.of, disable=not setting.shows_progress):
            found = task.predict_step(task.transfer_batch_to_device(batch, torch.device(device), 0), 0)
            keys += found["keys"]
            labels += found["labels"]
            probabilities += found["probabilities"]
        guessed = torch.tensor(probabilities).argmax(dim=1)
        lines = [f"{key},{names[int(label)]}\n" for key, label in zip(keys, guessed, strict=True)]
        written = [write_text(setting.out_dir / "predictions.csv", "".join(lines))]
        metrics: dict[str, Any] = {"checkpoint": str(checkpoint.path), "split": setting.split, "statements": len(keys)}
        truth = torch.tensor(labels)
        known = truth >= 0
        print(f"\n{len(keys):,} statements, {setting.split}")
        if not known.any():
            print("their labels are kept back: nothing is scored")
        else:
            right = guessed == truth
            metrics |= _score(right[known], truth[known], guessed[known], names)
            if self.of == "nlvr2" and known.all():
                metrics["consistency"] = consistency(keys, right.tolist())
                print(f"consistency   {metrics['consistency']:7.2f}")
            written.append(_draw_confusion(truth[known], guessed[known], names, setting.out_dir))
        written.append(write_json(setting.out_dir / "metrics.json", metrics))
        for path in written:
            print(path)
        return metrics


def _score(right: torch.Tensor, truth: torch.Tensor, guessed: torch.Tensor, names: list[str]) -> dict[str, Any]:
    """Print and return the accuracy with its 95% bootstrap interval, that of every label, and the confusion matrix."""
    metrics: dict[str, Any] = {"accuracy": 100 * float(right.double().mean())}
    if len(right) > 1:
        interval = bootstrap_interval(100 * right.double().numpy())
        metrics["accuracy_interval"] = [interval.low, interval.high]
        print(f"accuracy      {interval.mean:7.2f} [{interval.low:.2f}, {interval.high:.2f}]")
    metrics["per_label"] = {
        name: 100 * float(right[truth == n].double().mean()) for n, name in enumerate(names) if (truth == n).any()
    }
    counts = MulticlassConfusionMatrix(len(names))(guessed, truth)
    metrics["confusion"] = {
        name: {guess: int(counts[n, m]) for m, guess in enumerate(names)} for n, name in enumerate(names)
    }
    width = max(14, *(len(name) + 2 for name in names))
    print("\nlabel (down), taken for (across)")
    show(" " * width + "".join(name.rjust(width) for name in names))
    for name, row in metrics["confusion"].items():
        show(f"{name:{width}}" + "".join(f"{count:{width},}" for count in row.values()))
    print()
    return metrics


def _draw_confusion(truth: torch.Tensor, guessed: torch.Tensor, names: list[str], out_dir: Path) -> Path:
    """The confusion matrix as a picture, in shares of each label."""
    metric = MulticlassConfusionMatrix(len(names), normalize="true")
    metric.update(guessed, truth)
    figure, axis = metric.plot(labels=names, cmap="Blues")  # type: ignore[arg-type]
    axis.set(xlabel="taken for", ylabel="label")  # type: ignore[union-attr]
    return save_figure(figure, out_dir / "figures" / "confusion.png")
