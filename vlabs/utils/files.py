"""Files that are whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlabs.errors import UserError


@contextmanager
def replacing(path: str | Path, *, side_by_side: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to. It takes the place of `path` when all is written, and is removed if that fails.

    Args:
        side_by_side: other processes may write the same file at the same time.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial" + f"-{os.getpid()}" * side_by_side)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | Path, option: str) -> Iterator[Path]:
    """A folder beside `path` to write to. It gets its name when all is written, and is removed if that fails.

    Args:
        option: what the folder was named with, for messages.

    Raises:
        UserError: `path` is there already, and is no empty folder.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{option} {path} is there already: name another folder")
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: str | Path, text: str) -> Path:
    """Write a text, whole or not at all; returns where."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, content: Any, indent: int = 1) -> Path:
    """Write JSON, whole or not at all; returns where."""
    return write_text(path, json.dumps(content, indent=indent) + "\n")


def content_sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
