"""Prepared folders of images: units of work that are read one by one, each kept as soon as it is done.

A unit gives rows; bad items are noted instead of rows. Memory follows a batch of rows, and a run that was stopped
continues with the next unit.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from tqdm import tqdm

from data_prep.engine.folder import (
    BadItem,
    is_made,
    report_bad,
    say_ready,
    start_or_go_on,
    write_datasets_files,
    write_manifest,
)
from vlabs.errors import UserError
from vlabs.utils.files import WORK, clear, content_sha256, new_folder, replacing, write_json

_BATCH_ROWS, _BATCH_BYTES = 5000, 32 * 2**20

Row = dict[str, Any]
Batches = Iterator[tuple[str, list[Row]]]


@dataclass(frozen=True)
class Unit:
    """Work that is done and kept at once.

    Attributes:
        split: of its rows.
        name: for the progress bar.
        read: gives its rows, and a BadItem instead of one that cannot be used.
    """

    split: str
    name: str
    read: Callable[[], Iterable[Row | BadItem]]


@dataclass
class Folder:
    """What is to be prepared.

    Attributes:
        kind, name: of the dataset, for its manifest.
        features: of a prepared row.
        units: what is read, in order.
        raw_files: the raw files as the manifest lists them; a run that was stopped continues if they are the same.
        options: those that what is written depends on.
        part: the columns of the rows that units give; those of `features` if not given.
        place: turns the batches of all units, each with its split, into those of prepared rows; it may read twice.
        count: what a batch adds to the counts of its split.
        finish: writes the other files, with the folder and the counts; returns what else the manifest says.
    """

    kind: str
    name: str
    features: datasets.Features
    units: Sequence[Unit]
    raw_files: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    part: pa.Schema | None = None
    place: Callable[[Callable[[], Batches]], Batches] = lambda read: read()
    count: Callable[[list[Row]], Mapping[str, int]] = lambda rows: {"images": len(rows)}
    finish: Callable[[Path, dict[str, dict[str, Any]]], dict[str, Any]] = lambda folder, counts: {}


def prepare_units(folder: Folder, out_dir: str | Path, on_bad: str = "error") -> None:
    """Write a prepared folder. A run that was stopped continues where it was.

    Args:
        on_bad: `error`, or `skip` to leave out what cannot be used.

    Raises:
        UserError: `out_dir` holds something else, something cannot be used, or there is nothing to train on.
    """
    out_dir = Path(out_dir).absolute()
    options = {**folder.options, "on_bad": on_bad}
    if is_made(out_dir, {"raw_files": folder.raw_files, "options": options}):
        return
    with new_folder(out_dir, "--out-dir", resumable=True) as partial:
        work = start_or_go_on(partial, [folder.raw_files, folder.options])
        bad: list[BadItem] = []
        parts = []
        with tqdm(folder.units, unit="part", desc=f"reading {folder.name}") as progress:
            for number, unit in enumerate(progress):
                progress.set_postfix_str(unit.name)
                parts.append((unit.split, work / f"{number:06d}.arrow"))
                bad += _read_unit(unit, parts[-1][1], folder.part or folder.features.arrow_schema)
        dropped = report_bad(bad, on_bad, work / "bad_items.jsonl")
        clear(partial, WORK)
        counts = _write_splits(folder, folder.place(lambda: _read_parts(parts)), partial)
        more = folder.finish(partial, counts)
        if not any(count["images"] for split, count in counts.items() if split == "train" or "train" not in counts):
            raise UserError(f"{folder.name} has no image to train on that can be used")
        about = {"options": options, "raw_files": folder.raw_files}
        write_manifest(partial, folder.kind, folder.name, splits=counts, **more, **dropped, **about)
    say_ready(out_dir, counts)


def _read_unit(unit: Unit, part: Path, schema: pa.Schema) -> list[BadItem]:
    """Write the rows of a unit, whole or not at all; returns what is bad in it. One that is done is not read again."""
    record = part.with_suffix(".json")
    if not (record.is_file() and part.is_file()):
        bad: list[BadItem] = []
        with replacing(part) as half, pa.OSFile(str(half), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for rows in _batches(unit.read(), bad):
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        write_json(record, bad)
    found = [BadItem(*item) for item in json.loads(record.read_text(encoding="utf-8"))]
    if found:  # may be mended when it runs again
        record.unlink()
    return found


def _batches(rows: Iterable[Row | BadItem], bad: list[BadItem]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    held = 0
    for row in rows:
        if isinstance(row, BadItem):
            bad.append(row)
            continue
        batch.append(row)
        held += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if len(batch) >= _BATCH_ROWS or held > _BATCH_BYTES:
            yield batch
            batch, held = [], 0
    yield batch


def _read_parts(parts: Iterable[tuple[str, Path]]) -> Batches:
    for split, path in parts:
        with pa.memory_map(str(path)) as source:
            for batch in pa.ipc.open_stream(source):
                yield split, batch.to_pylist()


def _write_splits(folder: Folder, batches: Batches, prepared: Path) -> dict[str, dict[str, Any]]:
    """Write the prepared rows of all splits, and return what the manifest says of them."""
    schema = folder.features.arrow_schema
    totals: dict[str, Counter[str]] = {}
    files: dict[str, list[str]] = {unit.split: [] for unit in folder.units}
    digests: dict[str, str] = {}
    for split in files:
        (prepared / split).mkdir()
        totals[split] = Counter(folder.count([]))
    for split, rows in batches:
        if not rows and files.get(split):
            continue
        (prepared / split).mkdir(exist_ok=True)
        name = f"data-{len(files.setdefault(split, [])):05d}.arrow"
        path = prepared / split / name
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
        digests[split] = hashlib.sha256((digests.get(split, "") + content_sha256(path)).encode()).hexdigest()
        files[split].append(name)
        totals.setdefault(split, Counter()).update(folder.count(rows))
    for split, names in files.items():
        write_datasets_files(prepared / split, names, digests.get(split, ""), folder.features)
    return {split: {**totals[split], "sha256": digests.get(split, "")} for split in files}
