"""One shard of a prepared split: rows of images with their texts, built by one of several processes."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import multiprocessing.connection
import operator
import os
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from data_prep.engine.folder import NOT_DROPPED, BadItem
from data_prep.engine.places import ImageFile, fingerprint, name_like, read_image, read_images
from data_prep.engine.regions import draw_regions
from data_prep.engine.texts import Kind, Rows
from vlabs.utils.files import content_sha256, write_json

# A record batch ends after this much, so that memory does not follow the size of the images.
_BATCH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to build one shard."""

    split: str
    first_image: int
    last_image: int
    data_file: Path
    record_file: Path

    def read_images(self, connection: sqlite3.Connection, kind: Kind) -> dict[str, dict[int, ImageFile]]:
        """Where the images are, by column and by image id."""
        return {
            column: read_images(connection, f"{self.split}/{place}", self.first_image, self.last_image)
            for place, column in enumerate(["image", *kind.more_images])
        }


class ShardRecord(NamedTuple):
    """What a finished shard holds; lies beside it as JSON until the whole folder is finished."""

    sha256: str
    images_fingerprint: str  # of the raw images
    counts: dict[str, int]  # images, and what `Rows.count` counts
    bad: list[BadItem]

    @classmethod
    def read(cls, path: Path) -> ShardRecord:
        """Return a record that was written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "bad": [BadItem(*item) for item in values["bad"]]})


class ShardBuilder:
    """Builds shards from the index of the texts and the table of the images.

    Args:
        kind: of the texts.
        prepared: the prepared folder.
        index_file: sqlite file of `texts.Index`.
        images_file: sqlite file with the table `images` of `engine.places`.
    """

    def __init__(self, kind: Kind, prepared: Path, index_file: Path, images_file: Path) -> None:
        self.kind = kind
        self.index = open_readonly(index_file)
        self.images = open_readonly(images_file)
        self.rows = Rows(kind, prepared, self.index)
        self.schema = self.rows.features.arrow_schema

    def build(self, task: ShardTask) -> int:
        """Write the shard and its record, each under its name only once it is whole; return the number of images."""
        images = task.read_images(self.images, self.kind)
        seen = 0
        # An image without texts counts nothing, but every name is there.
        counts: Counter[str] = Counter({"images": 0, **self.rows.count(self.rows.row(0, ()))})
        bad: list[BadItem] = []
        part = task.data_file.with_suffix(".part")
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, self.schema) as writer:
            rows: list[dict[str, Any]] = []
            waiting_bytes = 0
            for row in self._rows(task):
                seen += 1
                if all(self._read(of.get(row["image_id"]), column, row, task, bad) for column, of in images.items()):
                    counts.update({"images": len(images), **self.rows.count(row)})
                    rows.append(row)
                    waiting_bytes += sum(len(row[column]) for column in images)
                if waiting_bytes >= _BATCH_BYTES:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))
                    rows, waiting_bytes = [], 0
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))
        digest = content_sha256(part)
        part.replace(task.data_file)
        record = ShardRecord(digest, fingerprint(*images.values()), dict(counts), bad)
        write_json(task.record_file, record._asdict())
        return seen

    def _read(
        self, image: ImageFile | None, column: str, row: dict[str, Any], task: ShardTask, bad: list[BadItem]
    ) -> bool:
        """Read an image and its regions into a row; what is bad is noted, and False if it is the image."""
        place = ["image", *self.kind.more_images].index(column)
        if image is None:
            found = self.index.execute(
                "SELECT name FROM pictures WHERE split = ? AND image_id = ? AND place = ?",
                (task.split, row["image_id"], place),
            ).fetchone()
            which = f" ({column})" if place else ""
            like = name_like(self.images, f"{task.split}/{place}", row["image_id"])
            bad.append(BadItem("missing image", task.split, f"{found[0]}{which}{like}"))
            return False
        try:
            row[column], size = read_image(image)
        except ValueError as error:
            bad.append(BadItem("unreadable image", task.split, f"{image.name} ({error})"))
            return False
        region = column.replace("image", "region")
        row[region] = [
            self._region(regions, size, f"{image.name}, text {number}", task.split, bad)
            for number, regions in enumerate(row[region], 1)
        ]
        return True

    @staticmethod
    def _region(
        regions: list[dict[str, Any]], size: tuple[int, int], where: str, split: str, bad: list[BadItem]
    ) -> bytes:
        """The prepared form of a text's region, as far as it can be drawn; what cannot is noted."""
        if not regions:
            return b""
        try:
            drawn, faults = draw_regions(regions, *size)
        except ValueError as error:
            bad.append(BadItem("unusable region", split, f"{where} ({error})"))
            return b""
        bad += [BadItem(NOT_DROPPED, split, f"{where} ({fault})") for fault in faults]
        return drawn

    def _rows(self, task: ShardTask) -> Iterator[dict[str, Any]]:
        """Yield the shard's rows by image id, without the images, their texts by their ids."""
        found = self.index.execute(
            "SELECT image_id, item_id, text, more, targets, regions FROM items"
            " WHERE split = ? AND image_id BETWEEN ? AND ? ORDER BY image_id, item_id",
            (task.split, task.first_image, task.last_image),
        )
        for image_id, items in itertools.groupby(found, key=operator.itemgetter(0)):
            yield self.rows.row(image_id, (item[1:] for item in items))


def open_readonly(path: Path) -> sqlite3.Connection:
    """Open a sqlite file that nobody writes to any more; the connection may be handed to another thread."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)


_builder: ShardBuilder | None = None


def start_worker(arguments: Sequence[Any]) -> None:
    """Make this process a worker: it leaves Ctrl-C to its parent, and ends when the parent is gone."""
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _builder = ShardBuilder(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def build_shard(task: ShardTask) -> int:
    """Build a shard in a worker; return the number of images that it was to hold."""
    assert _builder is not None
    return _builder.build(task)
