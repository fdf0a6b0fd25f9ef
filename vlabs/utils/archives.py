"""Folders and zip files of users: names in one spelling, members no larger than declared."""

from __future__ import annotations

import bz2
import contextlib
import errno
import io
import lzma
import os
import posixpath
import stat
import struct
import sys
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vlabs.errors import UserError, one_line, show

LARGEST = 4 * 2**30
"""Largest number of bytes of a member that is read at once."""
ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, OSError, NotImplementedError, RuntimeError,
    ValueError, OverflowError, MemoryError,
)  # fmt: skip
"""What `zipfile` raises on a damaged, encrypted or odd file."""
_LARGEST_PACKED = 2**30  # largest number of bytes of a member that is unpacked in one piece
_CLUTTER = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir", "lost+found"})


def same_name(name: str) -> str:
    """One spelling of a file's name: NFC, forward slashes, no `./`, `//` or `a/../`."""
    plain = unicodedata.normalize("NFC", name).replace("\\", "/")
    return posixpath.normpath(plain) if plain else ""


def is_clutter(name: str) -> bool:
    """Whether a path is a file that systems leave beside a user's files: dot files, `__MACOSX`, `Thumbs.db`."""
    parts = (part for part in name.replace("\\", "/").split("/") if part not in ("", ".", ".."))
    return any(part.startswith(".") or part.lower() in _CLUTTER for part in parts)


def walk(folder: Path, odd: list[Path] | None = None) -> Iterator[Path]:
    """The regular files below a folder, sorted, without clutter; links to folders are followed, each folder once.

    Args:
        folder: the folder.
        odd: list to which paths are added that are neither files nor folders (broken links, pipes, devices) and are
            never opened; None to print their number instead.

    Raises:
        OSError: a folder cannot be read.
    """
    seen: set[tuple[int, int]] = set()
    found: list[Path] = []
    for here, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(here)
        if (key := (status.st_dev, status.st_ino)) in seen:
            folders.clear()
            continue
        seen.add(key)
        folders[:] = sorted(name for name in folders if not is_clutter(name))
        for path in (Path(here, name) for name in sorted(files) if not is_clutter(name)):
            if path.is_file():
                yield path
            else:
                found.append(path)
    if odd is not None:
        odd += found
    elif found:
        what = f"{len(found):,} links to nothing, pipes or devices are left out, the first: {found[0].name}"
        show(f"{folder}: {what}", file=sys.stderr)


def read_regular(path: Path, most: int = 256 * 2**20) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read, is larger than `most`, or is a pipe or a device, which may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, not a file", str(path))
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"larger than {most >> 20} MiB, which is too large for its kind", str(path))
    return path.read_bytes()


def _raise(error: OSError) -> None:
    raise error


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file.

    Raises:
        UserError: it is missing or damaged, as after an interrupted download.
    """
    if not path.is_file():  # opening a pipe might never return
        raise UserError(f"{path} does not exist or is not a regular file")
    try:
        return zipfile.ZipFile(path)
    except ERRORS as error:
        raise UserError(f"{path} is not a whole zip file ({_reason(error)}): download it again") from None


def entries(archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
    """The files of a zip file, without clutter, each with its name in one spelling."""
    for info in archive.infolist():
        name = info.filename
        if not info.flag_bits & 0x800:  # macOS writes UTF-8 names without setting the flag for it
            with contextlib.suppress(UnicodeError):
                name = name.encode("cp437").decode("utf-8")
        name = same_name(name).lstrip("/")
        if not info.is_dir() and not is_clutter(name):
            yield name, info


def read_member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo | str, most: int = LARGEST) -> bytes:
    """The content of a member of a zip file.

    Args:
        path: path of the archive, for messages.
        most: the largest number of bytes.

    Raises:
        UserError: it is damaged, encrypted, compressed in an unsupported way, larger than `most`, or than declared.
    """
    with open_member(path, archive, member, most) as stream:
        try:
            info = archive.getinfo(member) if isinstance(member, str) else member
            # One byte more than declared, because zipfile unpacks only as much as is read, and cuts off the rest.
            return stream.read(info.file_size + 1)
        except ERRORS as error:
            raise UserError(f"{path} ({_name(member)}) is damaged ({_reason(error)}): download it again") from None


def open_member(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo | str, most: int | None = None
) -> IO[bytes]:
    """A member of a zip file as a stream, which ends at its declared size.

    Raises:
        UserError: it is encrypted, compressed in an unsupported way, or larger than `most`.
    """
    try:
        info = archive.getinfo(member) if isinstance(member, str) else member
        if info.flag_bits & 1:
            raise UserError(f"{path} ({info.filename}) is encrypted: unpack it with its password")
        if most is not None and info.file_size > most:
            raise UserError(
                f"{path} ({info.filename}) is larger than {most >> 20} MiB, which is too large for its kind"
            )
        if info.compress_type not in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
            return archive.open(info)
        # zipfile unpacks bzip2 and LZMA without a limit, so they are unpacked here.
        place = info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC
        return io.BytesIO(unpack(archive.fp, *place))  # type: ignore[arg-type]
    except NotImplementedError as error:
        raise UserError(f"{path} ({_name(member)}) cannot be unpacked ({_reason(error)}): pack it again") from None
    except KeyError:
        raise UserError(f"{path} has no {_name(member)}") from None
    except ERRORS as error:
        raise UserError(f"{path} ({_name(member)}) is damaged ({_reason(error)}): download it again") from None


def unpack(file: IO[bytes], offset: int, stored: int, size: int, method: int, crc: int) -> bytes:
    """A member of a zip file in one piece, with no more memory than its declared size.

    Args:
        offset: offset of its local header.
        stored, size: bytes in the archive, and unpacked.
        crc: checksum of the content.

    Raises:
        ValueError: it is damaged, encrypted, or compressed in another way.
    """
    file.seek(offset)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("the zip file is damaged at this file")
    if header[6] & 1:
        raise ValueError("it is encrypted: unpack the zip file with its password")
    if max(stored, size) > _LARGEST_PACKED:
        raise ValueError(f"it has more than {_LARGEST_PACKED >> 20} MiB: unpack the zip file")
    # The local header's own lengths count: its extra field may differ from the one in the zip file's directory.
    name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    file.seek(name_length + extra_length, io.SEEK_CUR)
    packed = file.read(min(stored, size + 1) if method == zipfile.ZIP_STORED else stored)
    try:
        content = _unpacked(packed, method, size + 1)
    except (zlib.error, lzma.LZMAError, EOFError, OSError, MemoryError) as error:
        raise ValueError(f"the zip file is damaged at this file ({_reason(error)})") from None
    if len(content) != size or zlib.crc32(content) != crc:
        raise ValueError("the zip file is damaged at this file (checksum)")
    return content


def _unpacked(packed: bytes, method: int, most: int) -> bytes:
    if method == zipfile.ZIP_STORED:
        return packed
    if method == zipfile.ZIP_DEFLATED:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, most)
    if method == zipfile.ZIP_BZIP2:
        return bz2.BZ2Decompressor().decompress(packed, most)
    if method == zipfile.ZIP_LZMA:
        length = int.from_bytes(packed[2:4], "little")  # length of the LZMA properties, which replace a header
        props = lzma._decode_filter_properties(lzma.FILTER_LZMA1, packed[4 : 4 + length])  # type: ignore[attr-defined]
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[props]).decompress(packed[4 + length :], most)
    raise ValueError(f"zip compression method {method} is not supported: pack it again")


def _name(member: zipfile.ZipInfo | str) -> str:
    return member if isinstance(member, str) else member.filename


def _reason(error: BaseException) -> str:
    return one_line(str(error)) or type(error).__name__
