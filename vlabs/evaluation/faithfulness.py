"""Evaluation of maps: does what a model says change if what a map points at is taken away, and stay if only that is
left?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.attention import Maps
from vlabs.attention.classes import class_maps
from vlabs.attention.maps import look_and_read, some_maps_of, words_missed
from vlabs.checkpoints.abilities import Ability
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.classes import ClassDataModule
from vlabs.data.images import ImageReader
from vlabs.data.instances import crop_mask
from vlabs.data.module import PreparedDataModule
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.grounding import all_texts, find_targets, spread
from vlabs.evaluation.judging import Asked, Judge, judge_of
from vlabs.evaluation.results import Results
from vlabs.metrics.grounding import pointing, rank_correlation, to_pixels
from vlabs.models.absvit import AbSViTClassifier
from vlabs.models.vlm import VisionLanguageModel
from vlabs.utils.options import Seed, Size

SHARES = (0.0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95)
"""Shares of the patches, or words, that are taken away."""
RANDOM = "random"
LEFT_OUT, BY_RELEVANCE, AT_RANDOM = "words by leaving one out", "words by relevance", "words at random"
WORDS = LEFT_OUT, BY_RELEVANCE, AT_RANDOM


def _says(network: nn.Module) -> bool:
    is_vlm = isinstance(network, VisionLanguageModel)
    return isinstance(network, AbSViTClassifier) or (
        is_vlm and (hasattr(network.head, "probabilities") or hasattr(network.head, "score"))
    )


Scored = Callable[[list[np.ndarray]], list[float]]
"""From the patches, or words, that are taken away from each copy of a sample, how right the copies are, in percent."""


class Sample(NamedTuple):
    """Something that a model says of images, to take parts of them away.

    Attributes:
        id, text: of the results.
        maps: by name, (p, rows, columns), over its p images.
        scored: without patches, which are numbered as in a flat map.
        words: how much each word counts, (words,), by the name of the measure, and the scores without words; None
            without words.
        region: (H, W) bool, what the text is about, over what the model sees; None where it is unknown.
    """

    id: int | str
    text: str
    maps: Mapping[str, np.ndarray]
    scored: Scored
    words: tuple[Mapping[str, np.ndarray], Scored] | None = None
    region: np.ndarray | None = None


class FaithfulnessEvaluation(Evaluation):
    """Takes patches away, by each map and in random order, and asks the model each time.

    What is right is the official accuracy of an answer, the label of a statement, the class of an image, or for a model
    that ranks, whether a caption scores higher with its image than with 15 other, whole images.

    `deletion` takes the largest values of the map away first: a faithful map has a small area under the accuracy.
    `insertion` takes the smallest away first, so that what the map points at stays: a faithful map has a large one.
    `gap` is the second less the first, in points; a random order has 0. Patches that are taken away have the mean
    color; those of two images are ordered together. Words are taken away alike, by the map `relevance`.

    Args:
        maps: maps that are measured; those that the model does not have are left out.
        num_texts: questions, captions, statements or images that are measured, evenly spread; None for all.
        instances: COCO's instances; without them, the regions that the data were prepared with, if any.
        batch_size: images per batch.
        seed: of the random order, which also decides between equal values.

    Raises:
        UserError: a map that there is not.
    """

    name = "faithfulness"
    needs = (Ability(_says, "neither answers, labels, ranks nor classifies"),)
    reads = PreparedDataModule

    def __init__(
        self,
        maps: Maps,
        num_texts: Size | None = 200,
        instances: str | None = None,
        batch_size: Size = 64,
        seed: Seed = 0,
    ) -> None:
        self.maps: list[str] = list(maps)
        self.num_texts, self.instances, self.batch_size, self.seed = num_texts, instances, batch_size, seed

    def measure(self, checkpoint: Checkpoint, data: PreparedDataModule, results: Results) -> None:
        """See `Evaluation`.

        The metrics are `MAP/deletion`, `MAP/insertion` and `MAP/gap`, in percent, also for `random` and the words;
        where the regions are known, `MAP/right_pointed` and so on; and `agreement/MAP/MAP`, rank correlations.

        Raises:
            UserError: the data are of another kind than the model, what is right is kept back, or the model has none of
                the maps.
        """
        network: Any = checkpoint.network.to(results.device).eval()
        self.maps, left_out = some_maps_of(network, self.maps)
        for line in left_out:
            results.say(line)
        rows = data.rows(results.split)
        if isinstance(network, AbSViTClassifier):
            samples, unit = self._of_images(network, checkpoint, data, rows, results), "images"
            others = [RANDOM]
        else:
            judge = judge_of(checkpoint, data, rows, results.split)
            samples, unit = self._of_texts(checkpoint, data, rows, judge, results), judge.unit
            others = [RANDOM, *WORDS]
        take_away(results, samples, self.seed)
        mean = np.mean([row["right"] for row in results.rows]) if results.rows else 0.0
        said = (
            f"{len(results.rows)} {unit}, {mean:.1f}% right with nothing taken away\n"
            f"area under the accuracy, in percent, while patches{' or words' * (len(others) > 1)} are taken away"
        )
        report(results, self.maps, others, said)

    def _of_texts(
        self, checkpoint: Checkpoint, data: PreparedDataModule, rows: datasets.Dataset, judge: Judge, results: Results
    ) -> Iterator[Sample]:
        model, preprocessing = checkpoint.model, checkpoint.preprocessing
        targets = find_targets(rows, data.dir, self.instances, self.num_texts)
        asked = all_texts(rows, self.num_texts, pairs=True) if targets is None else targets.asked
        rows = rows if targets is None else targets.rows
        pictures = getattr(data, "pictures", 1)
        reader = ImageReader(rows, preprocessing, pictures=pictures)
        for item in results.each(asked):
            images = torch.cat([reader.read(item.row, 0, place)[1] for place in range(pictures)])
            ids, mask = preprocessing.pad(preprocessing.token_ids([item.text]))
            _, found, counted = look_and_read(model, images, ids, mask, list(dict.fromkeys([*self.maps, "relevance"])))
            assert counted is not None
            words = preprocessing.words(item.text)
            yield Sample(
                item.text_id,
                item.text,
                {name: found[name].numpy() for name in self.maps},
                partial(self._without_patches, model, judge, item, images, ids, mask),
                (
                    {
                        LEFT_OUT: words_missed(model, images, ids, mask, [places for _, places in words]),
                        BY_RELEVANCE: np.array([counted[0][places].sum() for _, places in words]),
                    },
                    partial(self._without_words, model, judge, item, images, ids, mask, words),
                ),
                None if targets is None else crop_mask(
                    targets.region(item), preprocessing.image_size, preprocessing.crop_mode
                ),
            )  # fmt: skip

    def _of_images(
        self,
        model: AbSViTClassifier,
        checkpoint: Checkpoint,
        data: PreparedDataModule,
        rows: datasets.Dataset,
        results: Results,
    ) -> Iterator[Sample]:
        if not isinstance(data, ClassDataModule):
            raise UserError(f"{data.dir} holds {data.holds}, but {checkpoint.path} classifies {ClassDataModule.holds}")
        reader, names = ImageReader(rows, checkpoint.preprocessing), checkpoint.preprocessing.names
        asked = spread([Asked(n, 0, one["image_id"], names[one["label"]], []) for n, one in
                        enumerate(rows.select_columns(["image_id", "label"]))], self.num_texts)  # fmt: skip
        for item in results.each(asked, "image"):
            image = reader.read(item.row, 0)[1]
            _, found = class_maps(model, image, self.maps)

            def scored(taken: list[np.ndarray], image: Tensor = image, name: str = item.text) -> list[float]:
                best = [
                    model(part.to(results.device), reconstruct=False)[0].argmax(dim=1)
                    for part in without_patches(image, taken, model.encoder.grid_size).split(self.batch_size)
                ]
                return [100.0 * (names[n] == name) for n in torch.cat(best).tolist()]

            yield Sample(item.text_id, item.text, {name: one.numpy() for name, one in found.items()}, scored)

    def _without_patches(
        self, model: VisionLanguageModel, judge: Judge, item: Asked, images: Tensor, ids: Tensor, mask: Tensor,
        taken: list[np.ndarray],
    ) -> list[float]:  # fmt: skip
        pictures = len(images)
        found: list[float] = []
        for start in range(0, len(taken), step := max(1, self.batch_size // pictures)):
            copies = without_patches(images, taken[start : start + step], model.vision.grid_size)
            n = len(copies) // pictures
            index = torch.arange(len(copies)).view(n, pictures) if pictures > 1 else None
            found += _judged(model, judge, item, copies, ids.expand(n, -1), mask.expand(n, -1), index)
        return found

    def _without_words(
        self, model: VisionLanguageModel, judge: Judge, item: Asked, images: Tensor, ids: Tensor, mask: Tensor,
        words: Sequence[tuple[str, list[int]]], taken: list[np.ndarray],
    ) -> list[float]:  # fmt: skip
        masks = torch.cat([_silenced(mask, words, places) for places in taken])
        n, pictures = len(masks), len(images)
        index = torch.arange(pictures).expand(n, -1) if pictures > 1 else torch.zeros(n, dtype=torch.int64)
        return _judged(model, judge, item, images, ids.expand(n, -1), masks, index)


def _judged(
    model: VisionLanguageModel, judge: Judge, item: Asked, images: Tensor, ids: Tensor, mask: Tensor,
    index: Tensor | None,
) -> list[float]:  # fmt: skip
    weight = next(model.parameters())
    ids, mask = ids.to(weight.device), mask.to(weight.device)
    output = model(images.to(weight), ids, mask, None if index is None else index.to(weight.device))
    return judge.right([item] * len(ids), output, ids, mask)


def take_away(results: Results, samples: Iterable[Sample], seed: int, right: str = "right") -> None:
    """Take patches, and words, away from samples by every map and in random order, and add a row for each sample.

    Args:
        results: gets the rows.
        samples: the samples.
        seed: of the random order, which also decides between equal values.
        right: the column of the score with nothing taken away.
    """
    draw = np.random.default_rng(seed)
    for sample in samples:
        flat = {name: values.ravel() for name, values in sample.maps.items()}
        count = len(next(iter(flat.values())))
        orders = {name: ordered(values, draw) for name, values in flat.items()} | {RANDOM: draw.permutation(count)}
        parts = [(orders, count, sample.scored)]
        if sample.words is not None:
            counted, scored = sample.words
            words = len(next(iter(counted.values())))
            by_words = {name: ordered(values, draw) for name, values in counted.items()}
            parts.append((by_words | {AT_RANDOM: draw.permutation(words)}, words, scored))
        row: dict[str, Any] = {"id": sample.id, "text": sample.text}
        for names, number, score in parts:
            taken = taken_by(names, number)
            copies = {places.tobytes(): places for places in map(np.sort, taken)}  # many are the same
            with torch.inference_mode():
                found = dict(zip(copies, score(list(copies.values())), strict=True))
            scores = [found[np.sort(places).tobytes()] for places in taken]
            curves = np.array(scores).reshape(-1, 2, len(SHARES))  # (orders, deletion and insertion, shares)
            row.setdefault(right, scores[0])
            row |= {name: areas(*both) for name, both in zip(names, curves, strict=True)}
        row["agreement"] = {
            f"{one}/{other}": float(
                np.mean([rank_correlation(*of) for of in zip(sample.maps[one], sample.maps[other], strict=True)])
            )
            for one, other in combinations(flat, 2)
        }
        if (region := sample.region) is not None and region.any():
            size = region.shape[0], region.shape[1]
            row["pointed"] = {
                name: bool(pointing(to_pixels(values[0], size), region) > 0.5) for name, values in sample.maps.items()
            }
        results.rows.append(row)


def report(results: Results, maps: Sequence[str], others: Sequence[str], said: str) -> None:
    """Add the means of the rows by map to the results, and where the maps point if it is known.

    Args:
        results: with rows as `take_away` adds them.
        maps: the maps that were measured.
        others: the other orders that were measured.
        said: what the areas are of, in percent.
    """
    found = results.frame
    if len(found) < 2:
        raise UserError(f"split {results.split}: fewer than two samples to measure")
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
        results.say("of all texts: right or wrong, and pointed at what they are about or not")
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
        results.say("agreement of maps: rank correlation over patches, mean over samples")
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


def ordered(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Places from the largest value to the smallest; equal ones in random order."""
    # A stable sort of shuffled values leaves equal ones in random order.
    shuffled = draw.permutation(len(values))
    ordered: np.ndarray = shuffled[np.argsort(-values[shuffled], kind="stable")]
    return ordered


def taken_by(orders: dict[str, np.ndarray], count: int) -> list[np.ndarray]:
    """For each order, first from its begin and then from its end, the places that each of `SHARES` takes away."""
    numbers = [round(share * count) for share in SHARES]
    return [way[:number] for order in orders.values() for way in (order, order[::-1]) for number in numbers]


def without_patches(images: Tensor, taken: Sequence[np.ndarray], grid: tuple[int, int]) -> Tensor:
    """Copies of a sample's images, each with the mean color instead of some patches.

    Args:
        images: (p, 3, H, W), normalized.
        taken: for each of n copies, the numbers of the patches, image by image and row by row.
        grid: rows and columns of the patches of an image.

    Returns:
        (n p, 3, H, W); the images of a copy are adjacent.
    """
    kept = torch.ones(len(taken), len(images) * grid[0] * grid[1])
    for copy, places in zip(kept, taken, strict=True):
        copy[torch.from_numpy(places.copy())] = 0
    mask = F.interpolate(kept.view(-1, 1, *grid), images.shape[2:], mode="nearest").unflatten(0, (-1, len(images)))
    return (images * mask).flatten(0, 1)


def _silenced(mask: Tensor, words: Sequence[tuple[str, list[int]]], taken: np.ndarray) -> Tensor:
    """An attention mask (1, T) without the tokens of some words."""
    silenced = mask.clone()
    for word in taken.tolist():
        silenced[:, words[word][1]] = 0
    return silenced
