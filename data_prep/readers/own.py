"""Prepare your own questions about images, or your own captions, listed in a table or a dataset of `datasets`.

    vlabs prepare own --table questions.jsonl --out-dir data/own
    vlabs prepare own --dataset NAME --columns image=img answers=answers.answer --out-dir data/own

Download: nothing; --dataset takes a name on the hub, or a local copy (`hf download`).

The table is JSON lines, a JSON list, CSV or TSV, with a header line. A table of questions has these columns:

- `image`: path of an image, relative to the table's folder or to `--image-root`
- `question`: text in any language, of any length
- `answers` (or `answer`): a list or a single answer (JSON); answers separated by `|` (CSV). Optional: without answers
  nothing can be trained or measured on the questions.
- `split` (optional): `train`, `val`, `test` or any other name. Rows without one are divided between train and val by
  image, so that no image is in both; the division depends only on the paths of the images.
- `question_id` (a whole number or a text), `question_type`, `answer_type` (optional). By default: the row's number
  from 1, the question's first two words, and one of yes/no, number, other.
- `boxes` or `mask` (optional, not both): the part of the image that the row is about. `boxes` is a list of boxes, each
  `[x, y, width, height]` in pixels from the top left corner, or a single box; in CSV, `x y width height`, several
  separated by `|`. `mask` is the path of a gray or black-and-white image of the same aspect ratio, relative like the
  image, in which the part is white. Both refer to the image as a viewer shows it.

A table of captions has `caption` instead of `question`:

- `image`, `split`, `boxes` and `mask`, as above; several rows of one image are several captions of it
- `caption`: text in any language, of any length
- `caption_id` (optional, unique). By default: the row's number from 1.

Instead of a table, `--dataset` streams a dataset of the Hugging Face hub or a local copy. A list of questions or
captions in a row becomes as many rows. Splits keep their names, except `validation`, which becomes `val`; a dataset
with one split is divided like a table without splits. A row without an image or a text is bad.

Fewer than ten answers count as ten, by repeating them in turn, because the official accuracy assumes ten: one answer
counts as ten people agreeing, two as five against five (either is fully right), and each of five different answers is
60% right. Answers are written in normal form ("A red one." becomes "red 1"): if all ten are the same, the official
evaluation compares strings exactly, so "Red" could never be answered with the vocabulary's "red".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from data_prep.engine import hub
from data_prep.engine.folder import is_made, say_ready
from data_prep.engine.pipeline import prepare, prepare_in, raw_files_of
from data_prep.engine.places import ImageStore
from data_prep.engine.reader import Reader, read_options, text_parser
from data_prep.engine.regions import describe_files
from data_prep.engine.tables import as_text, check_table, is_empty, missing_column, read_rows, split_name
from data_prep.engine.texts import CAPTIONS, QUESTIONS, Index, Kind, Text, normal_form
from vlabs.errors import UserError, run_cli
from vlabs.utils.archives import same_name
from vlabs.utils.files import WORK, new_folder, replacing
from vlabs.utils.json_file import check_value

FIELDS = (
    "image", "question", "caption", "answers", "question_id", "caption_id", "question_type", "answer_type", "boxes"
)  # fmt: skip
_ROW = "--dataset"  # a column of the table that a dataset becomes: the row that it comes from, for messages
_IMAGES_OF_TABLE = """
CREATE TABLE table_images (
    image_id INTEGER PRIMARY KEY, name TEXT UNIQUE, draw TEXT, undecided INTEGER DEFAULT 0, in_val INTEGER DEFAULT 0
)
"""


class Row(NamedTuple):
    """A row of the table; what is None was left out."""

    where: str
    image: str | None
    text: str | None
    split: str | None
    item_id: int | str | None
    boxes: list[list[float]]  # x, y, width and height of each
    mask: str | None
    values: dict[str, Any]  # all columns, as they are


class Table(Reader):
    """A table of questions or captions, and the images that it names.

    Args:
        path: of the table.
        image_root: what the images' paths are relative to.
        val_fraction: part of the images of rows without a split that goes into val, in [0, 1).
        name: of the dataset; empty to call it as its folder.

    Raises:
        UserError: there is no such table or folder, it has no rows or a bad one, or the fraction is out of range.
    """

    def __init__(self, path: Path, image_root: Path, val_fraction: float, name: str = "") -> None:
        check_table(path)
        if not image_root.is_dir():
            raise UserError(f"there is no folder {image_root} for the images")
        if not 0 <= val_fraction < 1:
            raise UserError(f"--val-fraction must be at least 0 and below 1, not {val_fraction}")
        super().__init__(image_root)
        self.own_name = name
        self.path = path
        self.image_root = image_root
        self.val_fraction = val_fraction
        self.tables = [path]
        self.store = ImageStore((image_root,))
        self.kind = _kind_of(path)
        masks = {row.mask: image_root / row.mask for row in self._rows() if row.mask is not None}
        self.options = {"val_fraction": val_fraction} | ({"masks": describe_files(masks)} if masks else {})

    @property
    def images(self) -> Sequence[Path]:
        """See `Reader`; there is no end to what may lie in a folder of your own."""
        return []

    def called(self, seen: Mapping[str, int]) -> str:
        """See `Reader`."""
        return self.own_name

    def fill(self, index: Index) -> None:
        """Put all texts into the index.

        Raises:
            UserError: the table cannot be read, or a row is not as it should be.
        """
        print(f"reading {self.path}")
        self._number_images(index.connection)
        numbered: bool | None = None
        for number, row in enumerate(self._rows(), start=1):
            if row.image is None or row.text is None:
                empty = "image" if row.image is None else self.kind.item
                index.add_bad(f"empty {empty}", row.split or "train", row.where)
                continue
            if numbered is None:
                numbered = row.item_id is not None
            if numbered != (row.item_id is not None):
                raise UserError(f"{row.where}: either all rows have a {self.kind.item}_id or none has")
            image_id, in_val = index.connection.execute(
                "SELECT image_id, in_val FROM table_images WHERE name = ?", (self._one_name(row.image),)
            ).fetchone()
            split = row.split or ("val" if in_val else "train")
            item_id = number if row.item_id is None else row.item_id
            text = Text(row.where, split, (row.image,), item_id, row.text, image_id, regions=self._regions(row))
            index.add(_with_answers(text, row) if self.kind is QUESTIONS else text)

    def _regions(self, row: Row) -> list[dict[str, Any]]:
        """What part of the image a row is about, as in `engine.regions`."""
        if row.mask is not None:
            return [{"maps": [[str((self.image_root / row.mask).absolute()), None]]}]
        return [{"box": box} for box in row.boxes]

    def _rows(self) -> Iterator[Row]:
        other = CAPTIONS.item if self.kind is QUESTIONS else QUESTIONS.item
        for place, values in read_rows(self.path):
            where = values.get(_ROW, place)
            if not is_empty(values.get(other)):
                both = not is_empty(values.get(self.kind.item))
                raise UserError(
                    f"{where} has {'both ' if both else ''}a '{other}'"
                    f"{' and' if both else ' where the rows before it have'} a '{self.kind.item}': a table holds"
                    " questions or captions, not both"
                )
            if "answer" in values:
                values.setdefault("answers", values["answer"])
            if self.path.suffix.lower() in (".csv", ".tsv"):  # in which all is text
                if isinstance(answers := values.get("answers"), str):
                    values["answers"] = answers.split("|")
                if re.fullmatch(r"0|[1-9]\d{0,17}", number := values.get(f"{self.kind.item}_id") or ""):
                    values[f"{self.kind.item}_id"] = int(number)
            yield _as_row(where, values, self.kind)

    def _one_name(self, image: str) -> str:
        """One spelling of an image's name, also where it is absolute or leaves the folder to come back to it."""
        root = self.image_root.absolute()
        return os.path.relpath(root / same_name(image), root)

    def _number_images(self, connection: sqlite3.Connection) -> None:
        """Give the images their ids and, where a row leaves it open, the split; one of two spellings is one image."""
        connection.execute(_IMAGES_OF_TABLE)
        for row in self._rows():
            if row.image is None or row.text is None:
                continue
            name = self._one_name(row.image)
            try:
                draw = hashlib.sha256(name.encode()).hexdigest()
            except UnicodeEncodeError:
                raise UserError(f"{row.where}: 'image' is not a path: {row.image!a}") from None
            connection.execute("INSERT OR IGNORE INTO table_images (name, draw) VALUES (?, ?)", (name, draw))
            if row.split is None:
                connection.execute("UPDATE table_images SET undecided = 1 WHERE name = ?", (name,))
        undecided = connection.execute("SELECT count(*) FROM table_images WHERE undecided").fetchone()[0]
        in_val = round(self.val_fraction * undecided)
        if self.val_fraction > 0 and undecided > 1:
            in_val = min(max(in_val, 1), undecided - 1)
        connection.execute(
            "UPDATE table_images SET in_val = 1 WHERE image_id IN"
            " (SELECT image_id FROM table_images WHERE undecided ORDER BY draw LIMIT ?)",
            (in_val,),
        )


def _kind_of(path: Path) -> Kind:
    """Questions or captions, whichever the first row has."""
    first = next(read_rows(path), None)
    if first is None:
        raise UserError(f"{path} has no rows")
    where, values = first
    if "image" not in values:
        raise missing_column(where, values, "image")
    found = [kind for kind in (QUESTIONS, CAPTIONS) if kind.item in values]
    if not found:
        raise missing_column(where, values, QUESTIONS.item, CAPTIONS.item)
    return next((kind for kind in found if not is_empty(values[kind.item])), found[0])


def _as_row(where: str, values: dict[str, Any], kind: Kind) -> Row:
    text, item_id = values.get(kind.item), values.get(f"{kind.item}_id")
    if isinstance(item_id, float) and item_id.is_integer():
        item_id = int(item_id)
    if not is_empty(item_id):
        check_value(where, f"{kind.item}_id", item_id, int, str)
    boxes, mask = _boxes(where, values.get("boxes")), as_text(where, "mask", values.get("mask"))
    if boxes and mask is not None:
        raise UserError(f"{where} has both 'boxes' and a 'mask': leave one out")
    split = as_text(where, "split", values.get("split"))
    return Row(
        where=where,
        image=as_text(where, "image", values.get("image")),
        text=None if is_empty(text) else text,
        split=None if split is None else split_name(split, where),
        item_id=None if is_empty(item_id) else item_id,
        boxes=boxes,
        mask=mask,
        values=values,
    )


def _boxes(where: str, value: object) -> list[list[float]]:
    if isinstance(value, str):  # of CSV
        try:
            value = [[float(number) for number in box.split()] for box in value.split("|")] if value.strip() else []
        except ValueError:
            raise UserError(f"{where}: 'boxes' must be like 10 20 30 40|50 60 70 80, not {value!r:.80}") from None
    boxes: list[Any] = value if isinstance(value, list) else [] if is_empty(value) else [value]
    if boxes and not any(isinstance(box, list) for box in boxes):
        boxes = [boxes]
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise UserError(f"{where}: a box in 'boxes' must be 4 numbers, x, y, width and height, not {box!r:.80}")
    return boxes


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _with_answers(text: Text, row: Row) -> Text:
    names = ("answer_type", "question_type")
    types: dict[str, Any] = {name: as_text(row.where, name, row.values.get(name)) for name in names}
    value = row.values.get("answers")
    answers = value if isinstance(value, list) else [value]
    try:
        given = [one for answer in answers if (one := as_text(row.where, "answers", answer)) is not None]
    except UserError:
        raise UserError(f"{row.where}: 'answers' must be a text or a list of texts, not {value!r:.80}") from None
    return text._replace(answers=[normal_form(answer) for answer in given], **types)


# --- datasets of `datasets` ------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """What is read of a dataset.

    Attributes:
        dataset: on the hub, or a local folder.
        columns: by field of `FIELDS`, the column that it is in; `a.b` is `b` inside `a`, also where `a` is a list.
        config: of the dataset, where it has several.
        splits: by the name that a split gets, the dataset's own; empty for all that it has.
    """

    dataset: str
    columns: dict[str, str]
    config: str | None = None
    splits: dict[str, str] = {}


def read_pairs(option: str, pairs: Sequence[str], known: Sequence[str] = ()) -> dict[str, str]:
    """`A=B` pairs of a command line.

    Raises:
        UserError: one is none, or names what is not known.
    """
    found = {}
    for pair in pairs:
        name, _, value = pair.partition("=")
        if not name or not value:
            raise UserError(f"{option} {pair}: write it as NAME=VALUE")
        if known and name not in known:
            raise UserError(f"{option} {pair}: there is no {name}: choose of {', '.join(known)}")
        found[name] = value
    return found


def write_table(source: Source, folder: Path) -> Path:
    """Stream a dataset into `folder/rows.jsonl` and `folder/images/`, from where an earlier run stopped.

    An image that many rows show is kept once; memory and disk take no more than what is prepared.

    Raises:
        UserError: the dataset cannot be had, lacks a column, or a row is not as it should be.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    recorded = folder / "source.json"
    plain = json.dumps(source._asdict(), sort_keys=True)
    rows, flat = folder / "rows.jsonl", folder / "table.jsonl"
    if not recorded.is_file() or recorded.read_text(encoding="utf-8") != plain:
        rows.unlink(missing_ok=True)
        flat.unlink(missing_ok=True)
        recorded.write_text(plain, encoding="utf-8")
    if flat.is_file():
        return flat
    done = _whole_rows(rows)
    with rows.open("a", encoding="utf-8") as file:
        streams = hub.open_streams(source.dataset, source.config, source.splits)
        for split, stream in streams.items():
            columns = _columns(source, hub.columns_of(stream), split)
            own = None if list(streams) == ["train"] else split  # one split is divided as a table without any is
            for number, row in hub.rows_of(source.dataset, split, stream, done.get(split, 0)):
                where = f"--dataset {source.dataset}, {split}, row {number}"
                entries = list(_entries(where, row, columns, own, images, Path(source.dataset)))
                file.write(json.dumps({"row": [split, number], "entries": entries}, ensure_ascii=False) + "\n")
                if number % 1000 == 0:
                    file.flush()
    with rows.open(encoding="utf-8") as read, replacing(flat) as part, part.open("w", encoding="utf-8") as written:
        for line in read:
            for entry in json.loads(line)["entries"]:
                written.write(json.dumps(entry, ensure_ascii=False) + "\n")
    return flat


def _whole_rows(table: Path) -> dict[str, int]:
    """Rows of each split that are there; what a stopped run left of a row is cut off."""
    done: dict[str, int] = {}
    if not table.is_file():
        return done
    end = 0
    with table.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            split, number = json.loads(line)["row"]
            done[split] = number + 1
            end += len(line)
    with table.open("r+b") as file:
        file.truncate(end)
    return done


def _columns(source: Source, names: Sequence[str], split: str) -> dict[str, str]:
    """The columns of the fields that are there; those that were named must be."""
    # Ids of a dataset need not occur once: only where somebody says so.
    columns = {one: one for one in FIELDS if one in names and not one.endswith("_id")} | source.columns
    if "answers" not in columns and "answer" in names:
        columns["answers"] = "answer"
    where, has = f"--dataset {source.dataset}, {split}", f"it has {', '.join(names)}"
    for one, column in columns.items():
        if column.split(".")[0] not in names:
            raise UserError(
                f"{where}: there is no column {column} for {one}: name it with --columns {one}=COLUMN; {has}"
            )
    if "question" in source.columns:
        columns.pop("caption", None)
    if "caption" in source.columns:
        columns = {one: column for one, column in columns.items() if not one.startswith(("question", "answer"))}
    if "image" not in columns or not {"question", "caption"} & columns.keys():
        raise UserError(
            f"{where}: which columns hold the image and the question or caption? Name them with --columns image=COLUMN"
            f" question=COLUMN; {has}"
        )
    return columns


def _value(row: Any, path: str) -> Any:
    """`a.b` of a row; of a list of `a` the list of their `b`."""
    for name in path.split("."):
        if isinstance(row, list):
            row = [_value(one, name) for one in row]
        else:
            row = row.get(name) if isinstance(row, dict) else None
    return row


def _entries(
    where: str, row: dict[str, Any], columns: dict[str, str], split: str | None, images: Path, folder: Path
) -> Iterator[dict[str, Any]]:
    """The lines of the table that a row of the dataset makes: one per question or caption."""
    values = {one: _value(row, column) for one, column in columns.items()}
    try:
        content = hub.picture_of(where, values.pop("image"), folder)
        entry: dict[str, Any] = {"image": None if content is None else _keep(content, images)}
    except FileNotFoundError as error:
        entry = {"image": f"missing/{error}"}  # where no image is, so that it is named and counted
    entry |= {_ROW: where} | ({} if split is None else {"split": split})
    both = [one for one in ("question", "caption") if one in values]
    asked = next((one for one in both if values[one] is not None), both[0])
    texts = values.pop(asked)
    values = {one: value for one, value in values.items() if value is not None and one not in ("question", "caption")}
    if not isinstance(texts, list):
        yield entry | {asked: texts} | values
        return
    for place, text in enumerate(texts):
        own = {}
        for one, value in values.items():
            own[one] = value
            if one != "boxes" and isinstance(value, list):
                if len(value) != len(texts):
                    raise UserError(f"{where} has {len(texts)} {asked}s and {len(value)} of {one}")
                own[one] = value[place]
        yield entry | {asked: text} | own


def _keep(content: bytes, images: Path) -> str:
    """Write an image once, by its content, and return its path in the table's folder."""
    digest = hashlib.sha256(content).hexdigest()
    path = images / digest[:2] / digest
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            partial.write_bytes(content)
    return f"images/{digest[:2]}/{digest}"


def main() -> None:
    """Run the command line."""
    parser = text_parser("own", __doc__, min_answer_count=1)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=Path, help="table with image, and question, answers, ... or caption")
    what.add_argument("--dataset", help="instead of a table, a dataset of the hub, or a local copy's folder")
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
        "--val-fraction", type=float, default=0.1,
        help="part of the images of rows without a split that goes into val (default %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_args()
    options, fraction, out_dir = read_options(arguments), arguments.val_fraction, arguments.out_dir.absolute()
    if arguments.dataset is None:
        if given := [name for name in ("columns", "splits", "config") if getattr(arguments, name)]:
            raise UserError(f"--{given[0]} is of --dataset, and a --table is given")
        prepare(Table(arguments.table, arguments.image_root or arguments.table.parent, fraction), out_dir, options)
        return
    columns, splits = read_pairs("--columns", arguments.columns, FIELDS), read_pairs("--splits", arguments.splits)
    source = Source(arguments.dataset, columns, arguments.config, splits)
    of_source = {"val_fraction": fraction, "source": source._asdict()}
    if is_made(out_dir, options.recorded(CAPTIONS, of_source)):  # without what is of questions alone
        return
    with new_folder(out_dir, "--out-dir", resumable=True) as partial:
        folder = partial / WORK / "source"  # images and texts as they came
        table = Table(write_table(source, folder), folder, fraction, PurePosixPath(arguments.dataset).name)
        table.options |= of_source
        made = prepare_in(partial, table, options, out_dir.name, raw_files_of(table))
    say_ready(out_dir, made)


if __name__ == "__main__":
    run_cli(main)
