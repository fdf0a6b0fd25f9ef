"""One shard of a prepared split: rows of images with what is asked or said, built in one process of several."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import operator
import os
import re
import signal
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
from PIL import Image

from data_prep.engine.images import ImageFile, fingerprint, read_image, read_images
from data_prep.engine.regions import draw_regions

# A record batch ends after this much, so that memory does not follow the size of the images.
_BATCH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to build one shard."""

    split: str
    source: str  # of the images, a key of the table `images`
    first_image: int
    last_image: int
    data_file: Path
    record_file: Path

    def read_more(self, connection: sqlite3.Connection, column: str) -> dict[int, ImageFile]:
        """Return the images of a column beside `image`, where a row has several."""
        return read_images(connection, f"{self.source}/{column}", self.first_image, self.last_image)


@dataclass(frozen=True)
class BadItem:
    """Something in the raw data that cannot be used."""

    reason: str
    split: str
    item: str


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard holds; lies beside it as JSON until the whole folder is finished."""

    sha256: str
    images_fingerprint: str  # of the raw images
    counts: dict[str, int]  # images, and what `Rows.count` counts
    bad: list[BadItem]

    def write(self, path: Path) -> None:
        """Write the record, under its name only once it is whole."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> ShardRecord:
        """Return a record that was written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "bad": [BadItem(**item) for item in values["bad"]]})


class Rows(Protocol):
    """How items of one kind become rows.

    Attributes:
        features: of a row: `image_id`, `image`, and lists with one entry an item.
        columns: of the index's table `items`, which an entry is made of.
    """

    features: datasets.Features
    columns: tuple[str, ...]

    def entry(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return an item's entry in every list of its image's row, from the values of its columns."""

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Return what a row adds to the counts of its split."""

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of the whole folder."""


class ShardBuilder:
    """Builds shards from the index of the items and the table of the images.

    Args:
        make_rows: from the prepared folder, how items become rows.
        prepared: the prepared folder.
        index_file: sqlite file with the table `items` of `data_prep.engine.index`.
        images_file: sqlite file with the table `images` of `data_prep.engine.images`.
    """

    def __init__(self, make_rows: Callable[[Path], Rows], prepared: Path, index_file: Path, images_file: Path) -> None:
        self.rows = make_rows(prepared)
        self.schema = self.rows.features.arrow_schema
        self.more_images = more_images(self.rows.features)
        self.index = open_readonly(index_file)
        self.images = open_readonly(images_file)

    def build(self, task: ShardTask) -> int:
        """Write the shard and its record, each under its name only once it is whole; return the number of images."""
        images = read_images(self.images, task.source, task.first_image, task.last_image)
        more = {name: task.read_more(self.images, name) for name in self.more_images}
        seen = 0
        # An image without items counts nothing, but every name is there.
        counts: Counter[str] = Counter({"images": 0, **self.rows.count(self._new_row(0))})
        bad: list[BadItem] = []
        part = task.data_file.with_suffix(".part")
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, self.schema) as writer:
            rows: list[dict[str, Any]] = []
            waiting_bytes = 0
            for name, row in self._rows(task):
                seen += 1
                found = {"image": images.get(row["image_id"])}
                found |= {column: of.get(row["image_id"]) for column, of in more.items()}
                for column, image in found.items():
                    if not self._read(image, name, column, row, task.split, bad):
                        break
                else:
                    counts.update({"images": len(found), **self.rows.count(row)})
                    rows.append(row)
                    waiting_bytes += sum(len(row[column]) for column in found)
                if waiting_bytes >= _BATCH_BYTES:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))
                    rows, waiting_bytes = [], 0
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))
        with part.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        part.replace(task.data_file)
        fingerprints = fingerprint(images, *more.values())
        ShardRecord(sha256=digest, images_fingerprint=fingerprints, counts=dict(counts), bad=bad).write(
            task.record_file
        )
        return seen

    def _read(
        self, image: ImageFile | None, name: str, column: str, row: dict[str, Any], split: str, bad: list[BadItem]
    ) -> bool:
        """Read an image and its regions into a row; what is bad is noted, and False if it is the image."""
        if image is None:
            bad.append(BadItem("missing image", split, name if column == "image" else f"{name} ({column})"))
            return False
        try:
            row[column] = read_image(image)
        except ValueError as error:
            bad.append(BadItem("unreadable image", split, f"{image.name} ({error})"))
            return False
        region = column.replace("image", "region")
        row[region] = [
            self._region(regions, row[column], f"{name}, text {number}", split, bad)
            for number, regions in enumerate(row[region], 1)
        ]
        return True

    @staticmethod
    def _region(regions: list[dict[str, Any]], image: bytes, where: str, split: str, bad: list[BadItem]) -> bytes:
        """The prepared form of a text's region; a bad one is noted, and the text then has none."""
        if not regions:
            return b""
        with Image.open(io.BytesIO(image)) as picture:
            width, height = picture.size
        try:
            return draw_regions(regions, width, height)
        except ValueError as error:
            bad.append(BadItem("unusable region", split, f"{where} ({error})"))
            return b""

    def _rows(self, task: ShardTask) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the shard's rows by image id, without the image but with its name, their items by item id."""
        found = self.index.execute(
            f"SELECT image_id, image_name, {', '.join(self.rows.columns)} FROM items"
            " WHERE split = ? AND image_id BETWEEN ? AND ? ORDER BY image_id, item_id",
            (task.split, task.first_image, task.last_image),
        )
        for (image_id, image_name), items in itertools.groupby(found, key=operator.itemgetter(0, 1)):
            row = self._new_row(image_id)
            for _, _, *values in items:
                for column, value in self.rows.entry(values).items():
                    row[column].append(value)
            yield image_name, row

    def _new_row(self, image_id: int) -> dict[str, Any]:
        single = ("image_id", "image", *self.more_images)
        lists: dict[str, Any] = {column: [] for column in self.schema.names if column not in single}
        return {"image_id": image_id, **lists}


def more_images(features: datasets.Features) -> list[str]:
    """The columns of a row's images beside `image`: `image_2` and so on."""
    return [name for name in features if re.fullmatch(r"image_\d+", name)]


def open_readonly(path: Path) -> sqlite3.Connection:
    """Open a sqlite file that nobody writes to any more; the connection may be handed to another thread."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)


_builder: ShardBuilder | None = None


def start_worker(make_rows: Callable[[Path], Rows], prepared: Path, index_file: Path, images_file: Path) -> None:
    """Make this process a worker: it leaves Ctrl-C to its parent, and ends when the parent is gone."""
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _builder = ShardBuilder(make_rows, prepared, index_file, images_file)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def build_shard(task: ShardTask) -> int:
    """Build a shard in a worker; return the number of images that it was to hold."""
    assert _builder is not None
    return _builder.build(task)
