"""Evaluation of robustness: corruptions, other images of the same classes, and attacks (paper, section 6.3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.classes import ClassDataModule, ClassDataset
from vlabs.data.corruptions import CorruptedDataset, library
from vlabs.data.embedded import raw_classes
from vlabs.data.loading import eval_loader
from vlabs.data.pictures import ImageSampler
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.robustness import CORRUPTIONS, SEVERITIES, fgsm, mean_corruption_error, pgd
from vlabs.utils.options import Distinct, Seed, Severity, Size, Some

# Names in metrics.json that no set may have.
_TAKEN = (
    "checkpoint", "split", "images", "clean", "corrupted", "corruptions", "corruptions_by", "mce", "fgsm", "pgd",
    "keep",
)  # fmt: skip
ATTACKS: tuple[Literal["fgsm", "pgd"], ...] = ("fgsm", "pgd")


class RobustnessEvaluation(Evaluation):
    """Top-1 accuracy of the second pass: clean, corrupted, on other images, and attacked.

    Args:
        corruptions: corruptions to measure: `all`, or some of the fifteen of ImageNet-C.
        severities: severities of the corruptions.
        imagenet_c: ImageNet-C's folder; None to corrupt the split's images on the fly.
        sets: other images by name, which no other metric has: folders or .tar files of class folders; predictions are
            limited to the classes of a set, as for ImageNet-A and -R.
        attacks: attacks to measure.
        num_images: number of images of the split, and of each folder of ImageNet-C, evenly spread; None for all.
        seed: seed of corruptions and of random starts of attacks.

    Raises:
        UserError: an option is out of range.
    """

    name = "robustness"
    needs = ("classes",)
    reads = ClassDataModule

    def __init__(
        self,
        corruptions: str | Distinct[str] = "all",
        severities: Some[Severity] = SEVERITIES,
        imagenet_c: str | None = None,
        sets: Mapping[str, str] | None = None,
        attacks: Distinct[Literal["fgsm", "pgd"]] = ATTACKS,
        num_images: Size | None = None,
        seed: Seed = 0,
    ) -> None:
        self.corruptions = list(CORRUPTIONS) if corruptions == "all" else list(corruptions)
        if wrong := [name for name in self.corruptions if name not in CORRUPTIONS]:
            raise UserError(f"task.corruptions names {wrong[0]}: choose of {', '.join(CORRUPTIONS)}")
        self.severities = list(severities)
        self.imagenet_c = None if imagenet_c is None else Path(imagenet_c)
        if self.corruptions and imagenet_c is None:
            library()  # so that a missing library is reported before anything is loaded
        self.sets = dict(sets or {})
        if taken := [name for name in self.sets if name in _TAKEN or name.endswith("_interval")]:
            raise UserError(f"task.sets.{taken[0]}: a metric has this name: give the set another one")
        self.attacks = list(attacks)
        self.num_images = num_images
        self.seed = seed

    def measure(self, checkpoint: Checkpoint, data: ClassDataModule, results: Results) -> None:
        """See `Evaluation`; accuracies in percent."""
        device = results.device
        model = checkpoint.classifier.to(device)
        preprocessing, options = checkpoint.preprocessing, data
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
        rows = data.rows(results.split)
        rows = self._spread(rows)
        generator = torch.Generator().manual_seed(self.seed)
        attacks: dict[str, Callable[..., Tensor]] = {"fgsm": fgsm, "pgd": partial(pgd, generator=generator)}
        progress = results.each(unit="batch")

        def logits_of(pixels: Tensor) -> Tensor:
            logits: Tensor = model((pixels - mean) / std, reconstruct=False)[0]
            return logits

        def right(dataset: ClassDataset, attack: str | None = None) -> np.ndarray:
            """100 for each image that is classified right, else 0; for another set, among its classes only."""
            size = options.eval_batch_size or options.batch_size
            mask = torch.ones(len(preprocessing.names), dtype=torch.bool)
            if dataset.rows is not rows:
                mask = torch.zeros_like(mask)
                mask[sorted(set(dataset.rows["label"]))] = True
            found = []
            for batch in eval_loader(dataset, ImageSampler(len(dataset.rows), size, False, self.seed), options):
                labels = batch.labels.to(device)
                pixels = batch.images.to(device) * std + mean
                if attack is not None:
                    pixels = attacks[attack](logits_of, pixels, labels)
                with torch.no_grad():
                    logits = logits_of(pixels).masked_fill(~mask.to(device), float("-inf"))
                found.append(100.0 * (logits.argmax(dim=1) == labels).cpu().numpy())
                progress.update()
            return np.concatenate(found) if found else np.zeros(1)

        clean = ClassDataset(rows, preprocessing, None, self.seed, options.on_bad)
        metrics = results.metrics
        metrics["images"] = len(rows)
        table = [["clean", results.mean("clean", right(clean))]]
        corrupted = {
            name: {
                severity: float(right(self._corrupted(name, severity, rows, checkpoint, options.on_bad)).mean())
                for severity in self.severities
            }
            for name in self.corruptions
        }
        if corrupted:
            by = "imagenet-c" if self.imagenet_c is not None else "imagecorruptions, on the fly"
            metrics["corruptions"] = {name: {str(k): v for k, v in found.items()} for name, found in corrupted.items()}
            metrics["corrupted"] = float(np.mean([list(found.values()) for found in corrupted.values()]))
            metrics["corruptions_by"] = by
            table.append(["corrupted, mean", f"{metrics['corrupted']:.2f}"])
        whole = len(corrupted) == len(CORRUPTIONS) and len(self.severities) == len(SEVERITIES)
        if self.imagenet_c is not None and whole:
            errors = {name: {k: 1 - v / 100 for k, v in found.items()} for name, found in corrupted.items()}
            metrics["mce"] = mean_corruption_error(errors)
            table.append(["mCE (lower is better)", f"{metrics['mce']:.2f}"])
        for name, path in self.sets.items():
            others = ClassDataset(raw_classes(path, preprocessing.names), preprocessing)
            table.append([name, results.mean(name, right(others))])
        table += [[attack.upper(), results.mean(attack, right(clean, attack))] for attack in self.attacks]
        progress.close()
        results.say(f"{len(rows):,} images, {results.split}; top-1 in percent")
        results.table(["", "percent"], table)
        if corrupted:
            results.say(f"Corruptions: {metrics['corruptions_by']}.")
            cells = [[name, *(f"{value:.1f}" for value in found.values())] for name, found in corrupted.items()]
            results.table(["severity", *self.severities], cells)
            results.figure("severities", _figure(metrics, corrupted))

    def _spread(self, rows: datasets.Dataset) -> datasets.Dataset:
        """`num_images` of some images, evenly spread."""
        if self.num_images is None or self.num_images >= len(rows):
            return rows
        return rows.select(np.linspace(0, len(rows) - 1, num=self.num_images, dtype=int))

    def _corrupted(
        self, name: str, severity: int, rows: datasets.Dataset, checkpoint: Checkpoint, on_bad: str
    ) -> ClassDataset:
        if self.imagenet_c is None:
            return CorruptedDataset(rows, checkpoint.preprocessing, name, severity, self.seed, on_bad)
        folder = self.imagenet_c / name / str(severity)
        if not folder.is_dir():
            raise UserError(
                f"task.imagenet_c={self.imagenet_c} has no {name}/{severity}: unpack all of ImageNet-C there"
            )
        found = self._spread(raw_classes(folder, checkpoint.preprocessing.names))
        return ClassDataset(found, checkpoint.preprocessing)


def _figure(metrics: dict[str, Any], corrupted: dict[str, dict[int, float]]) -> Figure:
    """Figure of accuracy against severity: one line per corruption, and their mean."""
    figure = Figure(figsize=(7, 4.5), dpi=120)
    axes = figure.subplots()
    for name, found in corrupted.items():
        axes.plot(
            [0, *found], [metrics["clean"], *found.values()], linewidth=1, alpha=0.6, label=name.replace("_", " ")
        )
    severities = list(next(iter(corrupted.values())))
    mean = [float(np.mean([found[k] for found in corrupted.values()])) for k in severities]
    axes.plot([0, *severities], [metrics["clean"], *mean], color="black", linewidth=2.5, label="mean")
    axes.set(xlabel="severity (0: clean)", ylabel="top-1, percent", xticks=[0, *severities], ylim=(0, 100))
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure
