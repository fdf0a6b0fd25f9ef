"""Evaluation of labeled statements: accuracy, the confusion matrix, NLVR2's consistency, and a file of predictions."""

from __future__ import annotations

from typing import Literal

import torch
from torchmetrics.utilities.plot import plot_confusion_matrix

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.statements import StatementDataModule
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.statements import consistency

PICTURES = {"snli_ve": 1, "nlvr2": 2}


class StatementEvaluation(Evaluation):
    """Predicts the labels of all statements of a split, and scores them in percent if the labels are public.

    Args:
        of: kind of statements: `snli_ve` about one image, or `nlvr2` about a pair.

    Raises:
        UserError: there is no such kind.
    """

    name = "statements"
    reads = StatementDataModule
    may_be_blind = True

    def __init__(self, of: Literal["snli_ve", "nlvr2"]) -> None:
        self.of = of
        self.needs = ("texts", "answers", "two images" if PICTURES[of] == 2 else "one image")  # type: ignore[misc]

    @torch.inference_mode()
    def measure(self, checkpoint: Checkpoint, data: StatementDataModule, results: Results) -> None:
        """See `Evaluation`."""
        names = list(checkpoint.preprocessing.names)
        if data.labels != names or data.pictures != PICTURES[self.of]:
            raise UserError(
                f"{data.dir} has the labels {', '.join(data.labels)} and {data.pictures} images per statement, but the "
                f"model of task={checkpoint.task} predicts {', '.join(names)}: pass data.dir=FOLDER of its own kind"
            )
        model = checkpoint.model.to(results.device)
        for batch in results.batches(data.eval_dataloader(results.split)):
            if not batch.keys:
                continue
            index = batch.image_index if data.pictures > 1 else batch.image_index[:, 0]
            logits = model(batch.images, batch.input_ids, batch.attention_mask, index).logits
            shares = model.head.probabilities(logits)  # type: ignore[operator]
            guesses = [names[n] for n in shares.argmax(dim=1).tolist()]
            labels = [names[n] if n >= 0 else None for n in batch.labels.tolist()]
            results.add(id=batch.keys, label=labels, guess=guesses, probabilities=shares)
        found = results.frame
        results.metrics["statements"] = len(found)
        results.say(f"{len(found):,} statements, {results.split}")
        results.text("predictions.csv", "".join(f"{row['id']},{row['guess']}\n" for row in results.rows))
        known = found[found["label"].notna()]
        if known.empty:
            results.say("the labels of this split are not public: nothing is scored")
            return
        right = known["label"] == known["guess"]
        accuracies = {"accuracy": results.mean("accuracy", 100 * right)}
        if self.of == "nlvr2" and len(known) == len(found):
            results.metrics["consistency"] = consistency(known["id"].tolist(), right.tolist())
            accuracies["consistency"] = f"{results.metrics['consistency']:.2f}"
        results.table(["", "percent"], accuracies.items())
        per_label = 100 * right.groupby(known["label"]).mean()
        results.metrics["per_label"] = {name: per_label[name] for name in names if name in per_label}
        counts = {name: known[known["label"] == name]["guess"].value_counts() for name in names}
        results.metrics["confusion"] = {
            name: {guess: int(row.get(guess, 0)) for guess in names} for name, row in counts.items()
        }
        rows = {name: list(row.values()) for name, row in results.metrics["confusion"].items()}
        results.table(["label (down), taken for (across)", *names], [[name, *row] for name, row in rows.items()])
        matrix = torch.tensor(list(rows.values()), dtype=torch.float64)
        shares = matrix / matrix.sum(dim=1, keepdim=True).clamp_min(1)
        figure, axis = plot_confusion_matrix(shares, labels=names, cmap="Blues")  # type: ignore[arg-type]
        axis.set(xlabel="taken for", ylabel="label")  # type: ignore[union-attr]
        results.figure("confusion", figure)
