"""Evaluation of classifiers: top-1 and top-5 accuracy of both passes, and every class."""

from __future__ import annotations

from typing import Any

import torch
from tqdm import tqdm

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.classes import ClassDataModule
from vlabs.errors import show
from vlabs.evaluation.base import Evaluation, Setting
from vlabs.metrics.bootstrap import bootstrap_interval
from vlabs.runs.trainer import device_of
from vlabs.utils.files import write_json

_WORST = 5


class ClassifyEvaluation(Evaluation):
    """Classifies every picture of a split; prints the accuracies and the classes that are told apart worst."""

    trained_for = ("classify",)
    reads = ClassDataModule

    @torch.inference_mode()
    def run(self, checkpoint: Checkpoint, data: ClassDataModule, setting: Setting) -> dict[str, Any]:
        """See `Evaluation`; accuracies in percent, of the second pass unless they say `bottom_up`."""
        device = device_of(setting.trainer)
        model = checkpoint.classifier.to(device)
        right: dict[str, list[torch.Tensor]] = {"top1": [], "top5": [], "bottom_up_top1": []}
        labels, guessed = [], []
        loader = data.eval_dataloader(setting.split)
        for batch in tqdm(loader, unit="batch", desc="classify", disable=not setting.shows_progress):
            logits, bottom_up, _ = model(batch.images.to(device), reconstruct=False)
            of = batch.labels.to(device)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices
            right["top1"].append((best[:, 0] == of).cpu())
            right["top5"].append((best == of[:, None]).any(dim=1).cpu())
            right["bottom_up_top1"].append((bottom_up.argmax(dim=1) == of).cpu())
            labels.append(batch.labels)
            guessed.append(best[:, 0].cpu())
        found = {name: torch.cat(parts).double() for name, parts in right.items()}
        label = torch.cat(labels)
        names = checkpoint.preprocessing.names
        metrics: dict[str, Any] = {"checkpoint": str(checkpoint.path), "split": setting.split, "images": len(label)}
        print(f"\n{len(label):,} images of {len(names)} classes, {setting.split}\n")
        for name, values in found.items():
            interval = bootstrap_interval(100 * values.numpy())
            metrics[name] = interval.mean
            metrics[f"{name}_interval"] = [interval.low, interval.high]
            show(f"{name.replace('_', ' '):18}{interval.mean:7.2f} [{interval.low:.2f}, {interval.high:.2f}]")
        per_class = {
            names[n]: 100 * float(found["top1"][label == n].mean()) for n in range(len(names)) if (label == n).any()
        }
        metrics["per_class"] = per_class
        guess = torch.cat(guessed)
        print("\nclasses that are told apart worst, and what they are taken for")
        for name in sorted(per_class, key=per_class.__getitem__)[:_WORST]:
            wrong = guess[(label == names.index(name)) & (guess != label)]
            taken = f" (for {names[int(wrong.mode().values)]})" if len(wrong) else ""
            show(f"  {name:24}{per_class[name]:7.2f}{taken}")
        print(write_json(setting.out_dir / "metrics.json", metrics))
        return metrics
