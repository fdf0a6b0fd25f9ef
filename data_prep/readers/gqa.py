"""Prepare GQA: questions, and their regions from the scene graphs.

    vlabs prepare gqa --raw-dir downloads --out-dir data/gqa

Download: `questions1.2.zip`, `sceneGraphs.zip` and `images.zip` or `allImages.zip`, of
https://cs.stanford.edu/people/dorarad/gqa/download.html.

Nothing needs unpacking, but the files `train_balanced_questions.json`, `train_sceneGraphs.json` and so on and a folder
of images work too. The balanced questions are prepared, as `train`, `val`, `testdev` and `test`; with `--all` all of
them. Their ids are GQA's, as texts, because two may differ only in a leading zero. A question's answer counts as given
by all ten annotators of VQA v2, so that its score is 0 or 100. The region of a question is the boxes of the objects
that its annotations of question and answer name, if there is a scene graph. `question_type` is GQA's structural type. A
stopped run continues when it is started again.

    vlabs train experiment=vqav2_absvit_base data.dir=data/gqa
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from data_prep.engine.places import json_files
from data_prep.engine.reader import Reader, command
from data_prep.engine.texts import Index, Text, normal_form
from vlabs.errors import UserError, run_cli
from vlabs.utils.json_file import JsonFile, check_value, get_value

_QUESTIONS = re.compile(r"(train|val|testdev|test)_(balanced|all)_questions(?:_\d+)?\.json")
_GRAPHS = re.compile(r"(?:train|val)_sceneGraphs\.json")


class GQA(Reader):
    """The raw files of GQA in one folder.

    Args:
        raw_dir: the folder.
        all_questions: not the balanced ones alone.

    Raises:
        UserError: there are none.
    """

    name = "gqa"
    official = {"train": 943_000, "val": 132_062, "testdev": 12_578, "test": 95_336}

    def __init__(self, raw_dir: Path, all_questions: bool = False) -> None:
        super().__init__(raw_dir)
        wanted = "all" if all_questions else "balanced"
        self.questions: dict[str, list[JsonFile]] = {}
        self.graphs: list[JsonFile] = []
        for file in json_files(raw_dir, "[qs]*.zip"):
            match = _QUESTIONS.fullmatch(file.name)
            if match and match[2] == wanted:
                self.questions.setdefault(match[1], []).append(file)
            elif _GRAPHS.fullmatch(file.name):
                self.graphs.append(file)
        if not self.questions:
            raise UserError(
                f"{raw_dir} holds no {wanted} questions: questions1.2.zip, or files such as"
                f" train_{wanted}_questions.json, of https://cs.stanford.edu/people/dorarad/gqa/download.html"
            )
        if all_questions:
            self.options["all"] = True
        files = [*(file for files in self.questions.values() for file in files), *self.graphs]
        self.tables = list(dict.fromkeys(file.path for file in files))

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """See `Reader`."""
        super().add_options(parser)
        what = "all questions, not the balanced ones alone"
        parser.add_argument("--all", action="store_true", dest="all_questions", help=what)

    def fill(self, index: Index) -> None:
        """Put all questions into the index, with the boxes of their objects."""
        self._read_graphs(index)
        for split, files in sorted(self.questions.items()):
            for file in files:
                print(f"reading {file}")
                empty = True
                for question_id, entry in file.named():
                    empty = False
                    index.add(self._question(index, f"{file}, question {question_id}", split, question_id, entry))
                if empty:
                    raise UserError(f"{file} has no questions: download it again")

    def _read_graphs(self, index: Index) -> None:
        """Note the box of every object, on disk, because there are millions."""
        index.connection.execute(
            "CREATE TABLE boxes (picture TEXT, object TEXT, box TEXT, PRIMARY KEY (picture, object))"
        )
        for file in self.graphs:
            print(f"reading {file}")
            for picture, graph in file.named():
                where = f"{file}, image {picture}"
                size = [get_value(graph, side, where) for side in ("height", "width")]
                rows = []
                for name, item in get_value(graph, "objects", where, dict).items():
                    check_value(where, name, item, dict)
                    box = [get_value(item, side, f"{where}, object {name}") for side in ("x", "y", "w", "h")]
                    for value in (*box, *size):
                        check_value(f"{where}, object {name}", "x, y, w, h, width and height", value, int)
                    rows.append((picture, name, json.dumps({"box": box, "size": size})))
                index.connection.executemany("INSERT OR REPLACE INTO boxes VALUES (?, ?, ?)", rows)

    def _question(self, index: Index, where: str, split: str, question_id: str, entry: dict[str, Any]) -> Text:
        picture, text = get_value(entry, "imageId", where, str), get_value(entry, "question", where)
        answer, types = entry.get("answer"), entry.get("types") or {}
        if answer is not None:
            check_value(where, "answer", answer, str)
        return Text(
            where,
            split,
            (f"{picture}.jpg",),
            question_id,
            text,
            answers=() if answer is None else [answer],
            major=None if answer is None else normal_form(answer),
            question_type=str(types.get("structural") or "") if isinstance(types, dict) else "",
            regions=() if answer is None else self._regions(index, where, picture, entry.get("annotations") or {}),
        )

    @staticmethod
    def _regions(index: Index, where: str, picture: str, annotations: Any) -> list[dict[str, Any]]:
        """The boxes of the objects that a question's words and its answer name, as far as there is a scene graph."""
        check_value(where, "annotations", annotations, dict)
        names: dict[str, None] = {}
        for part in ("question", "answer"):
            pointers = annotations.get(part) or {}
            if not isinstance(pointers, dict):
                raise UserError(f"{where}: 'annotations' of the {part} must be an object")
            names |= dict.fromkeys(str(name) for name in pointers.values())
        box = "SELECT box FROM boxes WHERE picture = ? AND object = ?"
        found = (index.connection.execute(box, (picture, name)).fetchone() for name in names)
        return [json.loads(row[0]) for row in found if row is not None]


main = command(GQA)

if __name__ == "__main__":
    run_cli(main)
