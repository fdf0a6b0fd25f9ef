"""Pictures with one class each: class folders, tar files of them, a table of one's own, or a data set of `datasets`.

    python -m data_prep.classes --raw-dir RAW --out-dir data/mine                    # RAW/train, RAW/val or their .tar
    python -m data_prep.classes --table pictures.csv --out-dir data/mine             # columns image, class, split
    python -m data_prep.classes --dataset NAME_OR_FOLDER --out-dir data/mine

Pictures stay where they are: what is written is where each one lies, in a file of its own or inside a tar file, which
is then read there. So preparing 1.3 million pictures takes as long as reading the headers of a tar file.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
from tqdm import tqdm

from data_prep.engine.hub import check_sources, read_picture
from data_prep.engine.images import members, open_tar
from data_prep.engine.pipeline import check_split_name, is_made, say_ready
from vlabs.data.decoding import known_suffixes
from vlabs.data.prepared import CLASS_FEATURES, FORMAT_VERSION
from vlabs.errors import UserError, one_line, run_cli
from vlabs.utils.files import WORK, clear, new_folder, replacing, write_json


class Entry(NamedTuple):
    """A picture: its class, and its bytes or the part of a file that they are."""

    label: str
    path: str = ""
    offset: int = 0
    size: int = 0
    image: bytes = b""


@dataclass(frozen=True)
class Unit:
    """Work that is done and kept at once: some pictures of a split.

    Attributes:
        split: theirs.
        name: of the unit, for the progress bar.
        read: gives the pictures.
    """

    split: str
    name: str
    read: Callable[[], Iterable[Entry]]


def prepare_classes(
    units: Sequence[Unit],
    raw_files: Sequence[Path],
    out_dir: str | Path,
    name: str,
    classes: Sequence[str] | None = None,
) -> None:
    """Write the prepared folder `out_dir`. A run that was stopped goes on where it was.

    Args:
        units: what to read.
        raw_files: what they are read from; by their names, sizes and times it is known whether a run goes on.
        name: of the data set.
        classes: all class names in the order of their labels; those that occur, sorted, if not given.

    Raises:
        UserError: `out_dir` holds something else, or there is no picture to train on.
    """
    out_dir = Path(out_dir).absolute()
    described = [_describe(path) for path in raw_files]
    if is_made(out_dir, {"raw_files": described}):
        return
    with new_folder(out_dir, "--out-dir", resumable=True) as partial:
        parts = _read_parts(units, described, partial / WORK, name)
        clear(partial, WORK)
        counts = _write_folder(parts, described, partial, name, classes)
    say_ready(out_dir, counts)


def _read_parts(units: Sequence[Unit], described: list[dict[str, Any]], work: Path, name: str) -> dict[str, list[Path]]:
    """Read what an earlier run of the same files did not; returns a file a unit, by split."""
    inputs = work / "inputs.json"
    if not (inputs.is_file() and json.loads(inputs.read_text()) == described):
        shutil.rmtree(work, ignore_errors=True)
        write_json(inputs, described)
    parts: dict[str, list[Path]] = {}
    with tqdm(units, unit="part", desc=f"reading {name}") as progress:
        for number, unit in enumerate(progress):
            progress.set_postfix_str(unit.name)
            part = work / f"{number:06d}.arrow"
            parts.setdefault(check_split_name(unit.split, name), []).append(part)
            if not part.is_file():
                _write_part(part, unit.read())
    return parts


def _write_folder(
    parts: dict[str, list[Path]],
    described: list[dict[str, Any]],
    folder: Path,
    name: str,
    classes: Sequence[str] | None,
) -> dict[str, dict[str, int]]:
    """Write what a prepared folder holds; returns what its manifest says of the splits."""
    tables = {split: pa.concat_tables([_read_part(path) for path in paths]) for split, paths in parts.items()}
    if not tables.get("train", ()) or not len(tables["train"]):
        raise UserError(f"{name} has no picture to train on: there must be a split called train")
    found = {label for table in tables.values() for label in table.column("label").unique().to_pylist()}
    names = sorted(found) if classes is None else list(classes)
    if unknown := sorted(found - set(names)):
        raise UserError(f"{name}: the class {unknown[0]} is none of the {len(names)} that it should have")
    counts = {split: _write_split(table, folder / split, names) for split, table in tables.items()}
    write_json(folder / "classes.json", names)
    manifest = {"format": FORMAT_VERSION, "kind": "classes", "name": name, "splits": counts, "raw_files": described}
    write_json(folder / "manifest.json", manifest)
    return counts


_PART_SCHEMA = pa.schema(
    [
        ("label", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("image", pa.binary()),
    ]
)
_PART_ROWS = 10_000


def _write_part(path: Path, entries: Iterable[Entry]) -> None:
    """Write pictures as Arrow, few at a time, whole or not at all."""
    with replacing(path) as partial, pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, _PART_SCHEMA) as file:
        rows: list[Entry] = []
        held = 0
        for entry in entries:
            rows.append(entry)
            held += len(entry.image)
            if len(rows) == _PART_ROWS or held > 2**26:
                file.write_batch(_batch(rows))
                rows, held = [], 0
        file.write_batch(_batch(rows))


def _batch(rows: list[Entry]) -> pa.RecordBatch:
    columns = list(zip(*rows, strict=True)) or [()] * len(_PART_SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, _PART_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=_PART_SCHEMA)


def _read_part(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def _write_split(table: pa.Table, folder: Path, names: list[str]) -> dict[str, int]:
    """Write one split as `datasets` does; returns what the manifest says of it."""
    label_of = {name: n for n, name in enumerate(names)}
    labels = pa.array([label_of[name] for name in table.column("label").to_pylist()], pa.int64())
    columns = {
        "image_id": pa.array(range(len(table)), pa.int64()),
        **{name: table.column(name) for name in ("path", "offset", "size", "image")},
        "label": labels,
    }
    datasets.disable_progress_bars()
    datasets.Dataset(pa.table(columns)).cast(CLASS_FEATURES).save_to_disk(str(folder))
    return {"images": len(table), "classes": len(labels.unique())}


def _describe(path: Path) -> dict[str, Any]:
    stat = path.stat()
    size = len(os.listdir(path)) if path.is_dir() else stat.st_size
    return {"name": str(path.absolute()), "size": size, "changed": int(stat.st_mtime)}


# --- where pictures come from ----------------------------------------------------------------------------------------


def folder_units(raw_dir: Path) -> tuple[list[Unit], list[Path]]:
    """The splits of a folder: each a folder of class folders or a tar file of them.

    Raises:
        UserError: there is neither.
    """
    if not raw_dir.is_dir():
        raise UserError(f"--raw-dir {raw_dir}: there is no such folder")
    units: list[Unit] = []
    files: list[Path] = []
    for path in sorted(raw_dir.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            folders = sorted(one for one in path.iterdir() if one.is_dir() and not one.name.startswith("."))
            units += [Unit(path.name, f"{path.name}/{one.name}", _reader(_of_folder, one)) for one in folders]
            files += folders
        elif path.name.endswith((".tar.gz", ".tgz")):
            raise UserError(f"{path} is compressed, so pictures cannot be read inside it: gunzip it first")
        elif path.suffix == ".tar":
            units.append(Unit(path.stem, path.name, _reader(_of_tar, path)))
            files.append(path)
    if not units:
        raise UserError(f"--raw-dir {raw_dir} holds no class folders: there must be train/CLASS/PICTURE or train.tar")
    return units, files


def _reader(function: Callable[[Path], Iterator[Entry]], path: Path) -> Callable[[], Iterator[Entry]]:
    return lambda: function(path)


def _of_folder(folder: Path) -> Iterator[Entry]:
    """The pictures of a class folder."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in known_suffixes() and path.is_file():
            yield Entry(folder.name, str(path.absolute()), 0, path.stat().st_size)


def _of_tar(path: Path) -> Iterator[Entry]:
    """The pictures of a tar file: the class is the folder that a picture is in."""
    with open_tar(path) as archive:
        for member in members(archive, path):
            parts = Path(member.name).parts
            if member.isfile() and Path(member.name).suffix.lower() in known_suffixes() and len(parts) > 1:
                yield Entry(parts[-2], str(path.absolute()), member.offset_data, member.size)


def entries_of(path: Path) -> Iterator[Entry]:
    """The pictures of a tar file with class folders, or of a folder of them.

    Raises:
        UserError: it is neither.
    """
    if path.is_dir():
        for folder in sorted(one for one in path.iterdir() if one.is_dir()):
            yield from _of_folder(folder)
    elif path.suffix == ".tar" and path.is_file():
        yield from _of_tar(path)
    else:
        raise UserError(f"{path} is neither a folder of class folders nor a .tar file of them")


def table_units(table: Path) -> tuple[list[Unit], list[Path]]:
    """The rows of a CSV or JSON Lines file with the columns image (a path, relative to the file), class and split.

    Raises:
        UserError: there is no such file, or a row lacks a column.
    """
    by_split: dict[str, list[Entry]] = {}
    for number, row in enumerate(_rows(table), start=1):
        missing = [column for column in ("image", "class") if not row.get(column)]
        if missing:
            raise UserError(f"{table}, row {number}: the column {missing[0]} is empty or missing")
        path = (table.parent / str(row["image"])).absolute()
        if not path.is_file():
            raise UserError(f"{table}, row {number}: there is no picture {path}")
        entry = Entry(str(row["class"]), str(path), 0, path.stat().st_size)
        by_split.setdefault(str(row.get("split") or "train"), []).append(entry)
    return [Unit(split, split, lambda rows=rows: rows) for split, rows in by_split.items()], [table]  # type: ignore[misc]


def _rows(table: Path) -> Iterator[dict[str, Any]]:
    if table.suffix not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"--table {table}: name a .csv, .tsv or .jsonl file")
    try:
        with table.open(newline="", encoding="utf-8") as file:
            if table.suffix == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            else:
                yield from csv.DictReader(file, delimiter="\t" if table.suffix == ".tsv" else ",")
    except OSError as error:
        raise UserError(f"--table {table} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"--table {table} is no {table.suffix[1:]} file: {error}") from None


def dataset_units(name: str, image: str, label: str) -> tuple[list[Unit], list[Path], list[str] | None]:
    """The splits of a data set of `datasets`, by its hub name or the folder of a local copy.

    Args:
        image, label: its columns.

    Raises:
        UserError: it cannot be had, or has no such columns.
    """
    check_sources(Path(name))
    try:
        local = Path(name).is_dir()
        loaded = datasets.load_from_disk(name) if local else datasets.load_dataset(name)
    except Exception as error:  # whatever the hub, the network and the data set's own files can do
        raise UserError(
            f"--dataset {name} cannot be loaded ({one_line(str(error))}): pass a local copy's folder"
        ) from None
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
    for split, rows in splits.items():
        for column in (image, label):
            if column not in rows.column_names:
                raise UserError(f"--dataset {name}, {split}: no column {column}; it has {', '.join(rows.column_names)}")
    feature = next(iter(splits.values())).features[label]
    names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    units = [
        Unit(split, split, lambda rows=rows: _of_dataset(rows, image, label, names, Path(name)))  # type: ignore[misc]
        for split, rows in splits.items()
    ]
    return units, [Path(name)] if local else [], names


def _of_dataset(rows: Any, image: str, label: str, names: list[str] | None, folder: Path) -> Iterator[Entry]:
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    for row in rows.select_columns([image, label]):
        picture = row[image]
        content = picture["bytes"] if isinstance(picture, dict) else picture
        if content is None:
            content = read_picture(f"--dataset {folder}", str(picture["path"]), folder)
        yield Entry(names[row[label]] if names is not None else str(row[label]), image=content)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.classes", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--raw-dir", type=Path, help="folder with train, val, … of class folders, or .tar files")
    source.add_argument("--table", type=Path, help=".csv, .tsv or .jsonl with the columns image, class and split")
    source.add_argument("--dataset", help="a data set of Hugging Face: hub name, or the folder of a local copy")
    parser.add_argument("--image-column", default="image", help="of --dataset (default: %(default)s)")
    parser.add_argument("--label-column", default="label", help="of --dataset (default: %(default)s)")
    parser.add_argument("--out-dir", type=Path, required=True, help="new folder of the prepared data")
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
    prepare_classes(units, files, arguments.out_dir, name, classes)


if __name__ == "__main__":
    run_cli(main)
