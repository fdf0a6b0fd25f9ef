"""Prepare images with one class each: class folders, tar files of them, a table, or a dataset of `datasets`.

    vlabs prepare classes --raw-dir RAW --out-dir data/mine                    # RAW/train, RAW/val or their .tar
    vlabs prepare classes --table images.csv --out-dir data/mine             # columns image, class, split
    vlabs prepare classes --dataset NAME_OR_FOLDER --out-dir data/mine

Download: nothing special; any images with one class each.

Images of folders, tar files and tables stay where they are: only the place of each one is written, and it is read there
later. So preparing 1.3 million images takes as long as reading the headers of a tar file. Classes that are whole
numbers are in numeric order, others are sorted as texts. A row without an image or a class (or with -1, which datasets
use for none) is bad.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from data_prep.engine import hub
from data_prep.engine.folder import BadItem
from data_prep.engine.places import count_others, is_picture
from data_prep.engine.reader import new_parser
from data_prep.engine.tables import as_text, check_table, is_empty, missing_column, read_rows, split_name
from data_prep.engine.tars import PACKED, check_not_packed, members, open_tar
from data_prep.engine.units import Batches, Folder, Row, Unit, prepare_units
from vlabs.data.features import CLASS_FEATURES
from vlabs.errors import UserError, run_cli, show
from vlabs.utils.archives import is_clutter, same_name, walk
from vlabs.utils.files import write_json

_PART = pa.schema(
    {"label": pa.string(), "path": pa.string(), "offset": pa.int64(), "size": pa.int64(), "image": pa.binary()}
)


def entry(label: str, path: Path | None = None, offset: int = 0, size: int = 0, image: bytes = b"") -> Row:
    """An image: its class, and its bytes or the part of a file that they are."""
    place = "" if path is None else storable(path.absolute())
    return {"label": label, "path": place, "offset": offset, "size": size, "image": image}


def entry_in(split: str, where: str, label: str, path: Path, offset: int, size: int) -> Row | BadItem:
    """An image that lies in a file, unless there is none of it."""
    return entry(label, path, offset, size) if size else BadItem("empty image", split, where)


def storable(path: Path) -> str:
    """A path for a prepared row: as a URI where it is no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return path.absolute().as_uri()
    return str(path)


def prepare_classes(
    units: Sequence[Unit],
    raw_files: Sequence[Path],
    out_dir: str | Path,
    name: str,
    classes: Sequence[str] | None = None,
    on_bad: str = "error",
) -> None:
    """Write the prepared folder `out_dir`, see `prepare_units`.

    Args:
        units: what to read.
        raw_files: what they are read from; a run that was stopped continues if names, sizes and times are the same.
        name: of the dataset.
        classes: all class names in the order of their labels; those that occur, sorted, if not given.
        on_bad: see `prepare_units`.
    """
    label_of: dict[str, int] = {}
    seen: dict[str, set[int]] = {}

    def place(read: Callable[[], Batches]) -> Batches:
        names = classes
        if names is None:
            found = {row["label"] for _, rows in read() for row in rows}
            names = sorted(found, key=int if all(map(_is_whole, found)) else None)
        label_of.update({one: label for label, one in enumerate(names)})
        numbers: dict[str, int] = {}
        for split, rows in read():
            for row in rows:
                if row["label"] not in label_of:
                    raise UserError(
                        f"{name}: the class {row['label']} is none of the {len(label_of)} that it should have"
                    )
                number = numbers[split] = numbers.get(split, -1) + 1
                row |= {"image_id": number, "label": label_of[row["label"]]}
                seen.setdefault(split, set()).add(row["label"])
            yield split, rows

    def finish(folder: Path, counts: dict[str, dict[str, Any]]) -> dict[str, Any]:
        write_json(folder / "classes.json", list(label_of))
        for split, count in counts.items():
            count["classes"] = len(seen.get(split, ()))
        return {}

    described = [_describe(path) for path in raw_files]
    folder = Folder("classes", name, CLASS_FEATURES, units, described, part=_PART, place=place, finish=finish)
    prepare_units(folder, out_dir, on_bad)


def _is_whole(name: str) -> bool:
    return re.fullmatch(r"-?\d{1,18}", name) is not None


def _describe(path: Path) -> dict[str, Any]:
    status = path.stat()
    size = len(os.listdir(path)) if path.is_dir() else status.st_size
    return {"name": str(path.absolute()), "size": size, "changed": int(status.st_mtime)}


# --- where images come from ----------------------------------------------------------------------------------------


def folder_units(raw_dir: Path) -> tuple[list[Unit], list[Path]]:
    """The splits of a folder: each a folder of class folders or a tar file of them.

    Raises:
        UserError: there is neither.
    """
    if not raw_dir.is_dir():
        raise UserError(f"--raw-dir {raw_dir}: there is no such folder")
    units: list[Unit] = []
    files: list[Path] = []
    there = [path for path in sorted(raw_dir.iterdir()) if not is_clutter(path.name)]
    for path in there:
        if path.is_dir():
            folders = [one for one in sorted(path.iterdir()) if one.is_dir() and not is_clutter(one.name)]
            split = split_name(path.name, str(path)) if folders else ""
            units += [Unit(split, f"{path.name}/{one.name}", partial(_of_folder, one, split)) for one in folders]
            files += folders
        elif path.suffix.lower() == ".tar":
            split = split_name(path.stem, str(path))
            units.append(Unit(split, path.name, partial(_of_tar, path, split)))
            files.append(path)
    if not units:
        for path in (one for one in there if one.name.lower().endswith(PACKED)):
            check_not_packed(path)
        raise UserError(f"--raw-dir {raw_dir} holds no class folders: there must be train/CLASS/IMAGE or train.tar")
    return units, files


def _of_folder(folder: Path, split: str = "") -> Iterator[Row | BadItem]:
    """The images of a class folder."""
    others: list[str] = []
    odd: list[Path] = []
    for path in walk(folder, odd):
        if is_picture(path.name):
            yield entry_in(split, storable(path), _utf8(folder.name), path, 0, path.stat().st_size)
        else:
            others.append(path.name)
    for path in odd:
        if is_picture(path.name):
            yield BadItem("link to nothing, or no file", split, storable(path))
        else:
            others.append(path.name)
    _say_others(folder, others)


def _of_tar(path: Path, split: str = "") -> Iterator[Row | BadItem]:
    """The images of a tar file: the class is the folder that an image is in."""
    others = []
    with open_tar(path) as archive:
        for member in members(archive, path):
            folder, _, name = member.name.rpartition("/")
            if is_picture(name) and folder:
                label, where = _utf8(folder.rpartition("/")[2]), f"{storable(path)}: {_utf8(member.name)}"
                yield entry_in(split, where, label, path, member.offset_data, member.size)
            else:
                others.append(name)
    _say_others(path, others)


def _utf8(name: str) -> str:
    """A name as text, also where an older system wrote it in Latin-1."""
    raw = os.fsencode(name)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _say_others(place: Path, names: Sequence[str]) -> None:
    if names:
        show(f"{place}: {len(names):,} files are no images in a class folder ({count_others(names)}), and left out")


def entries_of(path: Path) -> Iterator[Row]:
    """The images of a tar file with class folders, or of a folder of them.

    Raises:
        UserError: it is neither, or an image's file is empty.
    """
    if path.is_dir():
        folders = sorted(one for one in path.iterdir() if one.is_dir() and not is_clutter(one.name))
        found = (row for folder in folders for row in _of_folder(folder))
    elif path.suffix.lower() == ".tar" and path.is_file():
        found = (row for row in _of_tar(path))
    else:
        raise UserError(f"{path} is neither a folder of class folders nor a .tar file of them")
    for row in found:
        if isinstance(row, BadItem):
            raise UserError(f"{row.item}: {row.reason}: mend it, or take it away")
        yield row


def table_units(table: Path) -> tuple[list[Unit], list[Path]]:
    """The rows of a table with the columns image (a path, relative to the file), class and split.

    Raises:
        UserError: there is no such table, or it lacks a column.
    """
    check_table(table)
    by_split: dict[str, list[Row | BadItem]] = {}
    for where, row in read_rows(table):
        if absent := [name for name in ("image", "class") if name not in row]:
            raise missing_column(where, row, absent[0])
        split = split_name(as_text(where, "split", row.get("split")) or "train", where)
        by_split.setdefault(split, []).append(_of_row(table, where, split, row))
    return [Unit(split, split, partial(iter, rows)) for split, rows in by_split.items()], [table]


def _of_row(table: Path, where: str, split: str, row: dict[str, Any]) -> Row | BadItem:
    for name in ("image", "class"):
        if is_empty(row[name]):
            return BadItem(f"empty {name}", split, where)
    if isinstance(row["class"], list | dict):
        return BadItem("class that is no text", split, f"{where}: {row['class']!r:.80}")
    label = _label(row["class"])
    if label is None:
        return BadItem("no class", split, where)
    image = as_text(where, "image", row["image"]) or ""
    path = next((path for one in (image, same_name(image)) if (path := table.parent / one).is_file()), None)
    if path is None:
        return BadItem("missing image", split, f"{where}: {image}")
    return entry_in(split, f"{where}: {image}", label, path, 0, path.stat().st_size)


def _label(value: Any) -> str | None:
    """The name of a class in a row; None for -1 and null, which say that there is none."""
    if is_empty(value) or value == -1 or (isinstance(value, str) and value.strip() == "-1"):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def dataset_units(name: str, image: str, label: str) -> tuple[list[Unit], list[Path], list[str] | None]:
    """The splits of a dataset of `datasets`, by its hub name or the folder of a local copy.

    Args:
        image, label: its columns.

    Raises:
        UserError: it cannot be had, or has no such columns.
    """
    streams = hub.open_streams(name)
    names: list[str] | None = None
    for split, stream in streams.items():
        columns = hub.columns_of(stream)
        if absent := [column for column in (image, label) if column not in columns]:
            raise UserError(f"--dataset {name}, {split}: no column {absent[0]}; it has {', '.join(columns)}")
        feature = (stream.features or {}).get(label)
        if isinstance(feature, datasets.ClassLabel):
            names = list(feature.names)
    units = [
        Unit(split, split, partial(_of_dataset, name, split, stream, image, label, names))
        for split, stream in streams.items()
    ]
    return units, [Path(name)] if Path(name).is_dir() else [], names


def _of_dataset(
    name: str, split: str, stream: Any, image: str, label: str, names: list[str] | None
) -> Iterator[Row | BadItem]:
    for number, row in hub.rows_of(name, split, stream):
        where = f"row {number}"
        value = _label(row[label])
        try:
            content = hub.picture_of(f"--dataset {name}, {split}, {where}", row[image], Path(name))
        except FileNotFoundError as error:
            yield BadItem("missing image", split, f"{where}: {error}")
            continue
        if content is None:
            yield BadItem("empty image", split, where)
        elif value is None:
            yield BadItem("no class", split, where)
        elif names is not None and isinstance(row[label], int):
            if not 0 <= row[label] < len(names):
                yield BadItem("unknown class", split, f"{where} ({row[label]})")
            else:
                yield entry(names[row[label]], image=content)
        else:
            yield entry(value, image=content)


def main() -> None:
    """Run the command line."""
    parser = new_parser("classes", __doc__, "rows without an image or a class")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--raw-dir", type=Path, help="folder with train, val, … of class folders, or .tar files")
    source.add_argument("--table", type=Path, help=".csv, .tsv, .jsonl or .json with columns image, class and split")
    source.add_argument("--dataset", help="a dataset of Hugging Face: hub name, or the folder of a local copy")
    parser.add_argument("--image-column", default="image", help="of --dataset (default: %(default)s)")
    parser.add_argument("--label-column", default="label", help="of --dataset (default: %(default)s)")
    arguments = parser.parse_args()
    classes = None
    if arguments.raw_dir is not None:
        units, files = folder_units(arguments.raw_dir)
        name = arguments.raw_dir.resolve().name
    elif arguments.table is not None:
        units, files = table_units(arguments.table)
        name = arguments.table.stem
    else:
        units, files, classes = dataset_units(arguments.dataset, arguments.image_column, arguments.label_column)
        name = Path(arguments.dataset).name or Path.cwd().name
    prepare_classes(units, files, arguments.out_dir, arguments.name or name, classes, arguments.on_bad)


if __name__ == "__main__":
    run_cli(main)
