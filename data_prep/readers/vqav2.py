"""Prepare VQA v2, or your own questions in its layout: question, annotation and image zip files.

    vlabs prepare vqav2 --raw-dir downloads --out-dir data/vqav2

Download: of https://visualqa.org/download.html v2_Questions_Train_mscoco.zip, v2_Annotations_Train_mscoco.zip and
train2014.zip, the same for val with val2014.zip, and v2_Questions_Test_mscoco.zip with test2015.zip. A single split is
enough, and VQA v1's files work too.

Nothing needs unpacking, but unpacked JSON files and image folders (`train2014/`) work too. Every split that is there is
prepared: `train` from train2014, `val` from val2014, `test` from test2015, `test-dev` from test-dev2015, and any other
by its name. The answer vocabulary is METER's, in METER's order. Fewer than ten answers to a question count as ten, by
repeating them in turn. A stopped run continues when it is started again.

The region of a question comes from its `target_instances`, if its annotation names them (a list, or a list for each
phrase of the question, which several ξ are taught one by one) and COCO's instances are in the
same folder, or from people: `--human-maps vqahat_train --human-maps vqahat_val` takes the mean of a question's maps in
VQA-HAT (files `QUESTION_NUMBER.png`) instead of its instances.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.engine.places import ImageStore, json_files
from data_prep.engine.reader import Reader, command
from data_prep.engine.regions import describe_files
from data_prep.engine.tables import split_name
from data_prep.engine.texts import Index, Text
from vlabs.errors import UserError, run_cli
from vlabs.metrics.grounding import list_hat
from vlabs.metrics.vqa import normalize_answer
from vlabs.utils.json_file import JsonFile, get_objects, get_value

_QUESTIONS = re.compile(r"(?:v2_)?OpenEnded_mscoco_(.+)_questions\.json")
_ANNOTATIONS = re.compile(r"(?:v2_)?mscoco_(.+)_annotations\.json")


@dataclass(frozen=True)
class Split:
    """The raw files of one split; `release` is what its images are called, such as test2015 for test-dev."""

    questions: JsonFile
    annotations: JsonFile | None
    release: str
    store: ImageStore


class VQAv2(Reader):
    """The raw files of VQA v2 in one folder; those of v1, where there are none of v2.

    Args:
        raw_dir: the folder.
        human_maps: folders with the maps of VQA-HAT, if wanted.

    Raises:
        UserError: files are missing, and the message names all of them; or a folder of maps is not what it should be.
    """

    name = "vqav2"
    min_answer_count = 9

    def __init__(self, raw_dir: Path, human_maps: Sequence[Path] = ()) -> None:
        super().__init__(raw_dir)
        files = json_files(raw_dir, "*[QA]*_mscoco.zip")
        # Files of v1 are called the same but for the v2_, and are of the same form.
        if any(file.name.startswith("v2_") for file in files):
            files = [file for file in files if file.name.startswith("v2_")]
        questions, annotations = _find(files, _QUESTIONS), _find(files, _ANNOTATIONS)
        if not questions and not annotations:
            raise UserError(
                f"{raw_dir} holds no VQA v2: missing v2_Questions_Train_mscoco.zip, v2_Annotations_Train_mscoco.zip and"
                " train2014.zip, the same for val with val2014.zip, and v2_Questions_Test_mscoco.zip with test2015.zip"
                " (https://visualqa.org/download.html; any one split will do)"
            )
        missing = [
            f"v2_Questions_{_zip_name(subset)}_mscoco.zip (v2_OpenEnded_mscoco_{subset}_questions.json)"
            for subset in sorted(annotations.keys() - questions.keys())
        ]
        missing += [
            f"v2_Annotations_{_zip_name(subset)}_mscoco.zip (v2_mscoco_{subset}_annotations.json)"
            for subset in sorted(questions.keys() - annotations.keys())
            if _split_name(subset) in ("train", "val")
        ]
        self.splits: dict[str, Split] = {}
        for subset, file in sorted(questions.items()):
            split = split_name(_split_name(subset), str(file))
            if split in self.splits:
                raise UserError(f"{raw_dir} holds two '{split}' splits, {self.splits[split].questions} and {file}")
            release = _release(file)
            location = self.find_images(release)
            if location is None:
                missing.append(f"{release}.zip (or the folder {release}/)")
            store = ImageStore((location or raw_dir,), other_suffix=".png")
            self.splits[split] = Split(file, annotations.get(subset), release, store)
        if missing:
            raise UserError(f"missing in {raw_dir}: {', '.join(dict.fromkeys(missing))}")
        tables = {file.path for file in (*questions.values(), *annotations.values())}
        self.tables = sorted({*tables, *self.instances})
        self.human_maps = _find_human_maps(human_maps)
        if self.human_maps:
            maps = {path.name: path for paths in self.human_maps.values() for path in paths}
            self.options["human_maps"] = describe_files(maps)

    def image_store(self, split: str) -> ImageStore:
        """See `Reader`."""
        return self.splits[split].store

    def called(self, seen: Mapping[str, int]) -> str:
        """`vqav2` if a file says that it is of the VQA dataset; data of your own are called as their folder."""
        said = next(iter(self.splits.values())).questions.text("info.description") or ""
        return self.call(re.search(r"\bVQA dataset\b", said) is not None)

    def fill(self, index: Index) -> None:
        """Put all questions and annotations into the index."""
        for name, split in self.splits.items():
            for text in _questions(name, split):
                index.add(text)
        # METER's vocabulary is in order of first appearance, train before val.
        for name in sorted(self.splits, key=lambda name: (name != "train", name != "val", name)):
            for text in _annotations(name, self.splits[name].annotations):
                index.annotate(text)
        index.add_instances(self.instances)
        if self.human_maps:
            self._fill_human_maps(index)

    def _fill_human_maps(self, index: Index) -> None:
        maps = {
            question_id: [{"maps": [[str(path.absolute()), None] for path in paths]}]
            for question_id, paths in self.human_maps.items()
        }
        found = index.replace_regions(maps)
        print(f"{found:,} of {len(self.human_maps):,} questions with human maps are prepared")
        if not found:
            folder = next(iter(self.human_maps.values()))[0].parent
            raise UserError(
                f"--human-maps: none of the maps, such as those of {folder}, is of a question that is prepared: name"
                " the folders for the splits that are there"
            )

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """See `Reader`."""
        super().add_options(parser)
        what = "folder with maps of VQA-HAT, of where people looked; may be given several times"
        parser.add_argument("--human-maps", type=Path, action="append", default=[], metavar="FOLDER", help=what)


def _questions(name: str, split: Split) -> Iterator[Text]:
    print(f"reading {split.questions}")
    for number, entry in enumerate(split.questions.entries("questions", some=True)):
        where = f"{split.questions}, question {number}"
        image_id = get_value(entry, "image_id", where)
        question_id, question = (get_value(entry, key, where) for key in ("question_id", "question"))
        image = f"{split.release}/COCO_{split.release}_{image_id:0>12}.jpg"
        yield Text(where, name, (image,), question_id, question, image_id)


def _annotations(name: str, file: JsonFile | None) -> Iterator[Text]:
    if file is None:
        return
    print(f"reading {file}")
    for number, entry in enumerate(file.entries("annotations", some=True)):
        where = f"{file}, annotation {number}"
        answers, major = get_objects(entry, "answers", where), get_value(entry, "multiple_choice_answer", where, str)
        values: dict[str, Any] = {key: get_value(entry, key, where) for key in ("answer_type", "question_type")}
        yield Text(
            where,
            name,
            (),
            get_value(entry, "question_id", where),
            "",
            answers=[get_value(answer, "answer", where) for answer in answers],
            major=normalize_answer(major),
            targets=[entry.get("target_instances", [])],
            **values,
        )


def _release(file: JsonFile) -> str:
    """What the images of a file of questions are called."""
    release = file.text("data_subtype")
    if release is None or not re.fullmatch(r"[\w-]+", release):
        raise UserError(f"{file} does not say which images it is about: 'data_subtype' must be one like val2014")
    return release.replace("test-dev", "test")


def _find_human_maps(folders: Sequence[Path]) -> dict[int, list[Path]]:
    """The maps of some folders of VQA-HAT by question id, those of a question by their names."""
    maps: dict[int, list[Path]] = {}
    seen: dict[str, Path] = {}
    for folder in folders:
        for question_id, paths in list_hat(folder).items():
            if not isinstance(question_id, int):
                raise UserError(f"--human-maps {folder}: {paths[0].name} is no map of VQA-HAT, such as 2773461_1.png")
            for path in paths:
                if path.name in seen:
                    raise UserError(
                        f"--human-maps: {path} is in {seen[path.name].parent} as well: name each folder once"
                    )
                seen[path.name] = path
            # Their order, and with it how their mean is rounded, must not be that of the folders.
            maps[question_id] = sorted([*maps.get(question_id, []), *paths], key=lambda path: path.name)
    return maps


def _split_name(subset: str) -> str:
    return re.sub(r"\d{4}$", "", subset)


def _zip_name(subset: str) -> str:
    """Return how the official zip file calls a subset: Train for train2014."""
    return _split_name(subset).split("-")[0].capitalize()


def _find(files: Sequence[JsonFile], pattern: re.Pattern[str]) -> dict[str, JsonFile]:
    """Return the files whose name fits, by subset (`train2014`)."""
    return {match[1]: file for file in files if (match := pattern.fullmatch(file.name))}


main = command(VQAv2)

if __name__ == "__main__":
    run_cli(main)
