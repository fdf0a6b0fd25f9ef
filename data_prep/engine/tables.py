"""Tables of users: CSV with any encoding and separator, JSON lines, and JSON lists of objects."""

from __future__ import annotations

import csv
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vlabs.errors import UserError, one_line
from vlabs.utils.json_file import JsonFile, encoding_of, parse_line

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
_START = 4096  # characters before the first row
_LONGEST = 64 * 2**20  # characters of a line or a field
_SPLITS = {"training": "train", "validation": "val", "valid": "val", "validate": "val", "testing": "test"}


def check_table(path: Path) -> None:
    """Raise a UserError unless a path is a table that `read_rows` reads, by its name."""
    if not path.is_file():
        raise UserError(f"--table {path}: there is no such file")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--table {path}: name a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file")


def read_rows(path: Path, lines: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table, each with the name of its place; what is NaN is None.

    Args:
        lines: it is of JSON lines, whatever it is called.

    Raises:
        UserError: it cannot be read, or is no table; the message names the line.
    """
    lines = lines or path.suffix.lower() in (".json", ".jsonl")  # people call one what is the other
    try:
        with _open(path) as file:
            if not lines:
                yield from _csv(path, file)
            elif file.read(_START).lstrip("\ufeff \t\r\n")[:1] != "[":
                file.seek(0)
                yield from _json_lines(path, file)
            else:
                for number, entry in enumerate(JsonFile(path).entries(floats=True), start=1):
                    yield f"{path}, row {number}", entry
    except UnicodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({one_line(str(error))}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _open(path: Path) -> TextIO:
    """A text file of any encoding that says what it is by its first bytes; UTF-8 without."""
    with path.open("rb") as file:
        encoding = encoding_of(file.read(4))
    return path.open(encoding=encoding, newline="")


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    for number in range(1, 2**62):
        line = file.readline(_LONGEST + 1)
        if len(line) > _LONGEST:
            raise UserError(f"{path}, line {number} has more than {_LONGEST >> 20} million characters")
        if not line:
            return
        yield line


def _json_lines(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path, file), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = parse_line(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {one_line(str(error))}") from None
        if not isinstance(values, dict):
            raise UserError(f"{where} is not a JSON object")
        yield where, values


def _csv(path: Path, file: TextIO) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(_LONGEST)
    lines, before = _lines(path, file), 0
    while (first := next(lines, "")) and re.fullmatch("(sep=.)?", first.strip()):  # sep=; is of Excel
        before += 1
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=re.sub('"[^"]*"', "", first).count)
    lines = itertools.chain([first] if first else [], lines)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(named := [name for name in header if name]) != len(set(named)):
            twice = next(name for name in named if named.count(name) > 1)
            raise UserError(f"{path}: two columns are called '{twice}'")
        for row in reader:
            where = f"{path}, line {before + reader.line_num}"
            if any(row[len(header) :]):
                raise UserError(f"{where} has more columns than the header")
            if row:
                values = dict.fromkeys(header) | dict(zip(header, row, strict=False))
                values.pop("", None)  # a column without a name: the numbers of rows that tables are saved with
                yield where, values
    except csv.Error as error:
        raise UserError(f"{path}, line {before + reader.line_num} is not CSV: {error}") from None


def is_empty(value: Any) -> bool:
    """Whether a table says nothing: null, NaN, or a text of blanks. Zero is a value."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def missing_column(where: str, row: dict[str, Any], *names: str) -> UserError:
    """The message about a row that has none of some columns."""
    what = "' or '".join(names)
    if any(name in row for name in names):
        return UserError(f"{where}: '{what}' is empty")
    return UserError(f"{where} has no column '{what}', but {', '.join(map(repr, row)) or 'none'}")


def as_text(where: str, name: str, value: Any) -> str | None:
    """A value that is a text, or a number for one (3, 3.0); None where it is empty.

    Raises:
        UserError: it is something else.
    """
    if is_empty(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: '{name}' must be text, not {value!r:.80}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def split_name(value: str, where: str) -> str:
    """A split's name as people write it: Train, TRAIN, validation; those of others are kept.

    Raises:
        UserError: it cannot be the name of a folder beside the others.
    """
    known = _SPLITS.get(value.strip().lower(), value.strip().lower())
    name = known if known in ("train", "val", "test", "dev") else value
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name) or name == "tokenizer":
        raise UserError(f"{where}: '{value}' cannot be a split's name (letters, digits, '_', '-' and '.')")
    return name
