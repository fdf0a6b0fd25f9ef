"""Evaluation of grounding: does the model look where the question or caption is about?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch import Tensor

from vlabs.attention.maps import MAPS, look
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import ImageReader, decode_region
from vlabs.data.instances import Instance, count_instances, crop_map, crop_mask, read_instances
from vlabs.data.module import PreparedDataModule
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.grounding import (
    area_share,
    average_precision,
    best_iou,
    energy_inside,
    list_hat,
    pointing,
    rank_correlation,
    read_human_maps,
    to_pixels,
)
from vlabs.models.vlm import VisionLanguageModel
from vlabs.utils.options import Size

MEASURES = {"energy": energy_inside, "pointing": pointing, "ap": average_precision, "iou": best_iou}


class Asked(NamedTuple):
    """A question or caption whose target is known: row, position in the row, id, text, and instances, if named."""

    row: int
    position: int
    text_id: int
    text: str
    targets: list[int]


@dataclass
class Targets:
    """Texts of some rows with what each is about.

    Attributes:
        rows: prepared rows.
        asked: texts of these rows, those of an image together.
        instances: by id, those that the texts name; None where the rows themselves hold the regions.
        objects: how many instances an image has, by its id; empty where unknown.
    """

    rows: datasets.Dataset
    asked: list[Asked]
    instances: dict[int, Instance] | None
    objects: dict[int, int]

    def region(self, item: Asked) -> np.ndarray:
        """The part of the image that a text is about: (H, W) in [0, 1] or bool, over the image or a copy of it."""
        if self.instances is not None:
            return np.logical_or.reduce([self.instances[n].mask() for n in item.targets])
        row = self.rows[item.row]
        return decode_region(row["region"][item.position], f"image {row['image_id']}")


class GroundingEvaluation(Evaluation):
    """Measures every map against the targets: means over the texts, by map and measure, and a line a text.

    Texts whose target is not known, or not inside what the model sees, are counted and left out.

    Args:
        maps: maps that are measured, of `vlabs.attention.maps.MAPS`.
        instances: COCO's instances of the same corpus; without them, the regions that the data were prepared with.
        num_texts: texts that are measured, evenly spread; None for all.
        human_maps: folder of VQA-HAT's maps: measure the rank correlation with them instead of all else.

    Raises:
        UserError: a map that there is not.
    """

    name = "grounding"
    needs = ("texts", "one image")

    def __init__(
        self,
        maps: Sequence[str],
        instances: str | None = None,
        num_texts: Size | None = None,
        human_maps: str | None = None,
    ) -> None:
        wrong = [name for name in maps if name not in MAPS]
        if wrong or not maps:
            raise UserError(f"task.maps names {', '.join(wrong) or 'nothing'}: choose of {', '.join(MAPS)}")
        self.maps = list(maps)
        self.instances = instances
        self.num_texts = num_texts
        self.human_maps = human_maps

    def measure(self, checkpoint: Checkpoint, data: PreparedDataModule, results: Results) -> None:
        """See `Evaluation`; in percent, but rank correlations."""
        if self.human_maps is not None:
            self._against_people(checkpoint, data, results, self.human_maps)
            return
        where = f"{data.dir}, split {results.split}"
        targets = find_targets(data.rows(results.split), data.dir, self.instances, self.num_texts)
        if targets is None:
            raise UserError(
                "task=grounding needs to know what a text is about: prepare the data with regions, or pass "
                "task.instances=FILE, COCO's annotations zip or JSON"
            )
        asked = targets.asked
        if not asked:
            raise UserError(f"{where}: no text says what it is about")
        if "rollout" in self.maps and len(self.maps) > 1 and not checkpoint.model.vision.backbone.is_even:
            results.say("rollout is left out: it needs an encoder whose blocks all have the same tokens")
            self.maps.remove("rollout")
        measured = measure(checkpoint.model, checkpoint.preprocessing, targets, self.maps)
        results.rows = [record for record in results.each(measured, total=len(asked)) if record is not None]
        if len(results.rows) < 2:
            raise UserError(f"{where}: fewer than two texts have a target that the model can see")
        left_out, found = len(asked) - len(results.rows), results.frame
        area = 100 * found["area"].mean()
        results.metrics |= {"area": area, "texts": len(found), "left_out": left_out}
        results.say(
            f"{len(found)} texts; a uniform map scores {area:.1f} for energy, pointing and ap\n"
            f"{left_out} of {len(asked)} texts left out: their target is outside what the model sees"
        )
        cells = [
            [name, *(results.mean(f"{name}/{one}", 100 * found[f"maps/{name}/{one}"], digits=1) for one in MEASURES)]
            for name in self.maps
        ]
        results.table(["map", *MEASURES], cells)
        by_objects = 100 * found.groupby("objects").mean(numeric_only=True)
        if list(by_objects.index) == [0]:  # nobody said how many there are
            return
        results.say("energy by the number of objects in the image")
        rows = []
        for name in ["area", *self.maps]:
            means = by_objects[name if name == "area" else f"maps/{name}/energy"]
            key = "area_by_objects" if name == "area" else f"{name}/energy_by_objects"
            results.metrics[key] = {str(count): value for count, value in means.items()}
            rows.append([name, *(f"{value:.1f}" for value in means)])
        results.table(["map", *by_objects.index], rows)

    def _against_people(self, checkpoint: Checkpoint, data: PreparedDataModule, results: Results, folder: str) -> None:
        """Rank correlation of every map with where people looked, as VQA-HAT reports it: the mean over questions.

        A question's human map is the mean over the people who were asked, of the part of the image that the model
        sees.
        """
        rows = data.rows(results.split)
        if "question" not in rows.column_names:
            raise UserError(f"task.human_maps={folder} is about questions, and {data.dir} holds none")
        asked = [
            Asked(number, position, question_id, row["question"][position], [])
            for number, row in enumerate(rows.select_columns(["question", "question_id"]))
            for position, question_id in enumerate(row["question_id"])
        ]
        people = list_hat(folder)
        asked = spread([item for item in asked if item.text_id in people], self.num_texts)
        if len(asked) < 2:
            raise UserError(
                f"task.human_maps={folder} has maps of fewer than two questions of {data.dir}, split {results.split}: "
                "VQA-HAT numbers questions as VQA v1 does, so prepare v1's files (`vlabs prepare vqav2` takes them too)"
            )
        model, preprocessing, maps = checkpoint.model, checkpoint.preprocessing, self.maps
        alone = ([item] for item in results.each(asked))
        for (item,), by_name in _look_at(model, preprocessing, rows, alone, maps):
            human = read_human_maps(item.text_id, people[item.text_id]).mean
            human = crop_map(human, preprocessing.image_size, crop_mode=preprocessing.crop_mode)
            correlations = {name: float(rank_correlation(by_name[name][0].numpy(), human)) for name in maps}
            results.rows.append({"id": item.text_id, "text": item.text, "maps": correlations})
        results.metrics["texts"] = len(results.rows)
        results.say(f"{len(results.rows)} questions; a uniform map scores 0")
        found = results.frame
        cells = [[name, results.mean(f"{name}/rank_correlation", found[f"maps/{name}"], digits=3)] for name in maps]
        results.table(["map", "rank correlation"], cells)


def _look_at(
    model: VisionLanguageModel,
    preprocessing: Preprocessing,
    rows: datasets.Dataset,
    groups: Iterable[list[Asked]],
    maps: Sequence[str],
) -> Iterator[tuple[list[Asked], dict[str, Tensor]]]:
    """The maps of groups of texts, each about one image."""
    reader = ImageReader(rows, preprocessing)
    for group in groups:
        _, image = reader.read(group[0].row, 0)
        assert image is not None
        input_ids, attention_mask = preprocessing.pad(preprocessing.token_ids([item.text for item in group]))
        _, by_name = look(model, image, input_ids, attention_mask, maps)
        yield group, by_name


def find_targets(
    rows: datasets.Dataset, data_dir: str | Path, instances: str | None, num_texts: int | None
) -> Targets | None:
    """What the texts of prepared rows are about; None where it is not known.

    Args:
        data_dir: the prepared folder, beside which the raw corpus may lie.
        instances: COCO's instances file; None for the regions in the rows, or the instances of the raw corpus.
        num_texts: how many texts, evenly spread; None for all.
    """
    kinds = [kind for kind in ("question", "caption", "statement") if kind in rows.column_names]
    if not kinds or "image_2" in rows.column_names:  # a map is of one image
        return None
    file = find_instances(instances, data_dir)
    kind = kinds[0]
    in_rows = instances is None and "region" in rows.column_names
    asked = _list_asked(rows, kind, "region" if in_rows else "target_instances")
    if in_rows and asked:
        return Targets(rows, spread(asked, num_texts), None, count_instances(file) if file else {})
    if file is None:
        return None
    asked = spread(_list_asked(rows, kind, "target_instances"), num_texts)
    found = read_instances(file, {target for item in asked for target in item.targets})
    return Targets(rows, asked, found, count_instances(file))


def _list_asked(rows: datasets.Dataset, kind: str, column: str) -> list[Asked]:
    """The texts for which a column says something, in stored order; `kind` is what they are called."""
    asked = []
    for number, row in enumerate(rows.select_columns(list({kind, f"{kind}_id", "target_instances", column}))):
        for position, known in enumerate(row[column]):
            if known:
                targets = row["target_instances"][position]
                asked.append(Asked(number, position, row[f"{kind}_id"][position], row[kind][position], targets))
    return asked


def spread(asked: list[Asked], count: int | None) -> list[Asked]:
    """So many of the texts, evenly spread; all of them for None."""
    if count is None or count >= len(asked):
        return asked
    return [asked[n] for n in np.linspace(0, len(asked) - 1, num=count, dtype=int)]


def measure(
    model: VisionLanguageModel, preprocessing: Preprocessing, targets: Targets, maps: Sequence[str]
) -> Iterator[dict[str, Any] | None]:
    """One record a text: its measures by map; None for a target that cannot be seen.

    Args:
        maps: of `vlabs.attention.maps.MAPS`.
    """
    size = preprocessing.image_size
    image_ids = targets.rows.select_columns(["image_id"])
    groups = (list(of_image) for _, of_image in groupby(targets.asked, key=lambda item: item.row))
    for of_image, by_name in _look_at(model, preprocessing, targets.rows, groups, maps):
        image_id = image_ids[of_image[0].row]["image_id"]
        masks = [crop_mask(targets.region(item), size, preprocessing.crop_mode) for item in of_image]
        for n, (item, mask) in enumerate(zip(of_image, masks, strict=True)):
            if not mask.any():
                yield None
                continue
            values = {
                name: {
                    measure: float(function(to_pixels(by_name[name][n].numpy(), size), mask))
                    for measure, function in MEASURES.items()
                }
                for name in maps
            }
            yield {
                "id": item.text_id,
                "text": item.text,
                "objects": targets.objects.get(image_id, 0),
                "area": float(area_share(mask)),
                "maps": values,
            }


def find_instances(instances: str | Path | None, data_dir: str | Path) -> Path | None:
    """The instances file that was named, or `annotations.zip` of the raw corpus beside a prepared folder, if any."""
    if instances is not None:
        return Path(instances)
    beside = Path(f"{data_dir}-raw") / "annotations.zip"
    return beside if beside.is_file() else None
