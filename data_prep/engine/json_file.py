"""JSON files of any size, plain or inside a zip file, read as a stream; and JSON Lines."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ijson

from data_prep.engine.images import open_zip
from vlabs.errors import UserError

_READ_BYTES = 2**20


@dataclass(frozen=True)
class JsonFile:
    """A JSON file, or one inside a zip file, that is read as a stream."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} ({self.member})"

    def entries(self, key: str) -> Iterator[dict[str, Any]]:
        """Yield the entries of the list under a key.

        Raises:
            UserError: the file is damaged, or an entry is not an object.
        """
        for number, entry in enumerate(self._items(f"{key}.item")):
            if not isinstance(entry, dict):
                raise UserError(f"{self}: entry {number} of '{key}' is not an object")
            yield entry

    def named(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the names and values of the object that the whole file is.

        Raises:
            UserError: the file is damaged, or a value is not an object.
        """
        for name, value in self._read(lambda stream: ijson.kvitems(stream, "", buf_size=_READ_BYTES)):
            if not isinstance(value, dict):
                raise UserError(f"{self}: '{name}' is not an object")
            yield name, value

    def text(self, key: str) -> str | None:
        """Return the text under a key, or None."""
        value = next(self._items(key), None)
        return value if isinstance(value, str) else None

    def _items(self, prefix: str) -> Iterator[Any]:
        return self._read(lambda stream: ijson.items(stream, prefix, buf_size=_READ_BYTES))

    def _read(self, parse: Callable[[IO[bytes]], Iterator[Any]]) -> Iterator[Any]:
        try:
            with self._open() as stream:
                yield from parse(stream)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise UserError(f"{self} is not a whole JSON file ({error}): download it again") from None
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.path} is not a whole zip file ({error}): download it again") from None

    def _open(self) -> IO[bytes]:
        if self.member is None:
            return self.path.open("rb")
        archive = open_zip(self.path)
        stream = archive.open(self.member)
        archive.close()  # the file stays open until the member is closed
        return stream


def get_value(entry: dict[str, Any], key: str, where: str) -> Any:
    """Return the value of a key.

    Raises:
        UserError: there is none; the message starts with `where`.
    """
    if key not in entry:
        raise UserError(f"{where} has no '{key}'")
    return entry[key]


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file, each with the name of its place.

    Raises:
        UserError: it is no such file; the message names the line.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where} is not JSON: {error}") from None
                if not isinstance(values, dict):
                    raise UserError(f"{where} is not a JSON object")
                yield where, values
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from None
