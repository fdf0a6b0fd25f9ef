"""Prepare your own questions about images, listed in a table.

    python -m data_prep.own --table questions.jsonl --out-dir data/own

The table is JSON lines or CSV (UTF-8, with a header line) with these columns:

- `image`: path of an image, relative to the table's folder or to `--image-root`
- `question`: text of any language and length
- `answers`: a list or a single string (JSON lines); answers separated by `|` (CSV). May be left out.
- `split`, if wanted: `train`, `val`, `test` or any other name. Rows without one are divided between train and val by
  image, so that no image is in both; which images go where depends on their paths alone.
- `question_id` (whole number), `question_type`, `answer_type`, if wanted. Otherwise: the row's number from 1, the
  question's first two words, and one of yes/no, number, other.

Fewer than ten answers are repeated in turn until they are ten, because the official accuracy is made for ten: one
answer counts as ten people agreeing, two as five against five (either is fully right), and of five different answers
each is 60% right. The answers are written in normal form ("A red one." becomes "red 1"): where all ten are the same,
the official evaluation compares letter by letter, so "Red" could never be answered with the vocabulary's "red".
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.images import ImageStore
from data_prep.pipeline import QuestionIndex, add_options, check_split_name, prepare, read_options
from vlabs.errors import UserError, run_cli
from vlabs.metrics.vqa import clean_answer, normalize_answer

_HUMANS = 10
_NUMBER = re.compile(r"[-+]?\d+([.,:]\d+)*")
_IMAGES_OF_TABLE = """
CREATE TABLE table_images (
    image_id INTEGER PRIMARY KEY, name TEXT UNIQUE, draw TEXT, undecided INTEGER DEFAULT 0, in_val INTEGER DEFAULT 0
)
"""


@dataclass(frozen=True)
class Row:
    """A question of the table; what is None was left out."""

    where: str
    image: str
    question: str
    answers: list[str]
    split: str | None
    question_id: int | None
    question_type: str | None
    answer_type: str | None


class Table:
    """A table of questions, and the images that it names.

    Args:
        path: a `.jsonl` or `.csv` file.
        image_root: what the images' paths are relative to.
        val_fraction: part of the images of rows without a split that goes into val, in [0, 1).

    Raises:
        UserError: there is no such table or folder, or the fraction is out of range.
    """

    name = "own"

    def __init__(self, path: Path, image_root: Path, val_fraction: float) -> None:
        if not path.is_file():
            raise UserError(f"there is no table {path}")
        if path.suffix not in (".jsonl", ".csv"):
            raise UserError(f"{path}: a table is a .jsonl or a .csv file")
        if not image_root.is_dir():
            raise UserError(f"there is no folder {image_root} for the images")
        if not 0 <= val_fraction < 1:
            raise UserError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}")
        self.path = path
        self.image_root = image_root
        self.val_fraction = val_fraction
        self.tables: Sequence[Path] = [path]
        self.images: Sequence[Path] = []

    def image_store(self, split: str) -> tuple[str, ImageStore]:
        """Return where the images are; ids are the table's, whatever the split."""
        return "table", ImageStore(self.image_root)

    def rows(self) -> Iterator[Row]:
        """Yield the rows of the table.

        Raises:
            UserError: the table cannot be read, or a row is not as it should be.
        """
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                read = _read_jsonl if self.path.suffix == ".jsonl" else _read_csv
                for where, values in read(self.path, file):
                    yield _as_row(where, values)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not UTF-8 text: {error}") from None

    def fill(self, index: QuestionIndex) -> None:
        """Put all questions and answers into the index, and count the answers of train and val."""
        print(f"reading {self.path}")
        self._number_images(index)
        numbered: bool | None = None
        for number, row in enumerate(self.rows(), start=1):
            if numbered is None:
                numbered = row.question_id is not None
            if numbered != (row.question_id is not None):
                raise UserError(f"{row.where}: either all rows have a question_id or none has")
            image_id, in_val = index.connection.execute(
                "SELECT image_id, in_val FROM table_images WHERE name = ?", (row.image,)
            ).fetchone()
            split = row.split or ("val" if in_val else "train")
            question_id = number if row.question_id is None else row.question_id
            index.add_question(
                row.where,
                split=split,
                image_id=image_id,
                image_name=row.image,
                question_id=question_id,
                question=row.question,
            )
            if not row.answers:
                continue
            major = Counter(row.answers).most_common(1)[0][0]
            index.add_annotation(
                row.where,
                split=split,
                question_id=question_id,
                answers=ten_answers(row.answers),
                answer_type=row.answer_type or answer_type(major),
                question_type=row.question_type or " ".join(row.question.lower().split()[:2]),
            )
            if split in ("train", "val"):
                index.count_answer(major)

    def _number_images(self, index: QuestionIndex) -> None:
        """Give the images their ids and, where a row leaves it open, the split."""
        connection = index.connection
        connection.execute(_IMAGES_OF_TABLE)
        for row in self.rows():
            try:
                draw = hashlib.sha256(row.image.encode()).hexdigest()
            except UnicodeEncodeError:
                raise UserError(f"{row.where}: 'image' is not a path: {row.image!a}") from None
            connection.execute("INSERT OR IGNORE INTO table_images (name, draw) VALUES (?, ?)", (row.image, draw))
            if row.split is None:
                connection.execute("UPDATE table_images SET undecided = 1 WHERE name = ?", (row.image,))
        undecided = connection.execute("SELECT count(*) FROM table_images WHERE undecided").fetchone()[0]
        in_val = round(self.val_fraction * undecided)
        if self.val_fraction > 0 and undecided > 1:
            in_val = min(max(in_val, 1), undecided - 1)
        connection.execute(
            "UPDATE table_images SET in_val = 1 WHERE image_id IN"
            " (SELECT image_id FROM table_images WHERE undecided ORDER BY draw LIMIT ?)",
            (in_val,),
        )


def ten_answers(answers: Sequence[str]) -> list[str]:
    """Return at least ten answers, those given in turn."""
    return list(itertools.islice(itertools.cycle(answers), max(_HUMANS, len(answers))))


def answer_type(answer: str) -> str:
    """Return `yes/no`, `number` or `other` for an answer in normal form."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(answer) else "other"


def _read_jsonl(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{where} is not an object with 'image' and 'question'")
        yield where, values


def _read_csv(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines, strict=True)
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if None in values:
                raise UserError(f"{where} has more columns than the header")
            values["answers"] = (values.get("answers") or "").split("|")
            yield where, values
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _as_row(where: str, values: dict[str, Any]) -> Row:
    def text(name: str) -> str | None:
        value = values.get(name)
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: '{name}' must be text, not {value!r:.80}")
        return value or None

    image, question, split, question_id = (
        text("image"),
        values.get("question"),
        text("split"),
        values.get("question_id"),
    )
    if image is None or not isinstance(question, str):
        raise UserError(f"{where} needs an 'image' and a 'question', both text")
    if isinstance(question_id, str):
        try:
            question_id = int(question_id) if question_id.strip() else None
        except ValueError:
            raise UserError(f"{where}: 'question_id' must be a whole number, not {question_id!r:.80}") from None
    if isinstance(question_id, bool) or not isinstance(question_id, int | None):
        raise UserError(f"{where}: 'question_id' must be a whole number, not {question_id!r:.80}")
    return Row(
        where=where,
        image=image,
        question=question,
        answers=_answers(where, values.get("answers")),
        split=None if split is None else check_split_name(split, where),
        question_id=question_id,
        question_type=text("question_type"),
        answer_type=text("answer_type"),
    )


def _answers(where: str, value: object) -> list[str]:
    answers = [value] if isinstance(value, str) else value or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: 'answers' must be a text or a list of texts, not {value!r:.80}")
    return [_normal_form(answer) for answer in answers if answer.strip()]


def _normal_form(answer: str) -> str:
    # "A", "?" or "the" have an empty official form, and may well be the answers of a table.
    return normalize_answer(answer) or clean_answer(answer).lower()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.own", description="Prepare your own questions about images, listed in a table."
    )
    parser.add_argument("--table", type=Path, required=True, help=".jsonl or .csv with image, question, answers, ...")
    parser.add_argument(
        "--image-root", type=Path, help="what the images' paths are relative to (default: the table's folder)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="part of the images of rows without a split that goes into val (default %(default)s)",
    )
    add_options(parser, min_answer_count=1)
    arguments = parser.parse_args()
    options = read_options(arguments, val_fraction=arguments.val_fraction)
    table = Table(arguments.table, arguments.image_root or arguments.table.parent, arguments.val_fraction)
    prepare(table, arguments.out_dir, options)


if __name__ == "__main__":
    run_cli(main)
