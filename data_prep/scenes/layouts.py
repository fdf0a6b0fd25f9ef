"""Scenes in the raw layouts of other datasets of statements, so that the same preparation reads both.

`snli_ve`: `snli_ve_<split>.jsonl` for train, dev and test, and `flickr30k-images.zip`. The premise is an image, and
the hypotheses are those of `data_prep.scenes.statements`: neutral is what speaks of something that is not in the
image.

`nlvr2`: `train.json`, `dev.json` and `test1.json`, and `<split>_img.zip`. Two sentences are about each of the four
pairs of a set of eight images, each true of two of them.

Both have `annotations.zip` with COCO instances, and in every line `target_instances` (`target_instances_right`, of a
pair's right image): the ids of what it is about. `scenes.json` says what there is, and what the words alone are
worth.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tqdm import tqdm

from data_prep.scenes.drawing import ID_STEP, Drawn, add_instances, draw, instance_id, mapped
from data_prep.scenes.questions import captions
from data_prep.scenes.render import SIZES, SceneObject, sample_objects
from data_prep.scenes.statements import Hypothesis, Sentence, balance, draw_hypotheses, draw_sentences, statement_only

LAYOUTS = ("nlvr2", "snli_ve")

_PAIRS = 4  # of a set
_IMAGES_A_SET = 2  # of the corpus's number of images, so that there are as many sentences as questions, or so


class SetTask(NamedTuple):
    """Which image with hypotheses, or which set of pairs, to make."""

    layout: str
    size: str
    split: str
    first_image_id: int
    number: int
    seed: int

    @property
    def rng(self) -> Random:
        """Randomness that depends on nothing but this."""
        return Random(f"{self.seed}/{self.size}/{self.layout}/{self.split}/{self.number}")


class Premise(NamedTuple):
    """An image and what was drawn of hypotheses about it."""

    image_id: int
    drawn: Drawn
    caption: str
    hypotheses: list[Hypothesis]


class PairSet(NamedTuple):
    """Four pairs of images, left before right, and the sentences about them."""

    number: int
    images: list[tuple[int, Drawn]]
    sentences: list[Sentence]


def make_premise(task: SetTask) -> Premise:
    """Draw a scene until its objects show well enough."""
    rng, size = task.rng, SIZES[task.size]
    while True:
        objects = sample_objects(size, "train", rng)
        said = captions(objects, rng, number=1)
        drawn = None if said is None else draw(objects, size, task.first_image_id, rng)
        if said is not None and drawn is not None:
            return Premise(task.first_image_id, drawn, said[0].text, draw_hypotheses(objects, size, rng))


def make_set(task: SetTask) -> PairSet:
    """Draw eight scenes until there are two sentences that are true of half of their pairs."""
    rng, size = task.rng, SIZES[task.size]
    while True:
        scenes: list[list[SceneObject]] = []
        images: list[tuple[int, Drawn]] = []
        while len(scenes) < 2 * _PAIRS:
            objects, image_id = sample_objects(size, "train", rng), task.first_image_id + len(scenes)
            drawn = draw(objects, size, image_id, rng)
            if drawn is not None:
                scenes.append(objects)
                images.append((image_id, drawn))
        sentences = draw_sentences(list(zip(scenes[::2], scenes[1::2], strict=True)), rng)
        if sentences is not None:
            return PairSet(task.number, images, sentences)


def write_layout(layout: str, size: str, train_images: int, folder: Path, seed: int, workers: int) -> None:
    """Write a corpus in one of `LAYOUTS` into a folder that is there.

    Args:
        train_images: of the training split; pairs have images of their own, twice as many.
    """
    splits = {"train": train_images, "dev": SIZES[size].eval_images}
    splits["test1" if layout == "nlvr2" else "test"] = SIZES[size].eval_images
    said: dict[str, list[tuple[str, str]]] = {}
    write = _write_nlvr2 if layout == "nlvr2" else _write_snli_ve
    with zipfile.ZipFile(folder / "annotations.zip", "w") as instances_zip:
        for place, (split, count) in enumerate(splits.items()):
            number, step = (max(1, count // _IMAGES_A_SET), 2 * _PAIRS) if layout == "nlvr2" else (count, 1)
            first = place * ID_STEP + 1
            tasks = [SetTask(layout, size, split, first + step * n, n, seed) for n in range(number)]
            said[split] = write(tasks, folder, instances_zip, workers)
    words = {split: round(statement_only(said["train"], said[split]), 2) for split in splits if split != "train"}
    summary = {
        "size": size,
        "seed": seed,
        "layout": layout,
        "image_size": SIZES[size].image_size,
        "splits": {split: {"images": splits[split], "statements": len(said[split])} for split in splits},
        "statement_only_accuracy": words,
    }
    (folder / "scenes.json").write_text(json.dumps(summary, indent=2) + "\n")
    for split, accuracy in words.items():
        print(f"{split}: {len(said[split])} statements, of which the words alone tell {accuracy:.1f}%")


def _write_snli_ve(
    tasks: Sequence[SetTask], folder: Path, instances_zip: zipfile.ZipFile, workers: int
) -> list[tuple[str, str]]:
    _, size, split, _, _, seed = tasks[0]
    all_drawn, said_of, instances = [], {}, []
    # All splits share the file, of which train makes the beginning.
    with zipfile.ZipFile(folder / "flickr30k-images.zip", "a") as images:
        made = mapped(make_premise, tasks, workers)
        for premise in tqdm(made, total=len(tasks), unit="image", desc=f"scenes {size} {split}"):
            images.writestr(zipfile.ZipInfo(f"flickr30k-images/{premise.image_id}.jpg"), premise.drawn.jpeg)
            all_drawn.append(premise.hypotheses)
            said_of[premise.image_id] = premise.caption
            instances += premise.drawn.instances
    add_instances(instances_zip, split, SIZES[size], {n: str(n) for n in said_of}, instances)
    kept = balance(all_drawn, Random(f"{seed}/{size}/snli_ve/{split}/balance"))
    with (folder / f"snli_ve_{split}.jsonl").open("w") as file:
        for (image_id, caption), hypotheses in zip(said_of.items(), kept, strict=True):
            for number, hypothesis in enumerate(hypotheses):
                file.write(json.dumps(_snli_ve_line(image_id, caption, number, hypothesis)) + "\n")
    return [(hypothesis.text, hypothesis.label) for hypotheses in kept for hypothesis in hypotheses]


def _snli_ve_line(image_id: int, caption: str, number: int, hypothesis: Hypothesis) -> dict[str, Any]:
    return {
        "annotator_labels": [hypothesis.label],
        "captionID": f"{image_id}.jpg#0",
        "gold_label": hypothesis.label,
        "pairID": f"{image_id}.jpg#0r{number}{hypothesis.label[0]}",
        "sentence1": caption,
        "sentence2": hypothesis.text,
        "Flickr30K_ID": str(image_id),
        "target_instances": [instance_id(image_id, index) for index in hypothesis.targets],
    }


def _write_nlvr2(
    tasks: Sequence[SetTask], folder: Path, instances_zip: zipfile.ZipFile, workers: int
) -> list[tuple[str, str]]:
    size, split = tasks[0].size, tasks[0].split
    names: dict[int, str] = {}
    instances: list[str] = []
    said = []
    with zipfile.ZipFile(folder / f"{split}_img.zip", "w") as images, (folder / f"{split}.json").open("w") as file:
        made = mapped(make_set, tasks, workers)
        for one in tqdm(made, total=len(tasks), unit="set", desc=f"scenes {size} {split}"):
            for place, (image_id, drawn) in enumerate(one.images):
                # As the downloads do, whatever the format of the file.
                name = f"{split}-{one.number}-{place // 2}-img{place % 2}.png"
                name = f"images/train/0/{name}" if split == "train" else f"{split}/{name}"
                images.writestr(zipfile.ZipInfo(name), drawn.jpeg)
                names[image_id] = str(image_id)
                instances += drawn.instances
            for line in _nlvr2_lines(split, one):
                file.write(json.dumps(line) + "\n")
                said.append((line["sentence"], line["label"]))
    add_instances(instances_zip, split, SIZES[size], names, instances)
    return said


def _nlvr2_lines(split: str, one: PairSet) -> Iterator[dict[str, Any]]:
    for pair in range(_PAIRS):
        left, right = (image_id for image_id, _ in one.images[2 * pair : 2 * pair + 2])
        for number, sentence in enumerate(one.sentences):
            line: dict[str, Any] = {
                "sentence": sentence.text,
                "left_url": f"scenes/{left}",
                "right_url": f"scenes/{right}",
                "label": str(sentence.truth[pair]),
                "identifier": f"{split}-{one.number}-{pair}-{number}",
                "writer": "0",
                "synset": "scene",
                "query": "scenes",
            }
            if split == "train":
                line["directory"] = 0
            for key, image_id, targets in zip(
                ("target_instances", "target_instances_right"), (left, right), sentence.targets[pair], strict=True
            ):
                line[key] = [instance_id(image_id, index) for index in targets]
            yield line
