"""Evaluation of steering: do maps and answers follow ξ if it is another question's, weaker or stronger?

The prior of another question about the same image differs mainly in where it points. If the map follows ξ to the other
object, the encoder is steered. If the answer stays right, the feedback is not used, or the fusion corrects it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlabs.attention.maps import attention_map
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import ImageReader
from vlabs.data.instances import crop_mask
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.grounding import Targets, find_targets
from vlabs.evaluation.judging import Asked, Scores
from vlabs.evaluation.results import Results
from vlabs.metrics.grounding import energy_inside, to_pixels
from vlabs.utils.options import Distinct, Size, Strength

MAPS = ("weights", "norm", "fusion")
"""The maps that are measured."""
OWN, OTHER = "own", "other"


class SteeringEvaluation(Evaluation):
    """Answers questions under their own ξ and under that of another question about the same image.

    Only pairs of questions about different parts of an image count.

    Args:
        alphas: strengths of the top-down signal, besides the trained one, if the variant has one.
        num_texts: number of questions to measure, evenly spread; None for all.
        instances: COCO's instances; None for the regions in the prepared data.

    Raises:
        UserError: an option is out of range.
    """

    name = "steering"
    needs = ("texts", "one image", "answers", "one prior")
    reads = VQADataModule

    def __init__(self, alphas: Distinct[Strength], num_texts: Size | None = None, instances: str | None = None) -> None:
        self.alphas = list(alphas)
        self.num_texts = num_texts
        self.instances = instances

    def measure(self, checkpoint: Checkpoint, data: VQADataModule, results: Results) -> None:
        """See `Evaluation`.

        Metrics, in percent, for `α=A/own` and `α=A/other`: `accuracy`, the official one; `answers_other`, how often the
        answer is that of the partner, over pairs of the same type with different answers; and for each map its energy
        on the question's own object and on its partner's, `MAP/own` and `MAP/other`.

        Raises:
            UserError: the questions have no regions, no public answers, or no partners.
        """
        rows = data.rows(results.split)
        where = f"{data.dir}, split {results.split}"
        targets = find_targets(rows, data.dir, self.instances, None)
        if targets is None:
            raise UserError(f"task=steering needs questions with regions: {where} has none")
        if not any(answers for row in rows.select_columns(["answers"]) for answers in row["answers"]):
            raise UserError(f"{where}: the answers are not public, so they cannot be scored")
        images = _pairs(targets, checkpoint.preprocessing, self.num_texts)
        questions = sum(len(pairs) for pairs in images)
        if questions < 2:
            raise UserError(f"{where}: no image has two questions about different parts of it")
        trained = getattr(checkpoint.model.vision.topdown, "alpha", None)
        most = getattr(checkpoint.model.vision.topdown, "most_alpha", math.inf)
        others = [float(alpha) for alpha in self.alphas if alpha != trained and alpha <= most]
        strengths = [trained, *others] if trained is not None else [None]
        if max([0.0, *self.alphas]) > most:
            results.say(f"α above {most:g} left out: this variant mixes by α")
        rated = Scores(rows)
        progress = results.each(total=len(strengths) * questions)
        for alpha in strengths:
            strength = "as trained" if alpha is None else f"α={alpha:g}"
            for pairs in images:
                results.rows += [{"strength": strength, **row} for row in _measure(checkpoint, rated, pairs, alpha)]
                progress.update(len(pairs))
        progress.close()
        results.metrics["questions"] = questions
        results.say(
            f"{questions} questions, under their own ξ and that of a question about another part of the same image; "
            "for each map, the energy on the own and on the other part"
        )
        columns = ["accuracy", "answers_other", *[f"{name}/{whom}" for name in MAPS for whom in (OWN, OTHER)]]
        results.table(
            ["strength", "ξ", *columns],
            [
                [strength, whose, *(results.mean(f"{strength}/{whose}/{one}", of[one].dropna(), 1) for one in columns)]
                for (strength, whose), of in results.frame.groupby(["strength", "xi"], sort=False)
            ],
        )


class _Pair:
    """A question, its partner about another part of the same image, and masks of both parts in the model's input."""

    def __init__(self, own: Asked, other: Asked, own_mask: np.ndarray, other_mask: np.ndarray) -> None:
        self.own, self.other, self.masks = own, other, {OWN: own_mask, OTHER: other_mask}


def _answers_differ(scores: Scores, pair: _Pair) -> bool:
    """Whether both questions have the same type, so that an answer would fit both, but different answers."""
    row = scores.rows[pair.own.row]
    own, other = pair.own.position, pair.other.position
    common = [max(answers, key=answers.count) if answers else "" for answers in row["answers"]]
    return bool(row["question_type"][own] == row["question_type"][other] and common[own] != common[other])


def _pairs(targets: Targets, preprocessing: Preprocessing, count: int | None) -> list[list[_Pair]]:
    """The questions of each image, each with a partner about another part of the image.

    The partner is the next question of the same type, counted in a circle, else the next question of any type.
    """
    images = []
    all_kinds = targets.rows.select_columns(["question_type"])
    for _, of_image in groupby(targets.asked, key=lambda item: item.row):
        asked = list(of_image)
        masks = [crop_mask(targets.region(item), preprocessing.image_size, preprocessing.crop_mode) for item in asked]
        kinds = all_kinds[asked[0].row]["question_type"]
        pairs = []
        for n, item in enumerate(asked):
            others = [
                other
                for other in [*range(n + 1, len(asked)), *range(n)]
                if masks[n].any() and masks[other].any() and not (masks[n] & masks[other]).any()
            ]
            same_kind = [other for other in others if kinds[asked[other].position] == kinds[item.position]]
            for other in (same_kind or others)[:1]:
                pairs.append(_Pair(item, asked[other], masks[n], masks[other]))
        if pairs:
            images.append(pairs)
    total = sum(map(len, images))
    if count is None or count >= total:
        return images
    share = count / total  # keep all pairs of an image, and spread the images evenly
    return [images[n] for n in np.linspace(0, len(images) - 1, num=max(1, round(share * len(images))), dtype=int)]


@torch.no_grad()
def _measure(
    checkpoint: Checkpoint, scores: Scores, pairs: list[_Pair], alpha: float | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row for each pair of one image and each of the two ξ, in percent; α as in `AbSViT.attend`."""
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    _, image = ImageReader(scores.rows, preprocessing).read(pairs[0].own.row, 0)
    assert image is not None
    # Both texts of each pair: the first half are the questions, the second half their partners.
    texts = [pair.own.text for pair in pairs] + [pair.other.text for pair in pairs]
    input_ids, attention_mask = preprocessing.pad(preprocessing.token_ids(texts))
    n = len(pairs)
    bottom_up = model.vision.encode(image)
    states = model.text(input_ids, attention_mask)
    prior = model.prior_of(states, input_ids, attention_mask)
    index = torch.zeros(n, dtype=torch.int64)
    for whose, part in ((OWN, slice(0, n)), (OTHER, slice(n, None))):
        given: Tensor | None = None if prior is None else prior[part]
        output = model.join(bottom_up, given, states[:n], attention_mask[:n], index, read_image=True, alpha=alpha)
        best = output.logits.argmax(dim=1).tolist()
        maps = {name: attention_map(output, model.vision, name).numpy() for name in MAPS}
        for k, pair in enumerate(pairs):
            answer = preprocessing.names[best[k]]
            own, other = scores.of(pair.own, answer), scores.of(pair.other, answer)
            row: dict[str, Any] = {"id": pair.own.text_id, "xi": whose, "accuracy": own}
            row["answers_other"] = 100.0 * (other > own) if _answers_differ(scores, pair) else None
            for name in MAPS:
                pixels = to_pixels(maps[name][k], preprocessing.image_size)
                row |= {f"{name}/{whom}": 100 * float(energy_inside(pixels, mask)) for whom, mask in pair.masks.items()}
            yield row
