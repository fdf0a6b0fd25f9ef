"""Whether the maps of a model of transformers are true: the measures of vlabs' own models, on prepared data."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import datasets
import numpy as np
from omegaconf import OmegaConf

from vlabs.data.images import name_of, read_bytes
from vlabs.data.instances import resize_area
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError
from vlabs.evaluation import faithfulness as faithful
from vlabs.evaluation import grounding as grounded
from vlabs.evaluation.grounding import Targets, all_texts, find_targets
from vlabs.evaluation.judging import Asked, Scores
from vlabs.evaluation.results import Results, Setting
from vlabs.look.looker import Looker
from vlabs.look.models import Inputs, Seen
from vlabs.metrics.grounding import read_human_maps

_BATCH = 32  # images at a time


def grounding(
    looker: Looker, data: Path, split: str, maps: Sequence[str], num_texts: int, instances: str | None, out: Path
) -> Results:
    """Compare maps with the regions of texts, as `vlabs.evaluation.grounding.GroundingEvaluation` does.

    Args:
        looker: the model.
        data: prepared folder.
        split: its split.
        maps: maps that are measured.
        num_texts: number of texts, evenly spread.
        instances: COCO's instances; None for the regions in the prepared data.
        out: folder of the results, for `Results.write`.

    Raises:
        UserError: the texts have no regions, or the model does not have a map.
    """
    results = _results("grounding", looker, split, maps, out)
    targets = find_targets(load_split(data, split), data, instances, num_texts)
    if targets is None or len(targets.asked) < 2:
        raise UserError(
            f"{data}, split {split}: fewer than two texts have a region: prepare the data with regions, or pass "
            "--instances FILE, COCO's annotations as zip or JSON"
        )
    asked = _readable(looker, targets.asked, results)
    scores = _scores(looker, targets.rows)
    for item, size, pixels, seen in _each(looker, targets.rows, asked, maps, results):
        mask = _mask(looker, targets, item, size, pixels)
        if mask.any():
            found = {name: values.numpy() for name, values in seen.maps.items()}
            objects = targets.objects.get(targets.rows[item.row]["image_id"], 0)
            right = scores.of(item, seen.said.answers[0][0][0]) if scores else None
            results.rows.append(grounded.record(item, found, mask, objects, right))
    if len(results.rows) < 2:
        raise UserError(f"{data}, split {split}: fewer than two texts have a region that the model can see and read")
    grounded.report(results, maps, len(asked))
    return results


def human(
    looker: Looker, data: Path, split: str, maps: Sequence[str], num_texts: int, folder: str, out: Path
) -> Results:
    """Compare maps with where people looked, as `vlabs.evaluation.grounding.GroundingEvaluation` does.

    Args:
        looker, data, split, maps, num_texts, out: as in `grounding`.
        folder: folder of VQA-HAT's maps.

    Raises:
        UserError: fewer than two of the questions have such maps, or the model does not have a map.
    """
    results = _results("grounding", looker, split, maps, out)
    rows, option = load_split(data, split), f"--human-maps {folder}"
    people, asked = grounded.seen_by_people(rows, option, folder, f"{data}, split {split}", num_texts)
    for item, size, _, seen in _each(looker, rows, _readable(looker, asked, results), maps, results):
        read = read_human_maps(item.text_id, people[item.text_id]).maps
        humans = [_seen(looker, one, size) for one in read]
        found = {name: values.numpy() for name, values in seen.maps.items()}
        results.rows.append(grounded.beside_people(item, found, humans))
    if len(results.rows) < 2:
        raise UserError(f"{data}, split {split}: fewer than two questions that {looker.name} can read")
    grounded.report_beside_people(results, maps)
    return results


def faithfulness(
    looker: Looker,
    data: Path,
    split: str,
    maps: Sequence[str],
    num_texts: int,
    instances: str | None,
    out: Path,
    seed: int = 0,
) -> Results:
    """Take patches away by each map, as `vlabs.evaluation.faithfulness.FaithfulnessEvaluation` does.

    The areas are under the official accuracy for models that answer questions, else under the score.

    Args:
        looker, data, split, maps, num_texts, instances, out: as in `grounding`; the regions are not needed.
        seed: of the random order.

    Raises:
        UserError: the model answers, but the data have no answers; or it does not have a map.
    """
    results = _results("faithfulness", looker, split, maps, out)
    rows = load_split(data, split)
    if looker.looks.answers and _scores(looker, rows) is None:
        raise UserError(f"{data}, split {split}: {looker.name} answers questions, but the data have no answers")
    targets = find_targets(rows, data, instances, num_texts)
    rows, asked = (rows, all_texts(rows, num_texts)) if targets is None else (targets.rows, targets.asked)
    scores = _scores(looker, rows)

    def scored(item: Asked, pixels: Inputs, taken: list[np.ndarray]) -> list[float]:
        text = looker.text(item.text)
        said = []
        for start in range(0, len(taken), _BATCH):
            given = looker.looks.without(pixels, taken[start : start + _BATCH])
            said += looker.looks.run(given, text).answers
        return [scores.of(item, best[0]) if scores else 100 * best[1] for best, *_ in said]

    samples = (
        faithful.Sample(
            item.text_id,
            item.text,
            {name: values[None].numpy() for name, values in seen.maps.items()},
            partial(scored, item, pixels),
            region=_mask(looker, targets, item, size, pixels) if scores and targets is not None else None,
        )
        for item, size, pixels, seen in _each(looker, rows, _readable(looker, asked, results), maps, results)
    )
    faithful.take_away(results, samples, seed, "right" if scores else "score")
    if len(results.rows) < 2:
        raise UserError(f"{data}, split {split}: fewer than two texts that {looker.name} can read")
    mean = results.frame["right" if scores else "score"].mean()
    what = f"{mean:.1f}% right" if scores else f"a mean score of {mean:.1f}%"
    under = "the accuracy" if scores else f"the score ({looker.meaning})"
    faithful.report(
        results, maps, [faithful.RANDOM],
        f"{len(results.rows)} texts, {what} with nothing taken away\narea under {under}, in percent, while patches are "
        "taken away",
    )  # fmt: skip
    return results


def _results(name: str, looker: Looker, split: str, maps: Sequence[str], out: Path) -> Results:
    for one in maps:
        looker.check_map(one)
    trainer = OmegaConf.create({"enable_progress_bar": sys.stderr.isatty()})
    return Results(name, looker, Setting(split, out, trainer))


def _scores(looker: Looker, rows: datasets.Dataset) -> Scores | None:
    """Scores the answers to questions; None if the model does not answer, or the data have no answers."""
    if not looker.looks.answers or "answers" not in rows.column_names:
        return None
    known = any(answers for row in rows.select_columns(["answers"]) for answers in row["answers"])
    return Scores(rows) if known else None


def _readable(looker: Looker, asked: Sequence[Asked], results: Results) -> list[Asked]:
    """The texts that are not too long for the model; the results say how many are left out."""
    most = looker.looks.positions
    readable = [item for item in asked if looker.length(item.text) <= most]
    if len(readable) < len(asked):
        results.say(f"{len(asked) - len(readable)} texts left out: longer than {most} tokens")
    return readable


def _each(
    looker: Looker, rows: datasets.Dataset, asked: Sequence[Asked], maps: Sequence[str], results: Results
) -> Iterator[tuple[Asked, tuple[int, int], Inputs, Seen]]:
    """Yield texts with the size of their image, its pixels, and maps."""
    for item in results.each(asked):
        row = rows[item.row]
        image = decode_image(read_bytes(row), name_of(row))
        pixels = looker.pixels(image)
        text = looker.text(item.text)
        yield item, image.size, pixels, looker.looks.look(pixels, text, maps)


def _mask(looker: Looker, targets: Targets, item: Asked, size: tuple[int, int], pixels: Inputs) -> np.ndarray:
    """The region of a text over what the model sees, in pixels of its input, bool."""
    height, width = (side * looker.looks.patch for side in looker.looks.grid(pixels))
    return np.asarray(resize_area(_seen(looker, targets.region(item), size), height, width) > 0.5)


def _seen(looker: Looker, values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The part of a map (H, W) over an image (width, height), or over a resized copy of it, that the model sees."""
    x, y = values.shape[1] / size[0], values.shape[0] / size[1]
    left, top, right, bottom = looker.box(size)
    rows, columns = (
        slice(round(a), max(round(b), round(a) + 1)) for a, b in ((top * y, bottom * y), (left * x, right * x))
    )
    return np.asarray(values[rows, columns], dtype=np.float64)
