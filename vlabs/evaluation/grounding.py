"""Evaluation of grounding: does the model look at what the question or caption is about?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor

from vlabs.attention import Maps
from vlabs.attention.maps import lacking, look
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import ImageReader, decode_region
from vlabs.data.instances import Instance, count_instances, crop_map, crop_mask, read_instances
from vlabs.data.module import PreparedDataModule
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.judging import Asked, Judge, known_judge
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


@dataclass
class Targets:
    """Texts of prepared rows with their regions.

    Attributes:
        rows: prepared rows.
        asked: texts of these rows; texts of the same image are together.
        instances: the instances of the texts, by id; None if the rows hold the regions.
        objects: number of instances per image, by image id; empty if unknown.
    """

    rows: datasets.Dataset
    asked: list[Asked]
    instances: dict[int, Instance] | None
    objects: dict[int, int]

    def region(self, item: Asked) -> np.ndarray:
        """The region of a text: (H, W) in [0, 1] or bool, over the image or a resized copy of it."""
        if self.instances is not None:
            return np.logical_or.reduce([self.instances[n].mask() for n in item.targets])
        row = self.rows[item.row]
        return decode_region(row["region"][item.position], f"image {row['image_id']}")


class GroundingEvaluation(Evaluation):
    """Compares maps with the regions of texts: means over texts, by map and measure, and one row per text.

    Texts without a region, or with a region outside what the model sees, are counted and left out.

    Args:
        maps: maps to measure.
        instances: COCO's instances of the same images; None for the regions in the prepared data.
        num_texts: number of texts to measure, evenly spread; None for all.
        human_maps: folder of VQA-HAT's or AiR-D's maps: measure only the rank correlation with them.

    Raises:
        UserError: there is no such map; `instances` is given beside `human_maps`, which does not read it.
    """

    name = "grounding"
    needs = ("texts", "one image")

    def __init__(
        self,
        maps: Maps,
        instances: str | None = None,
        num_texts: Size | None = None,
        human_maps: str | None = None,
    ) -> None:
        if human_maps is not None and instances is not None:
            raise UserError(
                f"task.instances={instances}: task.human_maps={human_maps} measures how people looked: leave one out"
            )
        self.maps = list(maps)
        self.instances = instances
        self.num_texts = num_texts
        self.human_maps = human_maps

    def measure(self, checkpoint: Checkpoint, data: PreparedDataModule, results: Results) -> None:
        """See `Evaluation`; in percent, except rank correlations."""
        needed = lacking(checkpoint.model.vision)
        if kept := [name for name in self.maps if name not in needed]:
            for name in self.maps:
                if name in needed:
                    results.say(f"{name} is left out: it needs {needed[name]}")
            self.maps = kept
        if self.human_maps is not None:
            self._against_people(checkpoint, data, results, self.human_maps)
            return
        where = f"{data.dir}, split {results.split}"
        targets = find_targets(data.rows(results.split), data.dir, self.instances, self.num_texts)
        if targets is None:
            raise UserError(
                "task=grounding needs the regions of texts: prepare the data with regions, or pass "
                "task.instances=FILE, COCO's annotations as zip or JSON"
            )
        asked = targets.asked
        if not asked:
            raise UserError(f"{where}: no text has a region")
        judge = known_judge(checkpoint, data, targets.rows)
        measured = measure(checkpoint.model, checkpoint.preprocessing, targets, self.maps, judge)
        results.rows = [record for record in results.each(measured, total=len(asked)) if record is not None]
        if len(results.rows) < 2:
            raise UserError(f"{where}: fewer than two texts have a region that the model can see")
        report(results, self.maps, len(asked))

    def _against_people(self, checkpoint: Checkpoint, data: PreparedDataModule, results: Results, folder: str) -> None:
        """Rank correlation of each map with human attention, as in VQA-HAT: the mean over people, and then questions.

        Every human map is cropped to the part of the image that the model sees. The ceiling is how well people agree:
        the mean over the pairs of people of a question, for questions of two or more.
        """
        rows = data.rows(results.split)
        where = f"{data.dir}, split {results.split}"
        people, asked = seen_by_people(rows, f"task.human_maps={folder}", folder, where, self.num_texts)
        model, preprocessing, maps = checkpoint.model, checkpoint.preprocessing, self.maps
        alone = ([item] for item in results.each(asked))
        for (item,), by_name, _ in _look_at(model, preprocessing, rows, alone, maps):
            humans = [
                crop_map(one, preprocessing.image_size, crop_mode=preprocessing.crop_mode)
                for one in read_human_maps(item.text_id, people[item.text_id]).maps
            ]
            results.rows.append(beside_people(item, {name: by_name[name][0].numpy() for name in maps}, humans))
        report_beside_people(results, maps)


def seen_by_people(
    rows: datasets.Dataset, option: str, folder: str, where: str, count: int | None
) -> tuple[dict[int | str, list[Path]], list[Asked]]:
    """The files of VQA-HAT or AiR-D by question id, and the questions of prepared rows that have some, evenly spread.

    Args:
        rows: prepared rows.
        option: the option that names the folder, for messages.
        folder: the folder.
        where: the name of the rows, for messages.
        count: number of questions; None for all.

    Raises:
        UserError: there are fewer than two such questions.
    """
    if "question" not in rows.column_names:
        raise UserError(f"{option} is about questions, but {where} has none")
    people = list_hat(folder)
    asked = spread([item for item in all_texts(rows, None) if item.text_id in people], count)
    if len(asked) < 2:
        raise UserError(
            f"{option} has maps of fewer than two questions of {where}: VQA-HAT uses the question ids of VQA v1, so "
            "prepare its files (`vlabs prepare vqav2` reads them too); AiR-D uses those of GQA (`vlabs prepare gqa`)"
        )
    return people, asked


def beside_people(item: Asked, maps: Mapping[str, np.ndarray], humans: Sequence[np.ndarray]) -> dict[str, Any]:
    """The rank correlations of a question's maps with those of people, and of these with each other, for one row.

    Args:
        item: the question.
        maps: (rows, columns) by name, over what the model sees.
        humans: (H, W) for each person, over the same part of the image.
    """
    found = {name: float(np.mean([rank_correlation(one, human) for human in humans])) for name, one in maps.items()}
    agree = [float(rank_correlation(one, other)) for one, other in combinations(humans, 2)]
    agreement = float(np.mean(agree)) if agree else None
    return {"id": item.text_id, "text": item.text, "people": len(humans), "maps": found, "agreement": agreement}


def report_beside_people(results: Results, maps: Sequence[str]) -> None:
    """Add the means of rows as in `beside_people` to the results."""
    found = results.frame
    agreement = found["agreement"].dropna()
    results.metrics |= {"texts": len(found), "texts_of_several_people": len(agreement)}
    results.say(f"{len(found)} questions, {len(agreement)} of them with maps of several people; a uniform map scores 0")
    cells = [[name, results.mean(f"{name}/rank_correlation", found[f"maps/{name}"], digits=3)] for name in maps]
    cells.append(["people, with each other", results.mean("people/rank_correlation", agreement, digits=3)])
    results.table(["map", "rank correlation"], cells)


def report(results: Results, maps: Sequence[str], asked: int) -> None:
    """Add the means of the rows by map, and by the number of objects where it is known, to the results.

    Args:
        results: with rows as in `record`.
        maps: the maps that were measured.
        asked: the number of texts that have a region, also outside what the model sees.
    """
    left_out, found = asked - len(results.rows), results.frame
    area = 100 * found["area"].mean()
    results.metrics |= {"area": area, "texts": len(found), "left_out": left_out}
    results.say(
        f"{len(found)} texts; a uniform map scores {area:.1f} for energy, pointing and ap\n"
        f"{left_out} of {asked} texts left out: their region is outside what the model sees"
    )
    columns, extra = list(MEASURES), []
    if "right" in found:
        results.say(
            f"{results.mean('right', found['right'], 1)}% right; the last column joins both: √(right · energy) of a "
            "text, which is high only if it is right and the map is on what it is about"
        )
        extra = ["right_energy"]
        for name in maps:
            joint = np.sqrt(found["right"] / 100 * found[f"maps/{name}/energy"])
            found[f"maps/{name}/right_energy"] = joint
    results.table(
        ["map", *columns, *(["√(right · energy)"] * len(extra))],
        [
            [
                name,
                *(
                    results.mean(f"{name}/{one}", 100 * found[f"maps/{name}/{one}"], digits=1)
                    for one in (*columns, *extra)
                ),
            ]
            for name in maps
        ],
    )
    by_objects = 100 * found.groupby("objects").mean(numeric_only=True)
    if list(by_objects.index) == [0]:  # the number of objects is unknown
        return
    results.say("energy by the number of objects in the image")
    rows = []
    for name in ["area", *maps]:
        means = by_objects[name if name == "area" else f"maps/{name}/energy"]
        key = "area_by_objects" if name == "area" else f"{name}/energy_by_objects"
        results.metrics[key] = {str(count): value for count, value in means.items()}
        rows.append([name, *(f"{value:.1f}" for value in means)])
    results.table(["map", *by_objects.index], rows)


def _look_at(
    model: VisionLanguageModel,
    preprocessing: Preprocessing,
    rows: datasets.Dataset,
    groups: Iterable[list[Asked]],
    maps: Sequence[str],
    judge: Judge | None = None,
) -> Iterator[tuple[list[Asked], dict[str, Tensor], list[float] | None]]:
    """Yield groups of texts about one image with their maps by name, and how right the model is if there is a judge."""
    reader = ImageReader(rows, preprocessing)
    for group in groups:
        _, image = reader.read(group[0].row, 0)
        assert image is not None
        input_ids, attention_mask = preprocessing.pad(preprocessing.token_ids([item.text for item in group]))
        output, by_name = look(model, image, input_ids, attention_mask, maps)
        yield group, by_name, None if judge is None else judge.right(group, output, input_ids, attention_mask)


def find_targets(
    rows: datasets.Dataset, data_dir: str | Path, instances: str | None, num_texts: int | None
) -> Targets | None:
    """The regions of the texts of prepared rows; None if they are unknown.

    Args:
        rows: prepared rows.
        data_dir: the prepared folder; the raw data may lie beside it.
        instances: COCO's instances file; None for the regions in the rows, else the instances of the raw data.
        num_texts: number of texts, evenly spread; None for all.
    """
    kinds = [kind for kind in ("question", "caption", "statement") if kind in rows.column_names]
    if not kinds or "image_2" in rows.column_names:  # a map is over one image, so pairs have none
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
    """The texts of a kind for which a column is not empty, in stored order."""
    asked = []
    for number, row in enumerate(rows.select_columns(list({kind, f"{kind}_id", "target_instances", column}))):
        for position, known in enumerate(row[column]):
            if known:
                targets = row["target_instances"][position]
                asked.append(Asked(number, position, row[f"{kind}_id"][position], row[kind][position], targets))
    return asked


def all_texts(rows: datasets.Dataset, count: int | None, pairs: bool = False) -> list[Asked]:
    """The texts of prepared rows, evenly spread.

    Args:
        rows: prepared rows.
        count: number of texts; None for all.
        pairs: take texts about two images too.

    Raises:
        UserError: the rows have no texts about one image each.
    """
    kind = next((kind for kind in ("question", "caption", "statement") if kind in rows.column_names), None)
    if kind is None or ("image_2" in rows.column_names and not pairs):
        raise UserError("the data have no texts about one image each")
    asked = [
        Asked(number, position, text_id, row[kind][position], [])
        for number, row in enumerate(rows.select_columns([kind, f"{kind}_id"]))
        for position, text_id in enumerate(row[f"{kind}_id"])
    ]
    return spread(asked, count)


def spread(asked: list[Asked], count: int | None) -> list[Asked]:
    """`count` of the texts, evenly spread; None for all."""
    if count is None or count >= len(asked):
        return asked
    return [asked[n] for n in np.linspace(0, len(asked) - 1, num=count, dtype=int)]


def measure(
    model: VisionLanguageModel,
    preprocessing: Preprocessing,
    targets: Targets,
    maps: Sequence[str],
    judge: Judge | None = None,
) -> Iterator[dict[str, Any] | None]:
    """Yield a record per text with its measures by map; None for a region outside what the model sees.

    Args:
        model, preprocessing: of a checkpoint.
        targets: the texts and their regions.
        maps: names in `vlabs.attention.maps.MAPS`.
        judge: says how right the model is; None if that is not known.
    """
    size = preprocessing.image_size
    image_ids = targets.rows.select_columns(["image_id"])
    groups = (list(of_image) for _, of_image in groupby(targets.asked, key=lambda item: item.row))
    for of_image, by_name, right in _look_at(model, preprocessing, targets.rows, groups, maps, judge):
        image_id = image_ids[of_image[0].row]["image_id"]
        masks = [crop_mask(targets.region(item), size, preprocessing.crop_mode) for item in of_image]
        for n, (item, mask) in enumerate(zip(of_image, masks, strict=True)):
            if not mask.any():
                yield None
                continue
            found = {name: by_name[name][n].numpy() for name in maps}
            objects = targets.objects.get(image_id, 0)
            yield record(item, found, mask, objects, right[n] if right else None)


def record(
    item: Asked, maps: Mapping[str, np.ndarray], mask: np.ndarray, objects: int, right: float | None = None
) -> dict[str, Any]:
    """The measures of a text's maps, for one row of the results.

    Args:
        item: the text.
        maps: (rows, columns) by name, over what the model sees.
        mask: (H, W) bool, its region there; not empty.
        objects: the number of objects in the image; 0 if unknown.
        right: how right the model is about the text, in percent; None if unknown.
    """
    pixels = {name: to_pixels(values, (mask.shape[0], mask.shape[1])) for name, values in maps.items()}
    values = {
        name: {measure: float(function(one, mask)) for measure, function in MEASURES.items()}
        for name, one in pixels.items()
    }
    known = {} if right is None else {"right": right}
    area = float(area_share(mask))
    return {"id": item.text_id, "text": item.text, "objects": objects, "area": area} | known | {"maps": values}


def find_instances(instances: str | Path | None, data_dir: str | Path) -> Path | None:
    """The given instances file, else `annotations.zip` of the raw data beside a prepared folder, if it exists."""
    if instances is not None:
        return Path(instances)
    beside = Path(f"{data_dir}-raw") / "annotations.zip"
    return beside if beside.is_file() else None
