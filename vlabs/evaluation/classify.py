"""Evaluation of classifiers: top-1 and top-5 accuracy, of both passes and per class."""

from __future__ import annotations

import torch

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.classes import ClassDataModule
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results

_WORST = 5


class ClassifyEvaluation(Evaluation):
    """Classifies all images of a split: accuracies in percent, and the classes with the lowest accuracy.

    Accuracies are those of the second pass, unless their name has `bottom_up`.
    """

    name = "classify"
    needs = ("classes",)
    reads = ClassDataModule

    @torch.inference_mode()
    def measure(self, checkpoint: Checkpoint, data: ClassDataModule, results: Results) -> None:
        """See `Evaluation`."""
        model, names = checkpoint.classifier.to(results.device), checkpoint.preprocessing.names
        for batch in results.batches(data.eval_dataloader(results.split)):
            logits, bottom_up, _ = model(batch.images, reconstruct=False)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            results.add(
                id=batch.image_ids,
                label=batch.labels,
                guess=best[:, 0],
                top1=best[:, 0] == batch.labels,
                top5=(best == batch.labels[:, None]).any(dim=1),
                bottom_up_top1=bottom_up.argmax(dim=1) == batch.labels,
            )
        found = results.frame
        results.metrics["images"] = len(found)
        results.say(f"{len(found):,} images of {len(names)} classes, {results.split}")
        results.means({name: 100 * found[name] for name in ("top1", "top5", "bottom_up_top1")})
        per_class = 100 * found.groupby("label")["top1"].mean()
        results.metrics["per_class"] = {names[n]: value for n, value in per_class.items()}
        wrong = found[~found["top1"]].groupby("label")["guess"].agg(lambda guesses: names[guesses.mode()[0]])
        results.table(
            ["worst classes", "top1", "most predicted instead"],
            [[names[n], f"{value:.2f}", wrong.get(n, "–")] for n, value in per_class.nsmallest(_WORST).items()],
        )
