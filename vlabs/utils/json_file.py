"""JSON files of any size, plain or inside a zip file, read as a stream that nobody can make endless."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ijson
import numpy as np

from vlabs.errors import UserError, one_line
from vlabs.utils.archives import ERRORS, open_member, open_zip

_READ_BYTES = 2**20
_LONGEST_TEXT = 64 * 2**20  # bytes
_LONGEST_NUMBER = 1000  # digits; yajl crashes on some thousands
_DEEPEST = 2000  # levels that one megabyte opens; memory follows their square
_BRACKETS = bytes(value for value in range(256) if value not in b"[]{}")
_DIGITS = bytes(ord("0") if value in b"0123456789" else ord(" ") for value in range(256))
_UTF16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


@dataclass(frozen=True)
class JsonFile:
    """A JSON file, or one inside a zip file, that is read as a stream."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} ({self.member})"

    @property
    def name(self) -> str:
        """Of the file itself, without folders."""
        return (self.member or str(self.path)).replace("\\", "/").rpartition("/")[2]

    def entries(self, key: str = "", floats: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the entries of the list under a key, or that the whole file is.

        Args:
            floats: numbers with a point are floats, and whole ones of more than 63 bits an error.

        Raises:
            UserError: the file is damaged, or an entry is not an object.
        """
        for number, entry in enumerate(self.items(f"{key}.item" if key else "item", floats)):
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
        value = next(self.items(key), None)
        return value if isinstance(value, str) else None

    def items(self, prefix: str, floats: bool = False) -> Iterator[Any]:
        """Yield the values at a place, in ijson's words; `floats` as in `entries`."""
        return self._read(lambda stream: ijson.items(stream, prefix, buf_size=_READ_BYTES, use_float=floats))

    def _read(self, parse: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        try:
            with self._open() as stream:
                yield from parse(_Bounded(stream, str(self)))
        except (ijson.JSONError, ArithmeticError, RecursionError, *ERRORS) as error:
            said = one_line(str(error)) or type(error).__name__
            if "NaN" in said or "Infinity" in said:
                reason = "has NaN or Infinity, which JSON has not: write null in its place"
            elif isinstance(error, ijson.JSONError) and "EOF" not in said and "premature" not in said:
                reason = f"is not JSON ({said})"
            else:
                reason = f"is not a whole JSON file ({said}): download it again"
            raise UserError(f"{self} {reason}") from None

    @contextlib.contextmanager
    def _open(self) -> Iterator[IO[bytes]]:
        if self.member is not None:
            with open_zip(self.path) as archive, open_member(self.path, archive, self.member) as stream:
                yield stream
            return
        if not self.path.is_file():
            raise UserError(f"{self.path} is not there, or no regular file")
        with self.path.open("rb") as stream:
            yield stream


class _Bounded:
    """A stream for ijson as UTF-8 without a mark, of texts, numbers and levels that it can stand."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream, self.name = stream, name
        self.decoder: Any = None
        self.begun = False
        self.without_quote = 0
        self.tail = b""

    def read(self, size: int) -> bytes:
        """The next bytes, as many or fewer; none at the end."""
        if size <= 0:  # as ijson asks what kind of stream it is
            return b""
        chunk = self.stream.read(size)
        if not self.begun:
            self.begun = True
            if encoding := _UTF16.get(chunk[:2]):
                self.decoder = codecs.getincrementaldecoder(encoding)()
                chunk = chunk[2:]
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        if self.decoder is not None:
            chunk = self.decoder.decode(chunk, final=not chunk).encode()
        self._check(chunk)
        return chunk

    def _check(self, chunk: bytes) -> None:
        last = chunk.rfind(b'"')
        self.without_quote = self.without_quote + len(chunk) if last < 0 else len(chunk) - last
        if self.without_quote > _LONGEST_TEXT:
            raise UserError(f"{self.name} has a text or a number of more than {_LONGEST_TEXT >> 20} MiB")
        digits = (self.tail + chunk).translate(_DIGITS)
        if b"0" * _LONGEST_NUMBER in digits:
            raise UserError(f"{self.name} has a number of more than {_LONGEST_NUMBER} digits")
        self.tail = chunk[-_LONGEST_NUMBER:]
        brackets = np.frombuffer(chunk.translate(None, _BRACKETS), dtype=np.uint8)
        opens = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
        if len(opens) and np.cumsum(opens, dtype=np.int64).max() > _DEEPEST:
            raise UserError(f"{self.name} is nested more than {_DEEPEST} levels deep")


def get_value(entry: dict[str, Any], key: str, where: str) -> Any:
    """Return the value of a key.

    Raises:
        UserError: there is none; the message starts with `where`, and says which there are.
    """
    if key not in entry:
        raise UserError(f"{where} has no '{key}', but {', '.join(map(repr, entry)) or 'nothing'}"[:500])
    return entry[key]
