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
_LONGEST_NAME = 2**20  # bytes
_LINKS = 40  # that follow each other, as for Linux
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def check_not_packed(path: Path) -> None:
    """Raise a UserError if a tar file is compressed as a whole, by its name or its first bytes."""
    packed = path.name.lower().endswith(PACKED)
    if not packed and path.is_file():
        with path.open("rb") as file:
            packed = file.read(8).startswith(_MAGIC)
    if packed:
        raise UserError(f"{path} is compressed, so images cannot be read inside it: unpack it, or gunzip it")


class _Member(tarfile.TarInfo):
    """A member whose name, which is read into memory, is as long as names are."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _NAMES and not 0 <= self.size <= _LONGEST_NAME:
            raise tarfile.ReadError(f"a name of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]


def open_tar(path: Path, part: IO[bytes] | None = None) -> tarfile.TarFile:
    """Open a tar file that is not compressed; or `part`, one that lies in it.

    Raises:
        UserError: it is none.
    """
    if not path.is_file():  # opening a pipe need not end
        raise UserError(f"{path} is not there, or no regular file")
    try:
        return tarfile.open(path if part is None else None, "r:", part, tarinfo=_Member)
    except _ERRORS as error:
        if part is None:
            check_not_packed(path)
        raise UserError(f"{path} is not a whole tar file ({one_line(str(error))}): download it again") from None


def members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar file without clutter, names in one spelling; none is kept in memory.

    A link to another member, or to a folder of them, is what it points to, under its own name. What is not there, and
    a pipe or a device, has no bytes.

    Raises:
        UserError: the file is cut off or damaged, or a member is none that can be read where it lies.
    """
    file: Any = archive.fileobj
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    places: _Places | None = None
    last = "the beginning"
    for member in _every(archive, path):
        last = one_line(member.name)[:200]
        if member.size < 0 or member.offset_data + member.size > end:
            raise UserError(f"{path} is cut off or damaged in {last}: download it again")
        member.name = same_name(member.name).lstrip("/")
        if is_clutter(member.name) or member.isdir():
            continue
        if member.issparse():
            raise UserError(f"{path}: {last} is stored with holes and cannot be read where it lies: pack it anew")
        if member.isreg():
            yield member
            continue
        if places is None:
            places = _Places(path, archive)
        for name, place in places.of_link(member):
            one = tarfile.TarInfo(member.name + name)
            one.offset_data, one.size = place
            yield one
    _check_end(file, archive.offset, end, path, last)


def _every(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    try:
        while (member := archive.next()) is not None:
            yield member
            archive.members = []  # type: ignore[attr-defined]
    except _ERRORS as error:
        raise UserError(f"{path} is not a whole tar file ({one_line(str(error))}): download it again") from None


class _Places:
    """Where the regular files of a tar file lie, by name, and what its links point to; the archive stays as it is."""

    def __init__(self, path: Path, archive: tarfile.TarFile) -> None:
        self.files: dict[str, tuple[int, int]] = {}
        self.folders: set[str] = set()
        self.links: dict[str, str] = {}
        file: Any = archive.fileobj
        kept = file.tell()
        file.seek(0)
        for one in _every(open_tar(path, file), path):
            name = same_name(one.name).lstrip("/")
            if one.isreg():
                self.files[name] = one.offset_data, one.size
                folder = posixpath.dirname(name)
                while folder and folder not in self.folders:
                    self.folders.add(folder)
                    folder = posixpath.dirname(folder)
            elif one.islnk() or one.issym():
                folder = posixpath.dirname(name) if one.issym() else ""
                self.links[name] = same_name(posixpath.join(folder, one.linkname)).lstrip("/")
        file.seek(kept)

    def of_link(self, member: tarfile.TarInfo) -> Iterator[tuple[str, tuple[int, int]]]:
        """What is behind a link: nothing and a place; of a folder, the names of its files in it, and their places."""
        target = self.links.get(member.name, "")
        for _ in range(_LINKS):
            parts = target.split("/")
            starts = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
            start = next((one for one in starts if one in self.links), None)
            if start is None:
                break
            target = self.links[start] + target[len(start) :]
        if target not in self.folders:
            yield "", self.files.get(target, (0, 0))
            return
        for name in self.files:
            if name.startswith(f"{target}/") and not is_clutter(name):
                yield name[len(target) :], self.files[name]


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
            raise UserError(f"{path} continues after its end, behind {last}: unpack it with `tar --ignore-zeros`")


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
