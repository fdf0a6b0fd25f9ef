"""Where the raw images are, in folders, zip and tar files, and how one is read without unpacking anything."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from data_prep.engine.tars import PACKED, check_not_packed, members, open_tar
from vlabs.data.decoding import known_suffixes, reason_of, size_of
from vlabs.utils.archives import entries, is_clutter, open_zip, same_name, unpack, walk
from vlabs.utils.json_file import JsonFile

IMAGES_SCHEMA = """
CREATE TABLE images (
    source TEXT, image_id INTEGER, file TEXT, name TEXT, offset INTEGER, stored INTEGER, size INTEGER, method INTEGER,
    mark INTEGER, PRIMARY KEY (source, image_id)
) WITHOUT ROWID;
CREATE TABLE like (source TEXT, image_id INTEGER, name TEXT, PRIMARY KEY (source, image_id)) WITHOUT ROWID;
"""

_TAR = -1  # instead of a zip file's compression method: the bytes of a member of a tar file, as they are
_LARGEST = 256 * 2**20  # bytes of an image's file
_NAMED = 20  # images that are missing, for which a name that is there is looked for


# --- names -----------------------------------------------------------------------------------------------------------


def is_picture(name: str) -> bool:
    """Whether a file is called as an image that can be decoded."""
    return os.path.splitext(name)[1].lower() in known_suffixes()


def json_files(folder: Path, archives: str = "*.zip") -> list[JsonFile]:
    """The JSON files at any depth of a folder, and those in the zip files in it whose names fit a pattern.

    Raises:
        UserError: a zip file is damaged.
    """
    found = []
    for path in walk(folder):
        if path.suffix.lower() == ".json":
            found.append(JsonFile(path))
        elif path.suffix.lower() == ".zip" and path.match(archives):
            with open_zip(path) as archive:
                inside = sorted((name, info.filename) for name, info in entries(archive))
            found += [JsonFile(path, member) for name, member in inside if name.lower().endswith(".json")]
    return found


def count_others(names: Iterable[str]) -> str:
    """A message about files that are not images: how many of each suffix; empty without any."""
    counts = Counter(os.path.splitext(name)[1].lower() or "no suffix" for name in names)
    return ", ".join(f"{count:,} of {suffix}" for suffix, count in counts.most_common())


# --- one image's place ---------------------------------------------------------------------------------------------


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
        """Return the image at a path, or None where there is no regular file."""
        try:
            status = path.stat()
        except (OSError, ValueError):  # ValueError: no file system takes such a name
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        return cls(str(path), name, None, status.st_size, status.st_size, 0, status.st_mtime_ns)


class Listing:
    """The files of a folder, a zip or a tar file by their names, which are found in whatever spelling they have."""

    def __init__(self, location: Path) -> None:
        self.location = location

    @cached_property
    def files(self) -> dict[str, ImageFile]:
        """All files by their names in one spelling; of several in an archive the last, which unpacking leaves."""
        return dict(self._every())

    @cached_property
    def older(self) -> dict[str, ImageFile]:
        """Those files by their names in Latin-1, as older systems write them, that are not called so."""
        found: dict[str, ImageFile] = {}
        for name, image in self.files.items():
            for encoding in () if name.isascii() else ("utf-8", "cp437"):
                with suppress(UnicodeError):
                    found.setdefault(same_name(name.encode(encoding, "surrogateescape").decode("latin-1")), image)
        return found

    def _every(self) -> Iterator[tuple[str, ImageFile]]:
        if self.location.is_dir():
            for path in walk(self.location):
                name = path.relative_to(self.location).as_posix()
                if (image := ImageFile.of_path(path, name)) is not None:
                    yield same_name(name), image
        elif self.location.suffix.lower() == ".tar":
            changed = self.location.stat().st_mtime_ns  # a tar file has no checksum of what is in it
            with open_tar(self.location) as archive:
                for one in members(archive, self.location):
                    place = str(self.location), one.name, one.offset_data
                    yield one.name, ImageFile(*place, one.size, one.size, _TAR, changed)
        else:
            check_not_packed(self.location)
            with open_zip(self.location) as zipped:
                for name, info in entries(zipped):
                    place = str(self.location), name, info.header_offset
                    yield name, ImageFile(*place, info.compress_size, info.file_size, info.compress_type, info.CRC)

    @cached_property
    def top(self) -> str:
        """The one folder that all files are in, with a slash; empty if there are several."""
        tops = {name.partition("/")[0] for name in self.files}
        return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in self.files) else ""

    @cached_property
    def by_last(self) -> dict[str, ImageFile]:
        """All files by their names without folders; of several the first."""
        found: dict[str, ImageFile] = {}
        for name, image in (*self.files.items(), *self.older.items()):
            found.setdefault(name.rpartition("/")[2], image)
        return found

    def find(self, name: str) -> ImageFile | None:
        """The file of a name, as it stands, or one folder deeper if all lie there; None if there is none."""
        for spelled in (name, same_name(name)) if self.location.is_dir() else ():
            if (image := ImageFile.of_path(self.location / spelled, name)) is not None:
                return image
        plain = same_name(name).lstrip("/")
        return self.files.get(plain) or self.files.get(self.top + plain) or self.older.get(plain)

    def like(self, name: str) -> str | None:
        """The name of a file that could be meant by one that is not there: spelled alike, or any image."""
        stem = os.path.splitext(name.replace("\\", "/").rpartition("/")[2])[0].casefold()
        pictures = [one for one in self.files if is_picture(one)]
        alike = (one for one in pictures if os.path.splitext(one.rpartition("/")[2])[0].casefold() == stem)
        return next(alike, pictures[0] if pictures else None)


@dataclass(frozen=True)
class ImageStore:
    """Images that are named by a path inside one of several folders, zip and tar files.

    Attributes:
        locations: the folders and archives.
        other_suffix: tried where an image is not there under its own name.
        other_folders: tried then instead of the first folder of its name; an empty one is none.
    """

    locations: tuple[Path, ...]
    other_suffix: str | None = None
    other_folders: tuple[str, ...] = ()

    def locate(self, wanted: Iterable[tuple[int, str]]) -> Iterator[tuple[int, ImageFile | str]]:
        """Yield the wanted (image id, name) pairs that are there; of some that are not a name that is, or nothing.

        Raises:
            UserError: an archive is damaged.
        """
        listings = [Listing(location) for location in self.locations]
        missing = 0
        for image_id, name in wanted:
            candidates = self._candidates(name)
            found = next((image for c in candidates for one in listings if (image := self._find(one, c))), None)
            if found is not None:
                yield image_id, found
            elif (missing := missing + 1) <= _NAMED:
                yield image_id, next((like for one in listings if (like := one.like(name))), "")

    def _find(self, listing: Listing, name: str) -> ImageFile | None:
        return listing.find(name)

    def _candidates(self, name: str) -> list[str]:
        candidates = [name]
        if self.other_suffix is not None:
            candidates.append(os.path.splitext(name)[0] + self.other_suffix)
        rest = name.partition("/")[2]
        return candidates + [f"{folder}/{rest}" if folder else rest for folder in self.other_folders]


class NamedImages(ImageStore):
    """Images that are told apart by their file names alone, at any depth of folders, zip files and tar files."""

    @classmethod
    def within(cls, folder: Path) -> NamedImages:
        """Those of a folder, and of the archives that lie directly in it.

        Raises:
            UserError: there is nothing but an archive that is compressed as a whole.
        """
        there = sorted(path for path in folder.iterdir() if not is_clutter(path.name))
        archives = [path for path in there if path.suffix.lower() in (".zip", ".tar") and path.is_file()]
        packed = [path for path in there if path.name.lower().endswith(PACKED)]
        if packed and not archives and not any(path.is_dir() for path in there):
            check_not_packed(packed[0])
        return cls((folder, *archives))

    def _find(self, listing: Listing, name: str) -> ImageFile | None:
        return listing.by_last.get(same_name(name).rpartition("/")[2])


# --- on the way to a shard -------------------------------------------------------------------------------------------


def write_images(connection: sqlite3.Connection, source: str, found: Iterable[tuple[int, ImageFile | str]]) -> None:
    """Note where the images of a source are, and of those that are not there a name that could be meant."""
    for image_id, image in found:
        if isinstance(image, str):
            connection.execute("INSERT OR IGNORE INTO like VALUES (?, ?, ?)", (source, image_id, _stored(image)))
        else:
            row = (source, image_id, _stored(image.file), _stored(image.name), *image[2:])
            connection.execute("INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)


def _stored(name: str) -> str | bytes:
    """A name for sqlite: as bytes where it is no UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


def read_images(connection: sqlite3.Connection, source: str, first: int, last: int) -> dict[int, ImageFile]:
    """Return the images of a source with ids from `first` to `last`."""
    rows = connection.execute(
        "SELECT image_id, file, name, offset, stored, size, method, mark FROM images"
        " WHERE source = ? AND image_id BETWEEN ? AND ?",
        (source, first, last),
    )
    return {row[0]: ImageFile(os.fsdecode(row[1]), os.fsdecode(row[2]), *row[3:]) for row in rows}


def name_like(connection: sqlite3.Connection, source: str, image_id: int) -> str:
    """What a message says of an image that is not there: a name that is, if one was looked for."""
    row = connection.execute("SELECT name FROM like WHERE source = ? AND image_id = ?", (source, image_id)).fetchone()
    return f" (there is {os.fsdecode(row[0])}, for example)" if row and row[0] else ""


def fingerprint(*columns: dict[int, ImageFile]) -> str:
    """Return a hash that changes when one of the raw images does, in any of a row's columns."""
    lines = (
        f"{image_id} {image.size} {image.mark}" for images in columns for image_id, image in sorted(images.items())
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_image(image: ImageFile) -> tuple[bytes, tuple[int, int]]:
    """Return the bytes of an image file, having decoded all of it once, and its width and height as it is seen.

    Raises:
        ValueError: the file cannot be read, is damaged or truncated, or is no image that can be decoded.
    """
    try:
        content = read_file(image)
        return content, size_of(content)
    except OSError as error:
        raise ValueError(reason_of(error)) from None


def read_file(image: ImageFile) -> bytes:
    """Return the bytes of an image file.

    Raises:
        OSError, ValueError: it cannot be read, or is larger than any image, or than it says.
    """
    if (size := max(image.size, image.stored)) > _LARGEST:
        raise ValueError(f"it has {size >> 20} MiB, more than any image")
    if image.offset is None:
        return Path(image.file).read_bytes()
    with open(image.file, "rb") as archive:
        if image.method != _TAR:
            return unpack(archive, image.offset, *image[3:])
        archive.seek(image.offset)
        return archive.read(image.stored)
