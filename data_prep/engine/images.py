"""Where the raw images lie, in zip files or folders, and how one is read without unpacking anything."""

from __future__ import annotations

import hashlib
import io
import os
import sqlite3
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Protocol

from vlabs.data.decoding import open_picture
from vlabs.errors import UserError

IMAGES_SCHEMA = """
CREATE TABLE images (
    source TEXT, image_id INTEGER, file TEXT, name TEXT, offset INTEGER, stored INTEGER, size INTEGER, method INTEGER,
    mark INTEGER, PRIMARY KEY (source, image_id)
) WITHOUT ROWID
"""


# In the place of a zip file's compression method: the bytes of a member of a tar file, as they are.
_TAR = -1


class ImageFile(NamedTuple):
    """One image: a file of its own (`offset` is None) or a member of a zip or tar file."""

    file: str  # what to open
    name: str  # what to call it in messages
    offset: int | None  # of the zip member's local header, or of the tar member's bytes
    stored: int  # bytes in the zip file
    size: int  # bytes of the image
    method: int  # the zip file's compression method
    mark: int  # changes with the content: CRC-32 of a member, time of change of a file

    @classmethod
    def of_path(cls, path: Path, name: str) -> ImageFile | None:
        """Return the image at a path, or None where there is no file."""
        try:
            status = path.stat()
        except (OSError, ValueError):  # ValueError: no file system takes such a name
            return None
        return cls(str(path), name, None, status.st_size, status.st_size, 0, status.st_mtime_ns)

    @classmethod
    def of_member(cls, archive: Path, member: zipfile.ZipInfo) -> ImageFile:
        """Return the image that a member of a zip file is."""
        return cls(
            file=str(archive),
            name=member.filename,
            offset=member.header_offset,
            stored=member.compress_size,
            size=member.file_size,
            method=member.compress_type,
            mark=member.CRC,
        )


class Store(Protocol):
    """Where the images of a data set are."""

    def locate(self, wanted: Iterable[tuple[int, str]]) -> Iterator[tuple[int, ImageFile]]:
        """Yield those of the wanted (image id, name) pairs that are there."""


@dataclass(frozen=True)
class ImageStore:
    """Images that are named by a path inside one of several folders and zip files.

    Attributes:
        locations: the folders and zip files.
        other_suffix: tried where an image is not there under its own name.
        other_folders: tried then in place of the first folder of its name; an empty one is none.
    """

    locations: tuple[Path, ...]
    other_suffix: str | None = None
    other_folders: tuple[str, ...] = ()

    def locate(self, wanted: Iterable[tuple[int, str]]) -> Iterator[tuple[int, ImageFile]]:
        """Yield those of the wanted (image id, name) pairs that are there.

        Raises:
            UserError: a zip file is damaged.
        """
        with ExitStack() as opened:
            finders = [_finder(location, opened) for location in self.locations]
            for image_id, name in wanted:
                candidates = self._candidates(name)
                found = next((image for c in candidates for find in finders if (image := find(c))), None)
                if found is not None:
                    yield image_id, found

    def _candidates(self, name: str) -> list[str]:
        candidates = [name]
        if self.other_suffix is not None:
            candidates.append(str(Path(name).with_suffix(self.other_suffix)))
        rest = name.partition("/")[2]
        return candidates + [f"{folder}/{rest}" if folder else rest for folder in self.other_folders]


def _finder(location: Path, opened: ExitStack) -> Callable[[str], ImageFile | None]:
    """Return what looks a name up in a folder or zip file; the zip file is closed with `opened`."""
    if location.is_dir():
        return lambda name: ImageFile.of_path(location / name, name)
    archive = opened.enter_context(open_zip(location))

    def find(name: str) -> ImageFile | None:
        try:
            return ImageFile.of_member(location, archive.getinfo(name))
        except KeyError:
            return None

    return find


@dataclass(frozen=True)
class NamedImages:
    """Images that are told apart by their file names alone, at any depth of folders, zip files and tar files.

    Attributes:
        locations: the folders and archives, in which a name is looked for in turn.
    """

    locations: tuple[Path, ...]

    @classmethod
    def within(cls, folder: Path) -> NamedImages:
        """Those of a folder, and of the archives that lie directly in it.

        Raises:
            UserError: there is nothing but an archive that is compressed as a whole.
        """
        archives = sorted([*folder.glob("*.zip"), *folder.glob("*.tar")])
        packed = sorted([*folder.glob("*.tar.*"), *folder.glob("*.tgz")])
        if packed and not archives and not any(path.is_dir() for path in folder.iterdir()):
            raise UserError(f"{packed[0]} is compressed, so pictures cannot be read inside it: unpack it, or gunzip it")
        return cls((folder, *archives))

    def locate(self, wanted: Iterable[tuple[int, str]]) -> Iterator[tuple[int, ImageFile]]:
        """Yield those of the wanted (image id, file name) pairs that are there.

        Raises:
            UserError: an archive is damaged.
        """
        ids: dict[str, list[int]] = {}
        for image_id, name in wanted:
            ids.setdefault(name, []).append(image_id)
        for location in self.locations:
            for name, image in _files_of(location, ids):
                for image_id in ids.pop(name, ()):
                    yield image_id, image


def _files_of(location: Path, names: Container[str]) -> Iterator[tuple[str, ImageFile]]:
    """Yield what has one of the names in a folder, at any depth, or in an archive."""
    if location.is_dir():
        for folder, folders, files in os.walk(location):
            folders.sort()
            for name in sorted(files):
                path = Path(folder) / name
                if name in names and (image := ImageFile.of_path(path, str(path.relative_to(location)))) is not None:
                    yield name, image
    elif location.suffix == ".tar":
        changed = location.stat().st_mtime_ns  # a tar file has no checksum of what is in it
        with open_tar(location) as archive:
            for member in members(archive, location):
                name, size = PurePosixPath(member.name).name, member.size
                if name in names and member.isfile():
                    yield name, ImageFile(str(location), member.name, member.offset_data, size, size, _TAR, changed)
    else:
        with open_zip(location) as zipped:
            for info in zipped.infolist():
                name = PurePosixPath(info.filename).name
                if name in names:
                    yield name, ImageFile.of_member(location, info)


def open_tar(path: Path, part: IO[bytes] | None = None) -> tarfile.TarFile:
    """Open a tar file that is not compressed; or `part`, one that lies in it.

    Raises:
        UserError: it is none.
    """
    try:
        return tarfile.open(path, "r:") if part is None else tarfile.open(fileobj=part, mode="r:")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a whole tar file ({error}): download it again") from None


def members(archive: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file, of which none is kept in memory.

    Raises:
        UserError: the file is cut off.
    """
    file: Any = archive.fileobj
    end = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        while (member := archive.next()) is not None:
            if member.offset_data + member.size > end:
                raise UserError(f"{path} is cut off in {member.name}: download it again")
            yield member
            archive.members = []  # type: ignore[attr-defined]
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar file ({error}): download it again") from None


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip file.

    Raises:
        UserError: it is damaged, as after a download that was cut off.
    """
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is not a whole zip file ({error}): download it again") from None


def write_images(connection: sqlite3.Connection, source: str, found: Iterable[tuple[int, ImageFile]]) -> None:
    """Note where the images of a source are."""
    rows = ((source, image_id, *image) for image_id, image in found)
    connection.executemany("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", rows)


def read_images(connection: sqlite3.Connection, source: str, first: int, last: int) -> dict[int, ImageFile]:
    """Return the images of a source with ids from `first` to `last`."""
    rows = connection.execute(
        "SELECT image_id, file, name, offset, stored, size, method, mark FROM images"
        " WHERE source = ? AND image_id BETWEEN ? AND ?",
        (source, first, last),
    )
    return {row[0]: ImageFile(*row[1:]) for row in rows}


def fingerprint(*columns: dict[int, ImageFile]) -> str:
    """Return a hash that changes when one of the raw images does, in any of a row's columns."""
    lines = (
        f"{image_id} {image.size} {image.mark}" for images in columns for image_id, image in sorted(images.items())
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_image(image: ImageFile) -> bytes:
    """Return the bytes of an image file, having decoded all of it once.

    Raises:
        ValueError: the file cannot be read, is damaged or truncated, or is no image that PIL knows.
    """
    try:
        content = _read_file(image)
        with open_picture(content) as picture:
            picture.load()
    except Exception as error:  # PIL's decoders raise whatever a damaged file leads them to
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return content


def _read_file(image: ImageFile) -> bytes:
    if image.offset is None:
        return Path(image.file).read_bytes()
    with open(image.file, "rb") as archive:
        archive.seek(image.offset)
        if image.method == _TAR:
            return archive.read(image.stored)
        header = archive.read(30)
        if header[:4] != b"PK\x03\x04":
            raise ValueError("the zip file is damaged here")
        # The local header's own lengths count: its extra field may differ from the one in the zip file's directory.
        name_length, extra_length = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
        archive.seek(name_length + extra_length, io.SEEK_CUR)
        content = archive.read(image.stored)
    if image.method == zipfile.ZIP_DEFLATED:
        content = zlib.decompress(content, wbits=-zlib.MAX_WBITS)
    elif image.method != zipfile.ZIP_STORED:
        raise ValueError(f"zip compression method {image.method} is not supported")
    if len(content) != image.size or zlib.crc32(content) != image.mark:
        raise ValueError("the zip file is damaged here (checksum)")
    return content
