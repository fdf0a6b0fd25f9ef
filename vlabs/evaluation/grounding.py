"""Evaluation of grounding: does the model look where the question or caption is about?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from torch import Tensor
from tqdm import tqdm

from vlabs.attention.maps import MAPS, look
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import ImageReader, decode_region
from vlabs.data.instances import Instance, count_instances, crop_map, crop_mask, read_instances
from vlabs.data.module import PreparedDataModule
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation, Setting
from vlabs.metrics.bootstrap import bootstrap_interval
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
from vlabs.utils.files import write_json, write_text

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
        objects: how many instances an image has, by its id; empty where nobody said.
    """

    rows: datasets.Dataset
    asked: list[Asked]
    instances: dict[int, Instance] | None
    objects: dict[int, int]

    def region(self, item: Asked) -> np.ndarray:
        """The part of the picture that a text is about: (H, W) in [0, 1] or bool, over the picture or a copy of it."""
        if self.instances is not None:
            return np.logical_or.reduce([self.instances[n].mask() for n in item.targets])
        row = self.rows[item.row]
        return decode_region(row["region"][item.position], f"image {row['image_id']}")


class GroundingEvaluation(Evaluation):
    """Measures every map against the targets; prints a table, writes metrics and a line a text.

    Texts whose target is not known, or not inside what the model sees, are counted and left out.

    Args:
        maps: of `vlabs.attention.maps.MAPS`.
        instances: COCO's instances of the same corpus; without them, the regions that the data were prepared with.
        num_texts: how many texts, evenly spread; None for all.
        human_maps: a folder of VQA-HAT's maps: rank correlation with them, in the place of all other measures.

    Raises:
        UserError: a map that there is not.
    """

    trained_for = ("vqa", "retrieval", "pretrain", "snli_ve")

    def __init__(
        self,
        maps: Sequence[str],
        instances: str | None = None,
        num_texts: int | None = None,
        human_maps: str | None = None,
    ) -> None:
        wrong = [name for name in maps if name not in MAPS]
        if wrong or not maps:
            raise UserError(f"task.maps names {', '.join(wrong) or 'nothing'}: choose of {', '.join(MAPS)}")
        if num_texts is not None and num_texts < 1:
            raise UserError(f"task.num_texts={num_texts} must be a whole number, at least 1, or null")
        self.maps = list(maps)
        self.instances = instances
        self.num_texts = num_texts
        self.human_maps = human_maps

    def run(self, checkpoint: Checkpoint, data: PreparedDataModule, setting: Setting) -> dict[str, Any]:
        """See `Evaluation`; the metrics are means over the texts."""
        if self.human_maps is not None:
            return self._against_people(checkpoint, data, setting, self.human_maps)
        where = f"{data.dir}, split {setting.split}"
        targets = find_targets(data.rows(setting.split), data.dir, self.instances, self.num_texts)
        if targets is None:
            raise UserError(
                "task=grounding needs to know what a text is about: prepare the data with regions, or pass "
                "task.instances=FILE, COCO's annotations zip or JSON"
            )
        asked = targets.asked
        if not asked:
            raise UserError(f"{where}: no text says what it is about")
        if "rollout" in self.maps and len(self.maps) > 1 and not checkpoint.model.vision.backbone.is_even:
            print("rollout is left out: it needs an encoder whose blocks all have the same tokens")
            self.maps.remove("rollout")
        records, outside = [], 0
        progress = tqdm(total=len(asked), unit="text", desc="grounding", disable=not setting.shows_progress)
        for record in measure(checkpoint.model, checkpoint.preprocessing, targets, self.maps):
            progress.update()
            if record is None:
                outside += 1
            else:
                records.append(record)
        progress.close()
        if len(records) < 2:
            raise UserError(f"{where}: fewer than two texts have a target that the model can see")
        lines = _write_lines(setting.out_dir, records)
        metrics = _table(records, self.maps)
        metrics |= {
            "checkpoint": str(checkpoint.path),
            "split": setting.split,
            "texts": len(records),
            "left_out": outside,
        }
        print(f"{outside} of {len(asked)} texts left out: their target is outside what the model sees")
        print(write_json(setting.out_dir / "metrics.json", metrics))
        print(lines)
        return metrics

    def _against_people(
        self, checkpoint: Checkpoint, data: PreparedDataModule, setting: Setting, folder: str
    ) -> dict[str, Any]:
        """Rank correlation of every map with where people looked, as VQA-HAT reports it: the mean over questions.

        A question's human map is the mean over the people who were asked, of the part of the picture that the model
        sees.
        """
        rows = data.rows(setting.split)
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
                f"task.human_maps={folder} has maps of fewer than two questions of {data.dir}, split {setting.split}: "
                "VQA-HAT numbers questions as VQA v1 does, so prepare v1's files (`vlabs prepare vqav2` takes them too)"
            )
        model, preprocessing, maps = checkpoint.model, checkpoint.preprocessing, self.maps
        records: list[dict[str, Any]] = []
        progress = tqdm(asked, unit="text", desc="human maps", disable=not setting.shows_progress)
        for (item,), by_name in _look_at(model, preprocessing, rows, [[item] for item in progress], maps):
            human = read_human_maps(item.text_id, people[item.text_id]).mean
            human = crop_map(human, preprocessing.image_size, crop_mode=preprocessing.crop_mode)
            correlations = {name: float(rank_correlation(by_name[name][0].numpy(), human)) for name in maps}
            records.append({"id": item.text_id, "text": item.text, "maps": correlations})
        lines = _write_lines(setting.out_dir, records)
        metrics: dict[str, Any] = {"checkpoint": str(checkpoint.path), "split": setting.split, "texts": len(records)}
        print(f"\n{len(records)} questions; a map that looks everywhere alike scores 0\n")
        print(f"{'map':10}{'rank correlation':>26}")
        for name in maps:
            interval = bootstrap_interval([record["maps"][name] for record in records])
            metrics[f"{name}/rank_correlation"] = interval.mean
            metrics[f"{name}/rank_correlation_interval"] = [interval.low, interval.high]
            print(f"{name:10}" + f"{interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]".rjust(26))
        print(write_json(setting.out_dir / "metrics.json", metrics))
        print(lines)
        return metrics


def _write_lines(out_dir: Path, records: Sequence[dict[str, Any]]) -> Path:
    return write_text(out_dir / "grounding.jsonl", "".join(json.dumps(record) + "\n" for record in records))


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
    if not kinds or "image_2" in rows.column_names:  # a map is of one picture
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


def _table(records: Sequence[dict[str, Any]], maps: Sequence[str]) -> dict[str, Any]:
    """Print and return the means with 95% bootstrap intervals, and energy by the number of objects, in percent."""
    area = 100 * np.mean([record["area"] for record in records])
    print(f"\n{len(records)} texts; a map that looks everywhere alike scores {area:.1f} for energy, pointing and ap\n")
    print(f"{'map':10}" + "".join(f"{measure:>22}" for measure in MEASURES))
    metrics: dict[str, Any] = {"area": area}
    for name in maps:
        cells = []
        for measure in MEASURES:
            interval = bootstrap_interval([100 * record["maps"][name][measure] for record in records])
            metrics[f"{name}/{measure}"] = interval.mean
            metrics[f"{name}/{measure}_interval"] = [interval.low, interval.high]
            cells.append(f"{interval.mean:8.1f} [{interval.low:.1f}, {interval.high:.1f}]".rjust(22))
        print(f"{name:10}" + "".join(cells))
    counts = sorted({record["objects"] for record in records})
    if counts == [0]:  # nobody said how many there are
        return metrics
    print("\nenergy by the number of objects in the picture")
    print(f"{'map':10}" + "".join(f"{count:>8}" for count in counts))
    for name in ["area", *maps]:
        means = {}
        for count in counts:
            chosen = [record for record in records if record["objects"] == count]
            values = [record["area"] if name == "area" else record["maps"][name]["energy"] for record in chosen]
            means[str(count)] = 100 * float(np.mean(values))
        metrics[f"{name}/energy_by_objects" if name != "area" else "area_by_objects"] = means
        print(f"{name:10}" + "".join(f"{value:8.1f}" for value in means.values()))
    return metrics


def find_instances(instances: str | Path | None, data_dir: str | Path) -> Path | None:
    """The instances file that was named, or `annotations.zip` of the raw corpus beside a prepared folder, if any."""
    if instances is not None:
        return Path(instances)
    beside = Path(f"{data_dir}-raw") / "annotations.zip"
    return beside if beside.is_file() else None
