"""Evaluation on pairs to be told apart (Winoground, VALSE): is what belongs together ranked above what does not?"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import torch
from tqdm import tqdm

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.prepared import LABELS
from vlabs.data.statements import StatementDataModule
from vlabs.errors import UserError, show
from vlabs.evaluation.base import Evaluation, Setting
from vlabs.metrics.bootstrap import bootstrap_interval
from vlabs.metrics.statements import told_apart
from vlabs.runs.trainer import device_of
from vlabs.utils.files import write_json, write_text

CHANCE = {1: {"text": 50.0}, 2: {"text": 25.0, "image": 25.0, "group": 100 / 6}}  # by pictures of an example


class PairsEvaluation(Evaluation):
    """Scores every picture of an example with every caption, and says how often each is told apart."""

    trained_for = ("retrieval", "pretrain")
    reads = StatementDataModule

    @torch.inference_mode()
    def run(self, checkpoint: Checkpoint, data: StatementDataModule, setting: Setting) -> dict[str, Any]:
        """See `Evaluation`; shares in percent."""
        if tuple(data.labels) != LABELS["nlvr2"] or data.pictures != 1:
            raise UserError(f"{data.dir} holds no pairs to be told apart: make them with `vlabs prepare pairs`")
        device = device_of(setting.trainer)
        model = checkpoint.model.to(device)
        scores: dict[str, float] = {}
        loader = data.eval_dataloader(setting.split)
        for batch in tqdm(loader, unit="batch", desc="pairs", disable=not setting.shows_progress):
            output = model(
                batch.images.to(device),
                batch.input_ids.to(device),
                batch.attention_mask.to(device),
                batch.image_index[:, 0].to(device),
            )
            ranked = model.head.score(output.pooled_features)  # type: ignore[operator]
            scores |= dict(zip(batch.keys, ranked.tolist(), strict=True))
        examples: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
        pictures_of: dict[str, int] = {}
        for key, score in scores.items():
            name, count, picture, caption = key.rsplit("/", 3)
            pictures_of[name] = int(count)
            examples[name][int(picture), int(caption)] = score
        # The preparation may have left a picture or a caption out (--on-bad skip), and with it what is to be compared.
        whole = [name for name, table in examples.items() if len(table) == 2 * pictures_of[name]]
        found = {name: told_apart(examples[name]) for name in whole}
        left_out = sorted(set(examples) - set(whole))
        metrics: dict[str, Any] = {"checkpoint": str(checkpoint.path), "split": setting.split}
        metrics |= {"examples": len(found), "left_out": len(left_out)}
        if left_out:
            show(f"left out, because something of them is missing: {', '.join(left_out[:20])}")
        print(f"\n{len(found):,} examples, {setting.split}; chance in brackets\n")
        for pictures, chances in CHANCE.items():
            of_kind = [measures for measures in found.values() if ("group" in measures) == (pictures == 2)]
            if len(of_kind) < 2:
                continue
            for name, chance in chances.items():
                label = name if pictures == 2 else "caption"
                interval = bootstrap_interval([100.0 * measures[name] for measures in of_kind])
                metrics[label] = interval.mean
                metrics[f"{label}_interval"] = [interval.low, interval.high]
                show(f"{label:8}{interval.mean:7.2f} [{interval.low:.2f}, {interval.high:.2f}] ({chance:.1f})")
        lines = (
            json.dumps({"example": name, **measures, "scores": {f"{p}/{c}": s for (p, c), s in examples[name].items()}})
            for name, measures in found.items()
        )
        print(write_text(setting.out_dir / "pairs.jsonl", "".join(f"{line}\n" for line in lines)))
        print(write_json(setting.out_dir / "metrics.json", metrics))
        return metrics
