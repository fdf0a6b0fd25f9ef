"""Prepare GQA as it is downloaded: questions, scene graphs and pictures, none of which needs unpacking.

    python -m data_prep.gqa --raw-dir downloads --out-dir data/gqa

`--raw-dir` holds `questions1.2.zip` (or the files `train_balanced_questions.json` and so on), `sceneGraphs.zip` (or
`train_sceneGraphs.json` and `val_sceneGraphs.json`) and the pictures, in `images.zip` or `allImages.zip` or in a
folder, of https://cs.stanford.edu/people/dorarad/gqa/download.html. The balanced questions are prepared, as `train`,
`val`, `testdev` and `test`; with `--all` all of them. A question's answer is counted as given by all ten people that
VQA v2 asks, so that its score is 0 or 100. What part of the picture it is about are the boxes of the objects that its
annotations of question and answer name, where there is a scene graph; `question_type` is GQA's structural type. A run
that was stopped goes on where it was when it is started again.

    python -m vlabs.train experiment=vqav2_absvit_base data.dir=data/gqa
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.engine.images import NamedImages, Store, open_zip
from data_prep.engine.index import check_value
from data_prep.engine.json_file import JsonFile, get_value
from data_prep.engine.pipeline import add_options, prepare, read_options
from data_prep.engine.questions import QUESTIONS, QuestionIndex, add_answer_options
from data_prep.readers.own import answer_type, ten_answers
from vlabs.errors import UserError, run_cli
from vlabs.metrics.vqa import clean_answer, normalize_answer

_QUESTIONS = re.compile(r"(train|val|testdev|test)_(balanced|all)_questions(?:_\d+)?\.json")
_GRAPHS = re.compile(r"(?:train|val)_sceneGraphs\.json")
_OTHER_IMAGES = 10**10  # ids of pictures that are not of Visual Genome, called n1, n2, …, begin above this


class GQA:
    """The raw files of GQA in one folder.

    Args:
        raw_dir: the folder.
        all_questions: not the balanced ones alone.

    Attributes:
        options: what the command line's options have to say of this, so that a run with other ones starts anew.

    Raises:
        UserError: there are none.
    """

    name = "gqa"
    kind = QUESTIONS

    def __init__(self, raw_dir: Path, all_questions: bool = False) -> None:
        if not raw_dir.is_dir():
            raise UserError(f"there is no folder {raw_dir}: --raw-dir is where the downloads of GQA lie")
        wanted = "all" if all_questions else "balanced"
        self.questions: dict[str, list[JsonFile]] = {}
        self.graphs: list[JsonFile] = []
        for file in _json_files(raw_dir):
            name = Path(file.member or file.path).name
            match = _QUESTIONS.fullmatch(name)
            if match and match[2] == wanted:
                self.questions.setdefault(match[1], []).append(file)
            elif _GRAPHS.fullmatch(name):
                self.graphs.append(file)
        if not self.questions:
            raise UserError(
                f"{raw_dir} holds no {wanted} questions: questions1.2.zip, or files such as"
                f" train_{wanted}_questions.json, of https://cs.stanford.edu/people/dorarad/gqa/download.html"
            )
        self.options: dict[str, Any] = {"all": True} if all_questions else {}
        self.store = NamedImages.within(raw_dir)
        files = [*(file for files in self.questions.values() for file in files), *self.graphs]
        self.tables: Sequence[Path] = list(dict.fromkeys(file.path for file in files))
        self.images: Sequence[Path] = [path for path in self.store.locations if path not in self.tables]

    def image_store(self, split: str) -> tuple[str, Store]:
        """Return where the pictures are, which all splits share."""
        return "gqa", self.store

    def fill(self, index: QuestionIndex) -> None:
        """Put all questions and answers into the index, and count the answers of train and val."""
        self._read_graphs(index)
        for split, files in sorted(self.questions.items()):
            for file in files:
                print(f"reading {file}")
                empty = True
                for question_id, entry in file.named():
                    empty = False
                    self._fill_question(index, f"{file}, question {question_id}", split, question_id, entry)
                if empty:
                    raise UserError(f"{file} has no questions: download it again")

    def _read_graphs(self, index: QuestionIndex) -> None:
        """Note the box of every object, on disk, because there are millions."""
        index.connection.execute(
            "CREATE TABLE boxes (picture TEXT, object TEXT, box TEXT, PRIMARY KEY (picture, object))"
        )
        for file in self.graphs:
            print(f"reading {file}")
            for picture, graph in file.named():
                where = f"{file}, picture {picture}"
                size = [get_value(graph, side, where) for side in ("height", "width")]
                objects = get_value(graph, "objects", where)
                if not isinstance(objects, dict):
                    raise UserError(f"{where}: 'objects' must be an object")
                rows = []
                for name, item in objects.items():
                    if not isinstance(item, dict):
                        raise UserError(f"{where}, object {name} is not an object")
                    box = [get_value(item, side, f"{where}, object {name}") for side in ("x", "y", "w", "h")]
                    for value in (*box, *size):
                        check_value(f"{where}, object {name}", "x, y, w, h, width and height", value, int)
                    rows.append((picture, name, json.dumps({"box": box, "size": size})))
                index.connection.executemany("INSERT OR REPLACE INTO boxes VALUES (?, ?, ?)", rows)

    def _fill_question(
        self, index: QuestionIndex, where: str, split: str, question_id: str, entry: dict[str, Any]
    ) -> None:
        picture, text = get_value(entry, "imageId", where), get_value(entry, "question", where)
        check_value(where, "imageId", picture, str)
        if not question_id.isdecimal() or not re.fullmatch(r"n?\d{1,9}", picture):
            raise UserError(f"{where}: ids must be numbers, such as 02930152 and, of its picture, 2354786 or n161313")
        index.add_question(
            where,
            split=split,
            image_id=int(picture.lstrip("n")) + (_OTHER_IMAGES if picture.startswith("n") else 0),
            image_name=f"{picture}.jpg",
            question_id=int(question_id),
            question=text,
        )
        answer = entry.get("answer")
        if answer is None:
            return
        check_value(where, "answer", answer, str)
        types = entry.get("types") or {}
        normal = normalize_answer(answer) or clean_answer(answer).lower()
        index.add_annotation(
            where,
            split=split,
            question_id=int(question_id),
            answers=ten_answers([answer]),
            answer_type=answer_type(normal),
            question_type=str(types.get("structural") or "") if isinstance(types, dict) else "",
            regions=self._regions(index, where, picture, entry.get("annotations") or {}),
        )
        if split in ("train", "val"):
            index.count_answer(normal)

    @staticmethod
    def _regions(index: QuestionIndex, where: str, picture: str, annotations: Any) -> list[dict[str, Any]]:
        """The boxes of the objects that a question's words and its answer name, as far as there is a scene graph."""
        if not isinstance(annotations, dict):
            raise UserError(f"{where}: 'annotations' must be an object")
        names: dict[str, None] = {}
        for part in ("question", "answer"):
            pointers = annotations.get(part) or {}
            if not isinstance(pointers, dict):
                raise UserError(f"{where}: 'annotations' of the {part} must be an object")
            names |= dict.fromkeys(str(name) for name in pointers.values())
        found = (
            index.connection.execute(
                "SELECT box FROM boxes WHERE picture = ? AND object = ?", (picture, name)
            ).fetchone()
            for name in names
        )
        return [json.loads(row[0]) for row in found if row is not None]


def _json_files(raw_dir: Path) -> list[JsonFile]:
    """The JSON files of a folder and of its folders, and those in its zip files of questions and scene graphs."""
    files = [JsonFile(path) for path in sorted(raw_dir.rglob("*.json"))]
    for path in sorted([*raw_dir.glob("questions*.zip"), *raw_dir.glob("sceneGraphs*.zip")]):
        with open_zip(path) as archive:
            files += [JsonFile(path, member) for member in sorted(archive.namelist())]
    return files


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.gqa", description="Prepare GQA from the files as they are downloaded."
    )
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the downloaded files")
    parser.add_argument("--all", action="store_true", help="all questions, not the balanced ones alone")
    add_answer_options(parser, min_answer_count=1)
    add_options(parser)
    arguments = parser.parse_args()
    raw = GQA(arguments.raw_dir, arguments.all)
    prepare(raw, arguments.out_dir, read_options(arguments, **raw.options))


if __name__ == "__main__":
    run_cli(main)
