"""Tar files that are read where they lie: whole ones, links followed, members that are what they say."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vlabs.errors import UserError, one_line
from vlabs.utils.archives import is_clutter, same_name

_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, MemoryError)
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def check_not_packed(path: Path) -> None:
    """Raise a UserError if a tar file is compressed as a whole, by its name."""
    if path.name.lower().endswith(PACKED):
        raise UserError(f"{path} is compressed, so pictures cannot be read inside it: unpack it, or gunzip it")


def open_tar(path: Path, part: IO[bytes] | None = None) -> tarfile.TarFile:
    """Open a tar file that is not compressed; or `part`, one that lies in it.

    Raises:
        UserError: it is none.
    """
    if not path.is_file():  # opening a pipe need not end
        raise UserError(f"{path} is not there, or no regular file")
    try:
        return tarfile.open(path, "r:") if part is None else tarfile.open(fileobj=part, mode="r:")
    except _ERRORS as error:
        raise UserError(f"{path} is not a whole tar file ({one_line(str(error))}): download it again") from None


def members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar file without clutter, names in one spelling; none is kept in memory.

    A link to another member is that member, under its own name.

    Raises:
        UserError: the file is cut off or damaged, or a member is none that can be read where it lies.
    """
    file: Any = archive.fileobj
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    files: dict[str, tuple[int, int]] | None = None
    last = "the beginning"
    for member in _every(archive, path):
        if member.size < 0 or member.offset_data + member.size > end:
            raise UserError(f"{path} is cut off or damaged in {one_line(member.name)}: download it again")
        last = one_line(member.name)
        member.name = same_name(member.name).lstrip("/")
        if is_clutter(member.name) or member.isdir():
            continue
        if member.issparse():
            raise UserError(f"{path}: {last} is stored with holes and cannot be read where it lies: pack it anew")
        if member.islnk() or member.issym():
            if files is None:
                files = _places(path, archive)
            folder = "" if member.islnk() else posixpath.dirname(member.name)
            target = same_name(posixpath.join(folder, member.linkname)).lstrip("/")
            if target not in files:  # of a folder, or out of the archive
                continue
            member.offset_data, member.size = files[target]
            member.type = tarfile.REGTYPE
        if member.isfile():
            yield member
    _check_end(file, archive.offset, end, path, last)


def _every(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        while (member := archive.next()) is not None:
            yield member
            archive.members = []  # type: ignore[attr-defined]
    except _ERRORS as error:
        raise UserError(f"{path} is not a whole tar file ({one_line(str(error))}): download it again") from None


def _places(path: Path, archive: tarfile.TarFile) -> dict[str, tuple[int, int]]:
    """Where the regular files of a tar file lie, by name; the archive goes on where it was."""
    file: Any = archive.fileobj
    kept = file.tell()
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as again:
            found = {same_name(one.name).lstrip("/"): (one.offset_data, one.size) for one in again if one.isreg()}
    finally:
        file.seek(kept)
    return found


def _check_end(file: Any, offset: int, end: int, path: Path, last: str) -> None:
    """A whole archive ends in a block of zeros, and nothing but zeros is after it.

    `tarfile` takes a damaged header, or one that is cut off, for the end as well.
    """
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{path} is cut off or damaged after {last}: download it again")
    while block := file.read(2**20):
        if block.strip(b"\0"):
            raise UserError(f"{path} goes on after its end, behind {last}: unpack it with `tar --ignore-zeros`")


def read_packed(path: Path, most: int) -> Iterator[tuple[str, bytes]]:
    """The files of a small tar file that is compressed as a whole, by name.

    Args:
        most: bytes of all together.

    Raises:
        UserError: it is damaged, or holds more.
    """
    read = 0
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                read += max(member.size, 0)
                if member.size < 0 or read > most:
                    raise UserError(f"{path} holds more than {most >> 20} MiB, which no file of its kind does")
                if member.isreg() and (content := archive.extractfile(member)) is not None:
                    yield same_name(member.name).lstrip("/"), content.read()
                archive.members = []  # type: ignore[attr-defined]
    except (*_ERRORS, KeyError) as error:
        raise UserError(f"{path} is not a whole archive ({one_line(str(error))}): download it again") from None
