"""The index of what is asked or said about images. It is on disk, so memory does not follow the number of items."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vlabs.errors import UserError

_SCHEMA = """
CREATE TABLE items (
    split TEXT, item_id INTEGER, image_id INTEGER, image_name TEXT, text TEXT, target_instances TEXT,
    regions TEXT, dropped INTEGER DEFAULT 0, {more}
    PRIMARY KEY (split, item_id)
) WITHOUT ROWID;
CREATE TABLE bad (reason TEXT, split TEXT, item TEXT);
"""


class Index:
    """The items of all splits: each a text about an image, of one kind. Bad ones are noted, and stay out.

    Args:
        path: sqlite file to make.
        item: what an item is called in messages: "question" or "caption".
        more_columns: of the table `items`, for one kind of items; SQL, each with a comma after it.
    """

    def __init__(self, path: Path, item: str, more_columns: str = "") -> None:
        self.item = item
        self.connection = sqlite3.connect(path)
        self.connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;"
        )
        self.connection.executescript(_SCHEMA.format(more=more_columns))

    def add_bad(self, reason: str, split: str, item: str) -> None:
        """Note a bad item."""
        self.connection.execute("INSERT INTO bad VALUES (?, ?, ?)", (reason, split, item))

    def write_files(self, prepared: Path, min_answer_count: int) -> None:
        """Write the files of the prepared folder that follow from all items together."""

    def finish(self) -> None:
        """Leave out what is bad, and close the file.

        Raises:
            UserError: nothing is left.
        """
        with closing(self.connection) as connection:
            connection.executescript(
                "DELETE FROM items WHERE dropped;CREATE UNIQUE INDEX by_image ON items (split, image_id, item_id);"
            )
            connection.commit()
            left = connection.execute("SELECT 1 FROM items LIMIT 1").fetchone()
            first_bad = connection.execute("SELECT split, reason, item FROM bad LIMIT 1").fetchone()
        if left is None:
            raise UserError(
                f"there are no {self.item}s" + (f" that can be used ({': '.join(first_bad)})" if first_bad else "")
            )

    def _add(
        self,
        where: str,
        *,
        split: str,
        image_id: int,
        image_name: str,
        item_id: int,
        text: str,
        target_instances: Sequence[int] = (),
        regions: Sequence[Mapping[str, Any]] = (),
        more: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an item; `more` are values of columns that only this kind of index has."""
        check_value(where, "image_id", image_id, int)
        check_value(where, f"{self.item}_id", item_id, int)
        check_value(where, self.item, text, str)
        dropped = not text.strip()
        if dropped:
            self.add_bad(f"empty {self.item}", split, f"{self.item} {item_id}")
        values = {
            "split": split,
            "item_id": item_id,
            "image_id": image_id,
            "image_name": image_name,
            "text": text,
            "target_instances": as_json(where, target_instances),
            "regions": json.dumps(list(regions)) if regions else None,
            "dropped": dropped,
            **(more or {}),
        }
        try:
            self.connection.execute(
                f"INSERT INTO items ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",
                tuple(values.values()),
            )
        except sqlite3.IntegrityError:
            self.add_bad(f"duplicate {self.item} id", split, f"{self.item} {item_id}")
        except (OverflowError, UnicodeEncodeError) as error:
            raise UserError(f"{where} cannot be stored: {error}") from None


def as_json(where: str, target_instances: Sequence[int]) -> str | None:
    """Return instance ids as the index stores them.

    Raises:
        UserError: they are no list of whole numbers.
    """
    if not isinstance(target_instances, Sequence) or isinstance(target_instances, str):
        raise UserError(f"{where}: 'target_instances' must be a list of whole numbers")
    for instance in target_instances:
        check_value(where, "target_instances", instance, int)
    return json.dumps(list(target_instances)) if target_instances else None


def check_value(where: str, name: str, value: object, kind: type) -> None:
    """Check that a value of the raw data is a whole number (`int`) or text (`str`).

    Raises:
        UserError: it is not; the message starts with `where`.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = "a whole number" if kind is int else "text"
        raise UserError(f"{where}: '{name}' must be {wanted}, not {value!r:.80}")
