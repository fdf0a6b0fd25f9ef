"""Prepare your own questions about images, or your own captions, listed in a table.

    python -m data_prep.own --table questions.jsonl --out-dir data/own
    python -m data_prep.own --dataset NAME --columns image=img answers=answers.answer --out-dir data/own

The table is JSON lines or CSV (UTF-8, with a header line). A table of questions has these columns:

- `image`: path of an image, relative to the table's folder or to `--image-root`
- `question`: text of any language and length
- `answers`: a list or a single string (JSON lines); answers separated by `|` (CSV). May be left out.
- `split`, if wanted: `train`, `val`, `test` or any other name. Rows without one are divided between train and val by
  image, so that no image is in both; which images go where depends on their paths alone.
- `question_id` (whole number), `question_type`, `answer_type`, if wanted. Otherwise: the row's number from 1, the
  question's first two words, and one of yes/no, number, other.
- `boxes` or `mask`, if wanted, not both: what part of the picture the row is about, whether it has answers or not.
  `boxes` is a list of boxes, each `[x, y, width, height]` in pixels from the top left corner, or a single such box; in
  CSV, `x y width height`, several separated by `|`. `mask` is the path of a gray or black and white picture, relative
  like the image and of the same aspect, in which white is what the row is about.

A table of captions has `caption` instead of `question`:

- `image`, `split`, `boxes` and `mask`, as above; several rows of one image are several captions of it
- `caption`: text of any language and length
- `caption_id` (whole number, once in the table), if wanted. Otherwise: the row's number from 1.

In the place of a table, `--dataset` streams a data set of the Hugging Face hub, or of a local copy; see
`data_prep.engine.hub`. A list of questions or captions in a row is as many rows. Its splits are taken as they are,
`validation` as `val`; a data set of one split is divided as a table without splits is.

Fewer than ten answers count as ten, those given in turn, because the official accuracy is made for ten: one answer
counts as ten people agreeing, two as five against five (either is fully right), and of five different answers each is
60% right. The answers are written in normal form ("A red one." becomes "red 1"): where all ten are the same,
the official evaluation compares letter by letter, so "Red" could never be answered with the vocabulary's "red".
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from data_prep.engine.hub import FIELDS, Source, read_pairs, write_table
from data_prep.engine.images import ImageStore
from data_prep.engine.json_file import read_lines
from data_prep.engine.pipeline import (
    Options,
    add_options,
    check_split_name,
    is_made,
    prepare,
    prepare_in,
    raw_files_of,
    read_options,
    say_ready,
)
from data_prep.engine.reader import add_answer_option, new_parser
from data_prep.engine.regions import describe_files
from data_prep.engine.texts import CAPTIONS, QUESTIONS, Index, Kind, Text, normal_form
from vlabs.errors import UserError, run_cli
from vlabs.utils.files import WORK, new_folder

_IMAGES_OF_TABLE = """
CREATE TABLE table_images (
    image_id INTEGER PRIMARY KEY, name TEXT UNIQUE, draw TEXT, undecided INTEGER DEFAULT 0, in_val INTEGER DEFAULT 0
)
"""


@dataclass(frozen=True)
class Row:
    """A row of the table; what is None was left out."""

    where: str
    item: str  # "question" or "caption"
    image: str
    text: str
    split: str | None
    item_id: int | None
    boxes: list[list[float]]  # x, y, width and height of each
    mask: str | None
    values: dict[str, Any]  # all columns, as they are


class Table:
    """A table of questions or captions, and the images that it names.

    Args:
        path: a `.jsonl` or `.csv` file.
        image_root: what the images' paths are relative to.
        val_fraction: part of the images of rows without a split that goes into val, in [0, 1).

    Raises:
        UserError: there is no such table or folder, or the fraction is out of range.
    """

    kind: ClassVar[Kind]

    def __init__(self, path: Path, image_root: Path, val_fraction: float) -> None:
        if not image_root.is_dir():
            raise UserError(f"there is no folder {image_root} for the images")
        if not 0 <= val_fraction < 1:
            raise UserError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}")
        self.name = ""
        self.path = path
        self.image_root = image_root
        self.val_fraction = val_fraction
        self.tables: Sequence[Path] = [path]
        self.images: Sequence[Path] = []

    def image_store(self, split: str) -> ImageStore:
        """Return where the images are."""
        return ImageStore((self.image_root,))

    def called(self, seen: Mapping[str, int]) -> str:
        """Return the data set's name; empty for that of the prepared folder."""
        return self.name

    def texts(self, connection: sqlite3.Connection) -> Iterator[Text]:
        """Yield all texts; see `placed_rows`."""
        raise NotImplementedError

    def fill(self, index: Index) -> None:
        """Put all texts into the index."""
        for text in self.texts(index.connection):
            index.add(text)

    def options(self) -> dict[str, Any]:
        """Return what the options have to say of the masks that the table names, so that others start anew.

        Raises:
            UserError: the table cannot be read, or a row is not as it should be.
        """
        masks = {row.mask: self.image_root / row.mask for row in self._rows() if row.mask is not None}
        return {"masks": describe_files(masks)} if masks else {}

    def regions(self, row: Row) -> list[dict[str, Any]]:
        """Return what part of the picture a row is about, as in `data_prep.engine.regions`."""
        if row.mask is not None:
            return [{"maps": [[str((self.image_root / row.mask).absolute()), None]]}]
        return [{"box": box} for box in row.boxes]

    def placed_rows(self, connection: sqlite3.Connection) -> Iterator[tuple[Text, Row]]:
        """Yield the rows, each as a text.

        Args:
            connection: of the index, where the images are numbered.

        Raises:
            UserError: the table cannot be read, or a row is not as it should be.
        """
        print(f"reading {self.path}")
        self._number_images(connection)
        numbered: bool | None = None
        for number, row in enumerate(self._rows(), start=1):
            if numbered is None:
                numbered = row.item_id is not None
            if numbered != (row.item_id is not None):
                raise UserError(f"{row.where}: either all rows have a {self.kind.item}_id or none has")
            image_id, in_val = connection.execute(
                "SELECT image_id, in_val FROM table_images WHERE name = ?", (row.image,)
            ).fetchone()
            split = row.split or ("val" if in_val else "train")
            item_id = number if row.item_id is None else row.item_id
            yield Text(row.where, split, (row.image,), item_id, row.text, image_id, regions=self.regions(row)), row

    def _rows(self) -> Iterator[Row]:
        for row in read_rows(self.path):
            if row.item != self.kind.item:
                raise UserError(
                    f"{row.where} has a '{row.item}' where the rows before it have a '{self.kind.item}': a table holds"
                    " questions or captions, not both"
                )
            yield row

    def _number_images(self, connection: sqlite3.Connection) -> None:
        """Give the images their ids and, where a row leaves it open, the split."""
        connection.execute(_IMAGES_OF_TABLE)
        for row in self._rows():
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


class QuestionTable(Table):
    """A table of questions about images."""

    kind = QUESTIONS

    def texts(self, connection: sqlite3.Connection) -> Iterator[Text]:
        """See `Table`."""
        for text, row in self.placed_rows(connection):
            answers = _answers(row.where, row.values.get("answers"))
            types: dict[str, Any] = {
                name: _text(row.where, row.values, name) for name in ("answer_type", "question_type")
            }
            yield text._replace(answers=answers, **types)


class CaptionTable(Table):
    """A table of captions of images."""

    kind = CAPTIONS

    def texts(self, connection: sqlite3.Connection) -> Iterator[Text]:
        """See `Table`."""
        return (text for text, _ in self.placed_rows(connection))


def open_table(path: Path, image_root: Path, val_fraction: float) -> QuestionTable | CaptionTable:
    """Return a table of questions or of captions, whichever its first row has.

    Raises:
        UserError: there is no such table or folder, it has no rows, or the fraction is out of range.
    """
    if not path.is_file():
        raise UserError(f"there is no table {path}")
    if path.suffix not in (".jsonl", ".csv"):
        raise UserError(f"{path}: a table is a .jsonl or a .csv file")
    first = next(read_rows(path), None)
    if first is None:
        raise UserError(f"{path} has no rows")
    if first.item == CAPTIONS.item:
        return CaptionTable(path, image_root, val_fraction)
    return QuestionTable(path, image_root, val_fraction)


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a table.

    Raises:
        UserError: the table cannot be read, or a row is not as it should be.
    """
    if path.suffix == ".jsonl":
        for where, values in read_lines(path):
            yield _as_row(where, values)
        return
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for where, values in _read_csv(path, file):
                yield _as_row(where, values)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None


def _read_csv(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines, strict=True)
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if None in values:
                raise UserError(f"{where} has more columns than the header")
            values["answers"] = (values.get("answers") or "").split("|")
            values["boxes"] = _split_boxes(where, values.get("boxes") or "")
            yield where, values
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not CSV: {error}") from None


def _as_row(where: str, values: dict[str, Any]) -> Row:
    image = _text(where, values, "image")
    item, text = _item(where, values)
    if image is None or not isinstance(text, str):
        raise UserError(f"{where} needs an 'image' and a 'question' or a 'caption', all text")
    split, item_id = _text(where, values, "split"), values.get(f"{item}_id")
    if isinstance(item_id, str):
        try:
            item_id = int(item_id) if item_id.strip() else None
        except ValueError:
            raise UserError(f"{where}: '{item}_id' must be a whole number, not {item_id!r:.80}") from None
    if isinstance(item_id, bool) or not isinstance(item_id, int | None):
        raise UserError(f"{where}: '{item}_id' must be a whole number, not {item_id!r:.80}")
    boxes, mask = _boxes(where, values.get("boxes")), _text(where, values, "mask")
    if boxes and mask is not None:
        raise UserError(f"{where} has both 'boxes' and a 'mask': leave one out")
    return Row(
        where=where,
        item=item,
        image=image,
        text=text,
        split=None if split is None else check_split_name(split, where),
        item_id=item_id,
        boxes=boxes,
        mask=mask,
        values=values,
    )


def _item(where: str, values: dict[str, Any]) -> tuple[str, object]:
    """Return what a row holds, question or caption, and its value, which is None where it holds neither."""
    found = {name: values[name] for name in ("question", "caption") if values.get(name) is not None}
    if len(found) == 2:
        # CSV with both columns says with an empty field that there is none.
        found = {name: value for name, value in found.items() if value != ""}
    if len(found) == 2:
        raise UserError(f"{where} has both a 'question' and a 'caption': a table holds questions or captions")
    return next(iter(found.items()), ("question", None))


def _text(where: str, values: dict[str, Any], name: str) -> str | None:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: '{name}' must be text, not {value!r:.80}")
    return value or None


def _split_boxes(where: str, text: str) -> list[list[float]]:
    """The boxes of a CSV field."""
    try:
        return [[float(number) for number in box.split()] for box in text.split("|")] if text.strip() else []
    except ValueError:
        raise UserError(f"{where}: 'boxes' must be like 10 20 30 40|50 60 70 80, not {text!r:.80}") from None


def _boxes(where: str, value: object) -> list[list[float]]:
    boxes: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    if boxes and not any(isinstance(box, list) for box in boxes):
        boxes = [boxes]
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) <= 0:
            raise UserError(
                f"{where}: a box in 'boxes' must be 4 numbers, x, y, width and height, the last two above 0, not"
                f" {box!r:.80}"
            )
    return boxes


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _answers(where: str, value: object) -> list[str]:
    answers = [value] if isinstance(value, str) else value or []
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: 'answers' must be a text or a list of texts, not {value!r:.80}")
    return [normal_form(answer) for answer in answers if answer.strip()]


def main() -> None:
    """Run the command line."""
    parser = new_parser("own", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=Path, help=".jsonl or .csv with image, and question, answers, ... or caption")
    what.add_argument("--dataset", help="in the place of a table, a data set of the hub, or a local copy's folder")
    parser.add_argument(
        "--columns", nargs="+", default=[], metavar="FIELD=COLUMN",
        help=f"which columns of --dataset hold what, where they are called otherwise: {', '.join(FIELDS)}",
    )  # fmt: skip
    parser.add_argument(
        "--splits", nargs="+", default=[], metavar="OURS=THEIRS", help="splits of --dataset to take (default: all)"
    )
    parser.add_argument("--config", help="of --dataset, where it has several")
    parser.add_argument(
        "--image-root", type=Path, help="what the images' paths are relative to (default: the table's folder)"
    )
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.1,
        help="part of the images of rows without a split that goes into val (default %(default)s)",
    )
    add_answer_option(parser, 1)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.dataset is None:
        if given := [name for name in ("columns", "splits", "config") if getattr(arguments, name)]:
            raise UserError(f"--{given[0]} is of --dataset, and a --table is given")
        root = arguments.image_root or arguments.table.parent
        rows: Any = open_table(arguments.table, root, arguments.val_fraction)
        prepare(rows, arguments.out_dir, _options(arguments, rows, {}))
        return
    source = Source(
        arguments.dataset,
        read_pairs("--columns", arguments.columns, FIELDS),
        arguments.config,
        read_pairs("--splits", arguments.splits),
    )
    out_dir: Path = arguments.out_dir.absolute()
    wanted = read_options(arguments, val_fraction=arguments.val_fraction, source=source.plain())
    if is_made(out_dir, wanted.recorded(CAPTIONS)):  # without what is of questions alone
        return
    with new_folder(out_dir, "--out-dir", resumable=True) as partial:
        folder = partial / WORK / "source"  # pictures and texts as they came
        table: Any = open_table(write_table(source, folder), folder, arguments.val_fraction)
        table.name = PurePosixPath(arguments.dataset).name
        options = _options(arguments, table, {"source": source.plain()})
        splits = prepare_in(partial, table, options, out_dir.name, raw_files_of(table))
    say_ready(out_dir, splits)


def _options(arguments: argparse.Namespace, table: Table, others: dict[str, Any]) -> Options:
    return read_options(arguments, val_fraction=arguments.val_fraction, **table.options(), **others)


if __name__ == "__main__":
    run_cli(main)
