"""The embedded corpus: rendered scenes of several objects, with questions, captions and instance masks.

    vlabs prepare scenes --size small --out-dir data/scenes
    vlabs prepare scenes --size small --layout nlvr2 --out-dir data/scenes-nlvr2       # or snli_ve

The first writes the raw formats that the real datasets are downloaded in, so that the same preparation reads both:

    v2_Questions_<Split>_mscoco.zip, v2_Annotations_<Split>_mscoco.zip    VQA v2, ten answers per question
    <subset>.zip                                                          the images
    dataset_scenes.json                                                   Karpathy's captions, five an image
    annotations.zip                                                       COCO instances with visible masks
    scenes.json                                                           what the corpus holds

Beside train, val and test there are four splits that measure generalization: `distractors` has more objects than
training ever shows, `systematic` asks about color-shape pairs that the others never show or mention, and `productive`
asks longer questions. `relations` asks only how two near objects lie: the words say nothing about the answer, and the
place of one object little, though an object at the border has others at one side only. All answers are public.

Every question and caption has one key more than the originals, `target_instances`: the COCO annotation ids of the
objects that each of its phrases is about. The other two layouts write scenes of their own in the files of NLVR2 and
SNLI-VE, see `data_prep.scenes.layouts`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
import zipfile
from collections.abc import Iterable
from functools import cache
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tqdm import tqdm

from data_prep.scenes.drawing import ID_STEP, INFO, add_instances, add_json, draw, instance_id, mapped, write_list
from data_prep.scenes.layouts import LAYOUTS, write_layout
from data_prep.scenes.question_only import format_table, question_only_accuracy
from data_prep.scenes.questions import Balance, Caption, Question, captions, possible_questions, ten_answers
from data_prep.scenes.render import SIZES, SPLITS, sample_objects
from vlabs.errors import UserError
from vlabs.utils.arguments import MOST_SEED, whole
from vlabs.utils.files import new_folder

ANSWER_TYPES = {"yes/no": "yes/no", "number": "number"}  # of a question type; every other is "other"
FEWEST_QUESTIONS = 3  # possible ones, below which a scene is drawn again


class Task(NamedTuple):
    """Which image to make."""

    size: str
    split: str
    number: int  # in the split, from 0
    seed: int

    @property
    def image_id(self) -> int:
        """Unique in the corpus, from 1."""
        return SPLITS.index(self.split) * ID_STEP + self.number + 1

    @property
    def file_name(self) -> str:
        """As in COCO, without the folder."""
        return f"COCO_{subset_name(self.split)}_{self.image_id:012d}.jpg"

    def random(self, purpose: str) -> Random:
        """Randomness that depends on nothing but this image, the corpus's seed and what it is for."""
        return Random(f"{self.seed}/{self.size}/{self.split}/{self.number}/{purpose}")


class Scene(NamedTuple):
    """One finished image and all that can be said about it."""

    task: Task
    jpeg: bytes
    instances: list[str]  # COCO annotations, as JSON
    questions: list[Question]
    captions: list[Caption]


def subset_name(split: str) -> str:
    """The name of a split in file names, for example `val2014`."""
    return split + ("2015" if split == "test" else "2014")


def make_scenes(
    size: str,
    out_dir: str | Path,
    seed: int = 0,
    num_workers: int | None = None,
    train_images: int | None = None,
    layout: str = "vqa",
) -> None:
    """Render a corpus into the new folder `out_dir`; nothing happens if it holds this corpus already.

    Every byte written is a function of size, seed, train_images and layout, whatever the number of workers.

    Args:
        size: a key of `SIZES`.
        num_workers: processes that render; every core by default.
        train_images: images of the training split, if not as many as the size has; the other splits stay as they are.
        layout: `vqa` for questions and captions, or one of `data_prep.scenes.layouts`.

    Raises:
        UserError: for an unknown size, fewer than one worker or image, or an `out_dir` that holds something else.
    """
    out_dir = Path(out_dir)
    if size not in SIZES:
        raise UserError(f"size is {size!r}, and has to be one of {', '.join(SIZES)}")
    workers = _num_cores() if num_workers is None else num_workers
    for name, number in (("num-workers", num_workers), ("train-images", train_images)):
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}, and has to be 1 or more")
    if layout not in ("vqa", *LAYOUTS):
        raise UserError(f"--layout is {layout!r}, and has to be one of vqa, {', '.join(LAYOUTS)}")
    images = {split: SIZES[size].num_images(split) for split in SPLITS}
    images["train"] = train_images or images["train"]
    if _is_finished(out_dir, size, seed, images["train"], layout):
        print(f"{out_dir} holds the {size} scenes of seed {seed} already")
        return
    with new_folder(out_dir, "--out-dir") as partial:
        if layout == "vqa":
            _write_corpus(size, images, partial, seed, workers)
        else:
            write_layout(layout, size, images["train"], partial, seed, workers)


def _num_cores() -> int:
    """The cores this process may use, where the system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_finished(out_dir: Path, size: str, seed: int, train_images: int, layout: str) -> bool:
    if not os.path.exists(out_dir):
        return False
    try:
        found = json.loads((out_dir / "scenes.json").read_text())
        there = found["size"], found["seed"], found["splits"]["train"]["images"], found.get("layout", "vqa")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out_dir} exists and holds no scenes; name a new folder with --out-dir") from None
    if there != (size, seed, train_images, layout):
        raise UserError(
            f"{out_dir} holds scenes of another size, seed, layout or number of images; name a new one with --out-dir"
        )
    return True


# --- one image -----------------------------------------------------------------------------------------------------


def make_scene(task: Task) -> Scene:
    """Draw a scene until its objects show well enough and there is enough to ask and to say."""
    rng = task.random("scene")
    size = SIZES[task.size]
    while True:
        objects = sample_objects(size, task.split, rng)
        questions = possible_questions(objects, size, task.split, rng)
        sentences = captions(objects, rng)
        if len(questions) < FEWEST_QUESTIONS or sentences is None:
            continue
        drawn = draw(objects, size, task.image_id, rng)
        if drawn is not None:
            return Scene(task, *drawn, questions, sentences)


# --- the files -----------------------------------------------------------------------------------------------------


def _write_corpus(size: str, images: dict[str, int], folder: Path, seed: int, workers: int) -> None:
    tasks = [Task(size, split, number, seed) for split in SPLITS for number in range(images[split])]
    start = time.perf_counter()
    records: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    caption_images: list[str] = []
    with zipfile.ZipFile(folder / "annotations.zip", "w") as instances_zip:
        scenes = tqdm(mapped(make_scene, tasks, workers), total=len(tasks), unit="image", desc=f"scenes {size}")
        for split, of_split in groupby(scenes, key=lambda scene: scene.task.split):
            records[split] = _write_split(split, size, of_split, folder, instances_zip, caption_images)
    with (folder / "dataset_scenes.json").open("wb") as stream:
        write_list(stream, {"dataset": "scenes"}, "images", caption_images)
    seconds = time.perf_counter() - start

    blind = question_only_accuracy(*records["train"], *records["val"])
    summary = {
        "size": size,
        "seed": seed,
        "image_size": SIZES[size].image_size,
        "splits": {
            split: {"subset": subset_name(split), "images": images[split], "questions": len(records[split][0])}
            for split in SPLITS
        },
        "held_out_pairs": sorted(SIZES[size].held_out),
        "question_only_accuracy": {name: round(value, 2) for name, value in blind.items()},
    }
    (folder / "scenes.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(format_table(blind))
    print(f"{len(tasks)} images in {seconds:.1f} s: {len(tasks) / seconds / workers:.0f} images/s per core")


def _write_split(
    split: str,
    size: str,
    scenes: Iterable[Scene],
    folder: Path,
    instances_zip: zipfile.ZipFile,
    caption_images: list[str],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write a split's images, instances, questions and answers; returns its (annotations, questions) records."""
    subset, balance = subset_name(split), Balance()
    annotations: list[dict[str, Any]] = []
    questions: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    instances: list[str] = []
    with zipfile.ZipFile(folder / f"{subset}.zip", "w") as images_zip:
        for scene in scenes:
            task = scene.task
            images_zip.writestr(zipfile.ZipInfo(f"{subset}/{task.file_name}"), scene.jpeg)
            names[task.image_id] = task.file_name
            instances += scene.instances
            caption_images.append(json.dumps(_caption_image(scene, len(caption_images))))
            rng = task.random("answers")
            for number, question in enumerate(balance.choose(scene.questions, rng)):
                question_id = task.image_id * 1000 + number
                questions.append({"image_id": task.image_id, "question": question.text, "question_id": question_id})
                annotations.append(_annotation(task, question, question_id, rng))

    label = split.capitalize()
    header: dict[str, Any] = {"info": INFO, "license": {"name": "CC0"}, "data_type": "mscoco", "data_subtype": subset}
    with zipfile.ZipFile(folder / f"v2_Questions_{label}_mscoco.zip", "w") as archive:
        name = f"v2_OpenEnded_mscoco_{subset}_questions.json"
        add_json(archive, name, {**header, "task_type": "Open-Ended"}, "questions", map(json.dumps, questions))
    with zipfile.ZipFile(folder / f"v2_Annotations_{label}_mscoco.zip", "w") as archive:
        name = f"v2_mscoco_{subset}_annotations.json"
        add_json(archive, name, header, "annotations", map(json.dumps, annotations))
    add_instances(instances_zip, subset, SIZES[size], names, instances)
    return annotations, questions


def _annotation(task: Task, question: Question, question_id: int, rng: Random) -> dict[str, Any]:
    given = ten_answers(question.answer, SIZES[task.size], rng)
    sure = "yes" if len(set(given)) == 1 else "maybe"
    return {
        "question_type": question.kind,
        "multiple_choice_answer": question.answer,
        "answers": [_answer(answer, sure, number) for number, answer in enumerate(given, 1)],
        "image_id": task.image_id,
        "answer_type": ANSWER_TYPES.get(question.kind, "other"),
        "question_id": question_id,
        "target_instances": [[instance_id(task.image_id, index) for index in phrase] for phrase in question.phrases],
    }


@cache
def _answer(answer: str, confidence: str, number: int) -> dict[str, Any]:
    """One annotator's answer. There are few different ones, and millions in a large corpus: shared, never changed."""
    return {"answer": answer, "answer_confidence": confidence, "answer_id": number}


def _caption_image(scene: Scene, imgid: int) -> dict[str, Any]:
    task = scene.task
    sentids = range(imgid * len(scene.captions), (imgid + 1) * len(scene.captions))
    return {
        "filename": task.file_name,
        "filepath": subset_name(task.split),
        "imgid": imgid,
        "cocoid": task.image_id,
        "split": task.split,
        "sentids": list(sentids),
        "sentences": [
            {
                "raw": caption.text,
                "tokens": re.findall(r"\w+", caption.text.lower()),
                "imgid": imgid,
                "sentid": sentid,
                "target_instances": [[instance_id(task.image_id, index)] for index in caption.targets],
            }
            for sentid, caption in zip(sentids, scene.captions, strict=True)
        ],
    }


def main() -> None:
    """Make the corpus that the command line names."""
    parser = argparse.ArgumentParser(
        prog="vlabs prepare scenes", description="render the embedded corpus of scenes, questions and captions"
    )
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--out-dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--seed", type=whole(0, MOST_SEED), default=0)
    parser.add_argument(
        "--train-images", type=whole(1), default=None, help="images to train on, if not the size's number"
    )
    parser.add_argument(
        "--num-workers", type=whole(1), default=None, help="processes that render (default: every core)"
    )
    parser.add_argument(
        "--layout", default="vqa", help="vqa (questions and captions), nlvr2 or snli_ve (default: %(default)s)"
    )
    args = parser.parse_args()
    make_scenes(args.size, args.out_dir, args.seed, args.num_workers, args.train_images, args.layout)
