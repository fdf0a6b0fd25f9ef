"""Evaluation on pairs (Winoground, VALSE): does the right image or caption score higher than the wrong one?"""

from __future__ import annotations

from collections import defaultdict

import torch

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.prepared import LABELS
from vlabs.data.statements import StatementDataModule
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.statements import told_apart

CHANCE = {1: {"text": 50.0}, 2: {"text": 25.0, "image": 25.0, "group": 100 / 6}}  # by number of images per example


class PairsEvaluation(Evaluation):
    """Scores each image of an example with each caption: how often the right one scores higher, in percent."""

    name = "pairs"
    needs = ("texts", "ranks")
    reads = StatementDataModule

    @torch.inference_mode()
    def measure(self, checkpoint: Checkpoint, data: StatementDataModule, results: Results) -> None:
        """See `Evaluation`."""
        if tuple(data.labels) != LABELS["nlvr2"] or data.pictures != 1:
            raise UserError(f"{data.dir} does not hold pairs: make them with `vlabs prepare pairs`")
        model = checkpoint.model.to(results.device)
        examples: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
        pictures_of: dict[str, int] = {}
        for batch in results.batches(data.eval_dataloader(results.split)):
            output = model(batch.images, batch.input_ids, batch.attention_mask, batch.image_index[:, 0])
            scores = model.head.score(output.pooled_features).tolist()  # type: ignore[operator]
            for key, score in zip(batch.keys, scores, strict=True):
                name, count, picture, caption = key.rsplit("/", 3)
                pictures_of[name] = int(count)
                examples[name][int(picture), int(caption)] = score
        for name, table in examples.items():
            # Leave out incomplete examples: the preparation may have skipped an image or a caption (--on-bad skip).
            if len(table) == 2 * pictures_of[name]:
                by_place = {f"{picture}/{caption}": score for (picture, caption), score in table.items()}
                results.rows.append({"example": name, **told_apart(table), "scores": by_place})
        left_out = sorted(set(examples) - {row["example"] for row in results.rows})
        results.metrics |= {"examples": len(results.rows), "left_out": len(left_out)}
        if left_out:
            results.say(f"left out, because an image or a caption is missing: {', '.join(left_out[:20])}")
        results.say(f"{len(results.rows):,} examples, {results.split}")
        cells = []
        for pictures, chances in CHANCE.items():
            of_kind = [row for row in results.rows if ("group" in row) == (pictures == 2)]
            for name, chance in chances.items() if len(of_kind) > 1 else ():
                label = name if pictures == 2 else "caption"
                cells.append([label, results.mean(label, [100.0 * row[name] for row in of_kind]), f"{chance:.1f}"])
        results.table(["", "percent", "chance"], cells)
