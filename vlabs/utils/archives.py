"""Zip files as they are downloaded or packed anywhere: names in one spelling, members no larger than they say."""

from __future__ import annotations

import contextlib
import lzma
import posixpath
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vlabs.errors import UserError, one_line

LARGEST = 4 * 2**30
"""Bytes of a member that is read whole, at most."""
ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, NotImplementedError, RuntimeError,
    ValueError, OverflowError, MemoryError,
)  # fmt: skip
"""What `zipfile` raises on a damaged, encrypted or odd file."""
_CLUTTER = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "lost+found"})


def same_name(name: str) -> str:
    """One spelling of a file's name: NFC, forward slashes, no `./`, `//` or `a/../`."""
    plain = unicodedata.normalize("NFC", name).replace("\\", "/")
    return posixpath.normpath(plain) if plain else ""


def is_clutter(name: str) -> bool:
    """Whether a path is of what systems leave beside a user's files: dot files, `__MACOSX`, `Thumbs.db`."""
    parts = (part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))
    return any(part.startswith(".") or part.lower() in _CLUTTER for part in parts)


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file.

    Raises:
        UserError: it is not there or damaged, as after a download that was cut off.
    """
    if not path.is_file():  # opening a pipe need not end
        raise UserError(f"{path} is not there, or no regular file")
    try:
        return zipfile.ZipFile(path)
    except ERRORS as error:
        raise UserError(f"{path} is not a whole zip file ({_reason(error)}): download it again") from None


def entries(archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """The files of a zip file, without clutter, each with its name in one spelling."""
    for info in archive.infolist():
        name = info.filename
        if not info.flag_bits & 0x800:  # a Mac writes UTF-8 and does not say so
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        name = same_name(name).lstrip("/")
        if not info.is_dir() and not is_clutter(name):
            yield name, info


def read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo | str, most: int = LARGEST) -> bytes:
    """The content of a member of a zip file.

    Args:
        path: of the archive, for messages.
        most: bytes.

    Raises:
        UserError: it is damaged, encrypted, packed in an odd way, larger than `most`, or than it says.
    """
    with open_member(path, archive, member, most) as stream:
        try:
            content = stream.read(most + 1)
        except ERRORS as error:
            raise UserError(f"{path} ({_name(member)}) is damaged ({_reason(error)}): download it again") from None
    if len(content) > most:
        raise UserError(f"{path} ({_name(member)}) is larger than {most >> 20} MiB, which no file of its kind is")
    return content


def open_member(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo | str, most: int | None = None
) -> IO[bytes]:
    """A member of a zip file, to be read as a stream, which gives no more than the archive says that there is.

    Raises:
        UserError: it is encrypted, packed in an odd way, or larger than `most`.
    """
    try:
        info = archive.getinfo(member) if isinstance(member, str) else member
        if info.flag_bits & 1:
            raise UserError(f"{path} ({info.filename}) is encrypted: unpack it with its password")
        if most is not None and info.file_size > most:
            raise UserError(f"{path} ({info.filename}) is larger than {most >> 20} MiB, which no file of its kind is")
        return archive.open(info)
    except NotImplementedError as error:
        raise UserError(f"{path} ({_name(member)}) cannot be unpacked here ({_reason(error)}): pack it anew") from None
    except KeyError:
        raise UserError(f"{path} has no {_name(member)}") from None
    except ERRORS as error:
        raise UserError(f"{path} ({_name(member)}) is damaged ({_reason(error)}): download it again") from None


def _name(member: zipfile.ZipInfo | str) -> str:
    return member if isinstance(member, str) else member.filename


def _reason(error: BaseException) -> str:
    return one_line(str(error)) or type(error).__name__
