"""Questions or captions of a data set of `datasets`, from the hub or a local copy, as a table and a folder of pictures.

Rows are streamed, so memory and disk take no more than what is prepared of them, and a picture that many rows show is
kept once. A stream that was cut off goes on after the last whole row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import yaml
from huggingface_hub import metadata_load
from tqdm import tqdm

from vlabs.errors import UserError, one_line
from vlabs.utils.files import replacing
from vlabs.utils.plain import is_inside

FIELDS = (
    "image", "question", "caption", "answers", "question_id", "caption_id", "question_type", "answer_type", "boxes"
)  # fmt: skip
_LISTED = ("question", "caption")  # a list of them in a row is as many rows
_LARGEST = 256 * 2**20  # bytes of a picture's file
_SPLIT_NAMES = {"validation": "val", "valid": "val", "dev": "val"}


@dataclass(frozen=True)
class Source:
    """What is read of a data set.

    Attributes:
        name: on the hub, or a local folder: of `save_to_disk`, or of files that `load_dataset` knows.
        columns: by field of `FIELDS`, the column that it is in; `a.b` is `b` inside `a`, also where `a` is a list.
        config: of the data set, where it has several.
        splits: by the name that a split gets, the data set's own; empty for all that it has.
    """

    name: str
    columns: dict[str, str]
    config: str | None = None
    splits: dict[str, str] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """For a manifest."""
        return {"dataset": self.name, "columns": self.columns, "config": self.config, "splits": self.splits}


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
    """Stream a data set into `folder/rows.jsonl` and `folder/images/`, from where an earlier run stopped.

    Returns:
        The table, for `data_prep.own`.

    Raises:
        UserError: the data set cannot be had, lacks a column, or a row is not as it should be.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    recorded = folder / "source.json"
    plain = json.dumps(source.plain(), sort_keys=True)
    table, flat = folder / "rows.jsonl", folder / "table.jsonl"
    if not recorded.is_file() or recorded.read_text(encoding="utf-8") != plain:
        table.unlink(missing_ok=True)
        flat.unlink(missing_ok=True)
        recorded.write_text(plain, encoding="utf-8")
    if flat.is_file():
        return flat
    done = _whole_rows(table)
    with table.open("a", encoding="utf-8") as file:
        streams = _open(source)
        for split, rows in streams.items():
            columns = _columns(source, rows, split)
            if rows.features is not None:
                rows = rows.decode(False)  # pictures are bytes as they are, and no decoder is started
            own = None if list(streams) == ["train"] else split  # one split is divided as a table without any is
            start = done.get(split, 0)
            progress = tqdm(rows.skip(start), unit="row", desc=f"{source.name} ({split})", initial=start)
            try:
                for number, row in enumerate(progress, start=start):
                    where = f"--dataset {source.name}, {split}, row {number}"
                    entry = {
                        "row": [split, number],
                        "entries": list(_entries(where, row, columns, own, images, Path(source.name))),
                    }
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    if number % 1000 == 0:
                        file.flush()
            except UserError:
                raise
            except Exception as error:  # whatever the network and the data set's own files can do
                reason = one_line(str(error)) or type(error).__name__
                raise UserError(
                    f"--dataset {source.name}, {split}: reading stopped ({reason}): run it again, it goes on from there"
                ) from None
    with table.open(encoding="utf-8") as read, replacing(flat) as part, part.open("w", encoding="utf-8") as written:
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


def _open(source: Source) -> dict[str, Any]:
    """Its splits by the names that they get, as streams."""
    name = source.name
    check_sources(Path(name))
    try:
        if (Path(name) / "dataset_dict.json").is_file() or (Path(name) / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
            found = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            streams = {split: rows.to_iterable_dataset() for split, rows in found.items()}
        else:
            streams = dict(datasets.load_dataset(name, source.config, streaming=True))
    except Exception as error:  # whatever the hub, the network and the data set's own files can do
        raise UserError(
            f"--dataset {name} cannot be had ({one_line(str(error)) or type(error).__name__}): download it where there "
            f"is a network, with `hf download {name} --repo-type dataset --local-dir DIR`, and pass --dataset DIR"
        ) from None
    if not source.splits:
        return {_SPLIT_NAMES.get(split, split): rows for split, rows in streams.items()}
    if unknown := [split for split in source.splits.values() if split not in streams]:
        raise UserError(f"--splits: {name} has no split {unknown[0]}: choose of {', '.join(streams)}")
    return {own: streams[split] for own, split in source.splits.items()}


def _columns(source: Source, rows: Any, split: str) -> dict[str, str]:
    """The columns of the fields that are there; those that were named must be."""
    names = rows.column_names or list(next(iter(rows.take(1)), {}))
    # Ids of a data set need not be whole numbers, nor occur once: only where somebody says so.
    columns = {one: one for one in FIELDS if one in names and not one.endswith("_id")} | source.columns
    if "answers" not in columns and "answer" in names:
        columns["answers"] = "answer"
    for one, column in columns.items():
        if column.split(".")[0] not in names:
            raise UserError(
                f"--dataset {source.name}, {split}: there is no column {column} for {one}: name it with --columns "
                f"{one}=COLUMN; it has {', '.join(names)}"
            )
    if "question" in source.columns:
        columns.pop("caption", None)
    if "caption" in source.columns:
        columns = {one: column for one, column in columns.items() if not one.startswith(("question", "answer"))}
    if "image" not in columns or not {"question", "caption"} & columns.keys():
        raise UserError(
            f"--dataset {source.name}, {split}: which columns hold the image and the question or caption? Name them "
            f"with --columns image=COLUMN question=COLUMN; it has {', '.join(names)}"
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
    """The lines of the table that a row of the data set makes: one a question or caption."""
    values = {one: _value(row, column) for one, column in columns.items()}
    picture = _keep(where, values.pop("image"), images, folder)
    values = {one: value for one, value in values.items() if value is not None}
    asked = next((one for one in _LISTED if one in values), None)
    if asked is None:
        raise UserError(f"{where} has neither a question nor a caption")
    texts = values.pop(asked)
    many = isinstance(texts, list)
    for place, text in enumerate(texts if many else [texts]):
        entry = {"image": picture, asked: text} | ({} if split is None else {"split": split})
        for one, value in values.items():
            if many and one != "boxes" and isinstance(value, list) and len(value) != len(texts):
                raise UserError(f"{where} has {len(texts)} {asked}s and {len(value)} of {one}")
            entry[one] = value[place] if many and one != "boxes" and isinstance(value, list) else value
        if one_id := next((one for one in ("question_id", "caption_id") if one in entry), None):
            entry[one_id] = _whole(entry[one_id])
        yield entry


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value


def read_picture(where: str, path: str, folder: Path) -> bytes:
    """The file that a row of a data set names in the place of a picture's bytes.

    Args:
        where: the row, for messages.
        folder: of the data set; what lies outside is not read, whatever a row says.

    Raises:
        UserError: it is not there, outside, no regular file, or larger than any picture.
    """
    file = folder / path
    try:
        if not folder.is_dir() or not is_inside(file, folder):
            raise UserError(f"{where} names the image {path}, which is not in the folder of the data set")
        if not file.is_file() or file.stat().st_size > _LARGEST:
            raise UserError(f"{where}: the image {path} is not there, or is no picture's file")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: the image {path} cannot be read: {one_line(str(error))}") from None


def check_sources(folder: Path) -> None:
    """Raise a UserError if a local data set says that its files are elsewhere, from where `datasets` would read them.

    Args:
        folder: of the data set; for a name on the hub there is none.
    """
    said: list[tuple[Path, Any]] = []
    for file in (folder / "README.md", folder / ".huggingface.yaml"):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # which datasets itself says then
            text = file.read_text(encoding="utf-8")
            said.append((file, metadata_load(file) if file.suffix == ".md" else yaml.safe_load(text)))
    for file in (folder / "state.json", *folder.glob("*/state.json")):
        with contextlib.suppress(OSError, ValueError):
            said.append((file, {"configs": json.loads(file.read_text(encoding="utf-8")).get("_data_files")}))
    for file, content in said:
        configs = content.get("configs") if isinstance(content, dict) else None
        if found := re.search(r'"([^"]*://[^"]*|/[^"]*|([^"]*/)?\.\.(/[^"]*)?)"', json.dumps(configs, default=str)):
            raise UserError(
                f"{file} says that the data set's files are elsewhere ({found[1]}): copy them into {folder}"
            )


def _keep(where: str, value: Any, images: Path, folder: Path) -> str:
    """Write a picture once, by its content, and return its path in the table's folder."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        value = read_picture(where, value, folder)
    if not isinstance(value, bytes):
        raise UserError(f"{where} has no image, but {type(value).__name__}")
    digest = hashlib.sha256(value).hexdigest()
    name = f"{digest[:2]}/{digest}"
    path = images / name
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_bytes(value)
        partial.replace(path)
    return f"images/{name}"
