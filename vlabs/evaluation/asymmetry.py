"""Evaluation of visual search: is an object of one kind found sooner among the other kind than the other way round?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from vlabs.attention.maps import attention_map, some_maps_of
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.embedded import Corpus, search_displays, search_object
from vlabs.data.instances import crop_mask
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.prompt import check_prompt, with_phrase
from vlabs.evaluation.results import Results
from vlabs.metrics.grounding import to_pixels
from vlabs.utils.options import Size, Some


class AsymmetryEvaluation(Evaluation):
    """Searches A among B, and B among A, in rendered images: the rank of the target among the objects.

    The model is asked for the target. An object is worth the largest value of a map on its pixels, and the target's
    rank is 1 plus the number of objects that are worth more, those that are worth the same counting one half. People
    find what has a feature among what lacks it sooner than the reverse (Treisman and Gormley, 1988).

    Args:
        prompt: the text that the model is given, with `PHRASE` where the phrase goes.
        pairs: what is searched for among what, and the reverse: two phrases of a color, a shape and perhaps a fill.
        others: numbers of objects beside the target.
        images: images of each target and number; they are a batch.
        size: corpus whose image side and small objects are used.
        maps: maps to measure.

    Raises:
        UserError: the prompt has no place for the phrase, a pair is not two different objects or is there twice, or so
            many objects find no room.
    """

    name = "asymmetry"
    needs = ("texts", "one image")
    brings_data = True

    def __init__(
        self,
        pairs: Some[Sequence[str]],
        prompt: str = "PHRASE",
        others: Some[Size] = (1, 3, 6),
        images: Size = 50,
        size: Corpus = "small",
        maps: Some[Literal["weights", "norm", "fusion"]] = ("weights", "fusion"),
    ) -> None:
        check_prompt(prompt)
        _check_pairs(pairs)
        one, other = pairs[0]
        next(search_displays(size, one, other, max(others), 1))  # fails if there is no room
        self.prompt, self.pairs, self.others, self.images = prompt, pairs, others, images
        self.size, self.maps = size, list(maps)

    def measure(self, checkpoint: Checkpoint, data: None, results: Results) -> None:
        """See `Evaluation`. Metrics: `MAP/N/rank` and `MAP/N/first`, the percentage of rank 1, over all targets among N
        others; `N/chance`, the rank at random; and `MAP/TARGET/OTHER/N/rank` of each."""
        model = checkpoint.model.to(results.device).eval()
        maps, left_out = some_maps_of(model, self.maps)
        for reason in left_out:
            results.say(reason)
        searches = [both for one, other in self.pairs for both in ((one, other), (other, one))]
        asked = [(target, other, count) for target, other in searches for count in self.others]
        texts = {one: with_phrase(self.prompt, one, checkpoint.preprocessing, "task.pairs") for one, _ in searches}
        for target, other, count in results.each(asked, "search"):
            about = {"target": target, "other": other, "others": count}
            ranks = self._ranks(checkpoint, results.device, maps, texts[target], **about)
            results.rows += [{"id": n, **about, **row} for n, row in enumerate(ranks)]
        self._report(results, searches, maps)

    @torch.no_grad()
    def _ranks(
        self, checkpoint: Checkpoint, device: str, maps: Sequence[str], text: str, target: str, other: str, others: int
    ) -> Iterator[dict[str, float]]:
        """Yield the target's rank by each map, image by image."""
        preprocessing, model = checkpoint.preprocessing, checkpoint.model
        images, masks = zip(*search_displays(self.size, target, other, others, self.images), strict=True)
        ids, mask = preprocessing.pad(preprocessing.token_ids([text] * len(images)))
        pixels = torch.stack([preprocessing.image(image) for image in images])
        output = model(pixels.to(device), ids.to(device), mask.to(device), read_image=True)
        found = {name: attention_map(output, model.vision, name).cpu().numpy() for name in maps}
        side = preprocessing.image_size
        for n, of_image in enumerate(masks):
            seen = [crop_mask(one, side, preprocessing.crop_mode) for one in of_image]
            values = {name: to_pixels(of[n], side) for name, of in found.items()}
            yield {name: rank_of_first([of[one].max(initial=0) for one in seen]) for name, of in values.items()}

    def _report(self, results: Results, searches: Sequence[tuple[str, str]], maps: Sequence[str]) -> None:
        frame = results.frame
        results.say("the rank of the target among all objects, 1 is the best; 95% intervals over images")
        for count in self.others:
            results.metrics[f"{count}/chance"] = 1 + count / 2
        for name in maps:
            rows = []
            for target, other in searches:
                of = frame[(frame["target"] == target) & (frame["other"] == other)]
                cells = [
                    results.mean(f"{name}/{target}/{other}/{count}/rank", of[of["others"] == count][name])
                    for count in self.others
                ]
                rows.append([f"{target} among {other}", *cells])
            by_count = {count: frame[frame["others"] == count][name] for count in self.others}
            rows.append(["all", *(results.mean(f"{name}/{count}/rank", of) for count, of in by_count.items())])
            first = [results.mean(f"{name}/{count}/first", 100.0 * (of == 1)) for count, of in by_count.items()]
            rows += [["all, percent of rank 1", *first], ["at random", *(f"{1 + count / 2:g}" for count in by_count)]]
            results.table([name, *(f"{count} others" for count in self.others)], rows)


def _check_pairs(pairs: Sequence[Sequence[str]]) -> None:
    """Raise a UserError unless each pair is two different objects, and no two pairs are the same."""
    known: list[list[dict[str, str]]] = []
    for pair in pairs:
        given = f"task.pairs: [{', '.join(pair)}]"
        if len(pair) != 2:
            raise UserError(f"{given} must be two different phrases, such as [red circle, red square]")
        one, other = (search_object(phrase) for phrase in pair)
        if one == other:
            raise UserError(f"{given} must be two different phrases, but both name the same object")
        if [one, other] in known:
            raise UserError(f"{given} is there twice: every pair is searched both ways, leave one out")
        known += [[one, other], [other, one]]


def rank_of_first(values: Sequence[float]) -> float:
    """The rank of the first of some values: 1 plus how many others are larger; equal ones count one half."""
    own, others = values[0], np.asarray(values[1:])
    return float(1 + (others > own).sum() + 0.5 * (others == own).sum())
