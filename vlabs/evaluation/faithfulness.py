"""Evaluation of maps: does an answer change if what a map points at is taken away, and stay if only that is left?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.attention import Maps
from vlabs.attention.maps import look, look_by
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import ImageReader
from vlabs.data.instances import crop_mask
from vlabs.data.prepared import read_answers
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.grounding import all_texts, find_targets
from vlabs.evaluation.results import Results
from vlabs.evaluation.steering import Scores
from vlabs.metrics.grounding import pointing, rank_correlation, to_pixels
from vlabs.utils.options import Seed, Size

SHARES = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Shares of the patches, or words, that are taken away."""
RANDOM = "random"
WORDS = "words by relevance", "words at random"


class FaithfulnessEvaluation(Evaluation):
    """Takes patches away, by each map and in random order, and answers the question each time.

    `deletion` takes the largest values of the map away first: a faithful map has a small area under the accuracy.
    `insertion` takes the smallest away first, so that what the map points at stays: a faithful map has a large one.
    `gap` is the second less the first, in points; a random order has 0. Patches that are taken away have the mean
    color. Words are taken away alike, by the map `relevance`.

    Args:
        maps: maps that are measured.
        num_texts: questions that are measured, evenly spread; None for all.
        instances: COCO's instances; without them, the regions that the data were prepared with, if any.
        batch_size: images per batch.
        seed: of the random order, which also decides between equal values.

    Raises:
        UserError: a map that there is not.
    """

    name = "faithfulness"
    needs = ("texts", "one image", "answers")
    reads = VQADataModule

    def __init__(
        self,
        maps: Maps,
        num_texts: Size | None = 200,
        instances: str | None = None,
        batch_size: Size = 64,
        seed: Seed = 0,
    ) -> None:
        self.maps = list(maps)
        self.num_texts, self.instances, self.batch_size, self.seed = num_texts, instances, batch_size, seed

    def measure(self, checkpoint: Checkpoint, data: VQADataModule, results: Results) -> None:
        """See `Evaluation`.

        The metrics are `MAP/deletion`, `MAP/insertion` and `MAP/gap`, in percent, also for `random` and the words;
        where the regions are known, `MAP/right_pointed` and so on; and `agreement/MAP/MAP`, rank correlations.

        Raises:
            UserError: the answers are kept back.
        """
        rows = data.rows(results.split)
        if not any(answers for row in rows.select_columns(["answers"]) for answers in row["answers"]):
            raise UserError(
                f"{data.dir}, split {results.split}: the answers are kept back, so nothing is right or wrong"
            )
        targets = find_targets(rows, data.dir, self.instances, self.num_texts)
        if targets is None:
            asked = all_texts(rows, self.num_texts)
        else:
            asked, rows = targets.asked, targets.rows
        if "rollout" in self.maps and len(self.maps) > 1 and not checkpoint.model.vision.backbone.is_even:
            results.say("rollout is left out: it needs an encoder whose blocks all have the same tokens")
            self.maps.remove("rollout")
        preprocessing = checkpoint.preprocessing
        model = checkpoint.model.to(results.device).eval()
        scores = Scores(rows, read_answers(data.dir))
        reader = ImageReader(rows, preprocessing)
        draw = np.random.default_rng(self.seed)
        for item in results.each(asked):
            _, image = reader.read(item.row, 0)
            assert image is not None
            ids, mask = preprocessing.pad(preprocessing.token_ids([item.text]))
            _, found = look(model, image, ids, mask, self.maps)
            maps = {name: one[0].numpy() for name, one in found.items()}
            count = maps[self.maps[0]].size
            orders = {name: ordered(values.ravel(), draw) for name, values in maps.items()}
            orders[RANDOM] = draw.permutation(count)
            images = torch.cat([_without(image, taken, model.vision.grid_size) for taken in taken_by(orders, count)])

            words = preprocessing.words(item.text)
            counted = look_by(model, image, ids, mask, "relevance").words
            assert counted is not None
            by_word = np.array([counted[0][places].sum() for _, places in words])
            word_orders = {WORDS[0]: ordered(by_word, draw), WORDS[1]: draw.permutation(len(words))}
            masks = torch.cat([_silenced(mask, words, taken) for taken in taken_by(word_orders, len(words))])

            answers = self._answers(checkpoint, images, ids.expand(len(images), -1), mask.expand(len(images), -1))
            answers += self._answers(
                checkpoint, image.expand(len(masks), -1, -1, -1), ids.expand(len(masks), -1), masks
            )
            right = [scores.of(item, answer) for answer in answers]
            row = {"id": item.text_id, "text": item.text, "right": right[0]}
            curves = np.array(right).reshape(-1, 2, len(SHARES))
            row |= {name: areas(*both) for name, both in zip([*orders, *word_orders], curves, strict=True)}
            row["agreement"] = agreement(maps)
            if targets is not None:
                seen = crop_mask(targets.region(item), preprocessing.image_size, preprocessing.crop_mode)
                if seen.any():
                    row["pointed"] = {
                        name: bool(pointing(to_pixels(values, preprocessing.image_size), seen) > 0.5)
                        for name, values in maps.items()
                    }
            results.rows.append(row)
        mean = np.mean([row["right"] for row in results.rows]) if results.rows else 0.0
        said = (
            f"{len(results.rows)} questions, {mean:.1f}% right with nothing taken away\n"
            "area under the accuracy, in percent, while patches or words are taken away"
        )
        report(results, self.maps, [RANDOM, *WORDS], said)

    def _answers(self, checkpoint: Checkpoint, images: Tensor, ids: Tensor, masks: Tensor) -> list[str]:
        """The best answers for images (n, 3, H, W) and texts (n, T)."""
        model, names = checkpoint.model, checkpoint.preprocessing.names
        weight = next(model.parameters())
        found: list[str] = []
        with torch.inference_mode():
            for part in torch.arange(len(images)).split(self.batch_size):
                given = images[part].to(weight), ids[part].to(weight.device), masks[part].to(weight.device)
                found += [names[n] for n in model(*given).logits.argmax(dim=1).tolist()]
        return found


def report(results: Results, maps: Sequence[str], others: Sequence[str], said: str) -> None:
    """Add the means of the rows by map to the results, and where the maps point if it is known.

    Args:
        results: with rows of `areas`, `agreement` and, where they are known, `right` and `pointed`.
        maps: the maps that were measured.
        others: the other orders that were measured.
        said: what the areas are of, in percent.
    """
    found = results.frame
    if len(found) < 2:
        raise UserError(f"split {results.split}: fewer than two questions to measure")
    results.metrics["texts"] = len(found)
    results.say(
        f"{said}: deletion the most important "
        "first (lower is better), insertion the least important first (higher is better), and the gap between them"
    )
    measures = ("deletion", "insertion", "gap")
    results.table(
        ["map", *measures],
        [
            [name, *(results.mean(f"{name}/{one}", found[f"{name}/{one}"], 1) for one in measures)]
            for name in [*maps, *others]
        ],
    )
    if f"pointed/{maps[0]}" in found:
        results.say("of all questions: answered right or wrong, and pointed at what they are about or not")
        rows = []
        known = found.dropna(subset=[f"pointed/{maps[0]}"])
        right = known["right"] >= 50
        for name in maps:
            pointed = known[f"pointed/{name}"].astype(bool)
            cells = {
                "right_pointed": right & pointed, "right_elsewhere": right & ~pointed,
                "wrong_pointed": ~right & pointed, "wrong_elsewhere": ~right & ~pointed,
            }  # fmt: skip
            rows.append([name, *(results.mean(f"{name}/{of}", 100.0 * one, 1) for of, one in cells.items())])
        results.table(["map", *(of.replace("_", ", ") for of in cells)], rows)
    if len(maps) > 1:
        results.say("agreement of maps: rank correlation over patches, mean over questions")
        of = {name: {name: "1"} for name in maps}
        for one, other in combinations(maps, 2):
            mean = found[f"agreement/{one}/{other}"].mean()
            results.metrics[f"agreement/{one}/{other}"] = mean
            of[one][other] = of[other][one] = f"{mean:.2f}"
        results.table(["", *maps], [[name, *(of[name][other] for other in maps)] for name in maps])


def areas(deletion: Sequence[float], insertion: Sequence[float]) -> dict[str, float]:
    """The areas under two curves over `SHARES`, and their difference."""
    below, above = (float(np.trapezoid(one, SHARES) / SHARES[-1]) for one in (deletion, insertion))
    return {"deletion": below, "insertion": above, "gap": above - below}


def agreement(maps: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Rank correlations over patches of every two maps (rows, columns)."""
    return {f"{one}/{other}": float(rank_correlation(maps[one], maps[other])) for one, other in combinations(maps, 2)}


def ordered(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Places from the largest value to the smallest; equal ones in random order."""
    shuffled = draw.permutation(len(values))
    ordered: np.ndarray = shuffled[np.argsort(-values[shuffled], kind="stable")]
    return ordered


def taken_by(orders: dict[str, np.ndarray], count: int) -> list[np.ndarray]:
    """For each order, first from its begin and then from its end, the places that each of `SHARES` takes away."""
    numbers = [round(share * count) for share in SHARES]
    return [way[:number] for order in orders.values() for way in (order, order[::-1]) for number in numbers]


def _without(image: Tensor, taken: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """An image (1, 3, H, W), normalized, with the mean color instead of some patches."""
    kept = torch.ones(grid[0] * grid[1])
    kept[torch.from_numpy(taken.copy())] = 0
    return image * F.interpolate(kept.view(1, 1, *grid), image.shape[2:], mode="nearest")


def _silenced(mask: Tensor, words: Sequence[tuple[str, list[int]]], taken: np.ndarray) -> Tensor:
    """An attention mask (1, T) without the tokens of some words."""
    silenced = mask.clone()
    for word in taken.tolist():
        silenced[:, words[word][1]] = 0
    return silenced
