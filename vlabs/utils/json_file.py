"""JSON files of any size, plain or inside a zip file, read as a bounded stream."""

from __future__ import annotations

import codecs
import contextlib
import json
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
_LONGEST_NUMBER = 1000  # digits; yajl crashes at several thousand
_DEEPEST = 2000  # nesting levels opened within one megabyte; memory grows with their square
_BRACKETS = bytes(value for value in range(256) if value not in b"[]{}")
_DIGITS = bytes(ord("0") if value in b"0123456789" else ord(" ") for value in range(256))
_MARKS = {  # UTF-32 first, because its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


def encoding_of(start: bytes) -> str:
    """The encoding of a text by its first bytes: its byte order mark, or the zeros in it; otherwise UTF-8."""
    if marked := next((name for mark, name in _MARKS.items() if start.startswith(mark)), None):
        return marked
    zeros = start[:1] == b"\0", start[1:2] == b"\0"
    return {(False, True): "utf-16-le", (True, False): "utf-16-be"}.get(zeros, "utf-8")


@dataclass(frozen=True)
class JsonFile:
    """A JSON file, plain or inside a zip file, that is read as a stream."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.member is None else f"{self.path} ({self.member})"

    @property
    def name(self) -> str:
        """The name of the file itself, without folders."""
        return (self.member or str(self.path)).replace("\\", "/").rpartition("/")[2]

    def entries(self, key: str = "", floats: bool = False, some: bool = False) -> Iterator[dict[str, Any]]:
        """Yield the entries of the list under a key, or of the list that is the whole file.

        Args:
            floats: numbers with a point become floats, and integers of more than 63 bits are an error.
            some: an empty list is an error too.

        Raises:
            UserError: the file is damaged, there is no such list, or an entry is not an object.
        """
        number = -1
        for number, entry in enumerate(self.items(f"{key}.item" if key else "item", floats)):
            if not isinstance(entry, dict):
                raise UserError(f"{self}: entry {number} of {key or 'the list'} is not an object: {entry!r:.80}")
            yield entry
        if number < 0:
            self._check_list(key)
            if some:
                raise UserError(f"{self} has no '{key}'")

    def _check_list(self, key: str) -> None:
        names = []
        for prefix, event, value in self._read(lambda stream: ijson.parse(stream, buf_size=_READ_BYTES)):
            if prefix == key and event == "start_array":
                return
            if not prefix and event == "map_key":
                names.append(str(value))
        what, there = f"'{key}' that is a list" if key else "list of objects", ", ".join(map(repr, names[:20]))
        raise UserError(f"{self} has no {what}, but {there or 'nothing'}"[:500])

    def named(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the names and values of the object that is the whole file.

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
        """Yield the values at an ijson path; `floats` as in `entries`."""
        return self._read(lambda stream: ijson.items(stream, prefix, buf_size=_READ_BYTES, use_float=floats))

    def _read(self, parse: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
        try:
            with self._open() as stream:
                yield from parse(_Bounded(stream, str(self)))
        except (ijson.JSONError, ArithmeticError, RecursionError, *ERRORS) as error:
            first = error.args[0] if error.args else ""  # yajl quotes invalid UTF-8 as bytes
            text = first.decode(errors="backslashreplace") if isinstance(first, bytes) else str(error)
            said = one_line(text) or type(error).__name__
            if "NaN" in said or "Infinity" in said:
                reason = "has NaN or Infinity, which JSON does not allow: write null instead"
            elif isinstance(error, ArithmeticError):
                reason = "has a number that is too large"
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
            raise UserError(f"{self.path} does not exist or is not a regular file")
        with self.path.open("rb") as stream:
            yield stream


class _Bounded:
    """A stream for ijson as UTF-8 without a byte order mark, with limits for texts, numbers and nesting."""

    def __init__(self, stream: IO[bytes], name: str) -> None:
        self.stream, self.name = stream, name
        self.decoder: Any = None
        self.begun = self.in_text = False
        self.without_quote = 0
        self.escape = self.tail = b""

    def read(self, size: int) -> bytes:
        """The next bytes, at most as many as asked for; empty at the end."""
        if size <= 0:  # ijson reads 0 bytes to find out the kind of stream
            return b""
        chunk = self.stream.read(size)
        if not self.begun:
            self.begun = True
            if (encoding := encoding_of(chunk)) not in ("utf-8", "utf-8-sig"):
                self.decoder = codecs.getincrementaldecoder(encoding)()
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        if self.decoder is not None:
            chunk = self.decoder.decode(chunk, final=not chunk).encode()
        self._check(chunk)
        return chunk

    def _check(self, chunk: bytes) -> None:
        # Without parsing: escaped quotes are blanked out, so that every remaining quote begins or ends a string. A
        # backslash at the end of a chunk is kept for the next.
        plain = self.escape + chunk
        self.escape = b""
        if b"\\" in plain:
            plain = plain.replace(rb"\\", b"__").replace(rb"\"", b"__")
            if plain.endswith(b"\\"):
                plain, self.escape = plain[:-1], b"\\"
        last, began = plain.rfind(b'"'), self.in_text
        self.in_text ^= plain.count(b'"') % 2 == 1
        self.without_quote = self.without_quote + len(plain) if last < 0 else len(plain) - last
        if self.without_quote > _LONGEST_TEXT:
            raise UserError(f"{self.name} has a text or a number of more than {_LONGEST_TEXT >> 20} MiB")
        if self._is_odd(plain):
            # Between quotes every second part is a text; a chunk that begins within one begins with its rest.
            outside = b'""'.join(plain.split(b'"')[began::2])
            if wrong := self._is_odd(outside):
                raise UserError(f"{self.name} {wrong}")
        self.tail = b"" if self.in_text else plain[last + 1 :][-_LONGEST_NUMBER:]

    def _is_odd(self, chunk: bytes) -> str:
        if b"0" * _LONGEST_NUMBER in (self.tail + chunk).translate(_DIGITS):
            return f"has a number of more than {_LONGEST_NUMBER} digits"
        brackets = np.frombuffer(chunk.translate(None, _BRACKETS), dtype=np.uint8)
        opens = np.where((brackets == ord("[")) | (brackets == ord("{")), 1, -1)
        if len(opens) and np.cumsum(opens, dtype=np.int64).max() > _DEEPEST:
            return f"is nested more than {_DEEPEST} levels deep"
        return ""


def parse_line(text: str) -> Any:
    """Parse a short JSON text; NaN and Infinity become None, and lone surrogates `?`, as in `JsonFile`.

    Raises:
        ValueError, RecursionError: it is not JSON.
    """
    value = json.loads(text, parse_constant=lambda name: None)
    if "\\ud" in text.lower():
        whole = json.dumps(value, ensure_ascii=False).encode(errors="replace")
        value = json.loads(whole)
    return value


def get_value(entry: dict[str, Any], key: str, where: str, *kinds: type) -> Any:
    """Return the value of a key.

    Args:
        kinds: as in `check_value`; any if not given.

    Raises:
        UserError: there is none, or it has another kind; the message starts with `where`.
    """
    if key not in entry:
        raise UserError(f"{where} has no '{key}', but {', '.join(map(repr, entry)) or 'nothing'}"[:500])
    if kinds:
        check_value(where, key, entry[key], *kinds)
    return entry[key]


def get_objects(entry: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    """Return the list of objects under a key.

    Raises:
        UserError: there is none; the message starts with `where`.
    """
    found = get_value(entry, key, where)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{where}: '{key}' must be a list of objects")
    return found


def check_value(where: str, name: str, value: object, *kinds: type) -> None:
    """Check that a value is a whole number (`int`), text (`str`) or an object (`dict`); with two kinds, not empty.

    Raises:
        UserError: it is not; the message starts with `where`.
    """
    if not isinstance(value, kinds) or isinstance(value, bool) or (len(kinds) > 1 and value == ""):
        words = {int: "a whole number", str: "text", dict: "an object"}
        raise UserError(f"{where}: '{name}' must be {' or '.join(words[kind] for kind in kinds)}, not {value!r:.80}")
