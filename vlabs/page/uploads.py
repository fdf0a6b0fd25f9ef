"""Uploaded images, kept in the page's own folder under random names."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from vlabs.errors import UserError
from vlabs.utils.files import is_marked, locked, mark

_PREFIX = "vlabs-page-"
_KIND = "page"
_NAME = re.compile(r"[0-9a-f]{32}")
LOOK = 5
"""Seconds between searches for old uploads."""
KEPT = 600 - 2 * LOOK
"""Seconds that an upload is kept: at most ten minutes, including the time until the next search."""
_ROOM = 100  # space for all uploads together, in multiples of the largest upload


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        megabytes: largest file of an image.
        megapixels: largest image.
        questions: largest number of questions.
        characters: largest number of characters of a text.
        pictures: largest number of images that a search shows.
        seconds: longest time to decode an image.

    Raises:
        UserError: one of them is not above 0.
    """

    megabytes: float = 10
    megapixels: float = 30
    questions: int = 8
    characters: int = 500
    pictures: int = 24
    seconds: float = 5

    def __post_init__(self) -> None:
        for name in ("megabytes", "megapixels"):
            if not 0 < getattr(self, name) <= 10_000:
                raise UserError(f"--max-{name} must be above 0 and at most 10000, not {getattr(self, name)}")

    @property
    def bytes(self) -> int:
        """Largest file of an image in bytes."""
        return int(self.megabytes * 2**20)


class Uploads:
    """Images under the random names that they got when they arrived. There is no other way to refer to one.

    Args:
        folder: their folder, which only this process uses.
        limits: limits of an image.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        self._came: dict[str, tuple[float, int]] = {}  # time of arrival, and bytes
        self._kept: dict[str, bytes] = {}

    def keep(self, path: Path) -> str:
        """Add an image of the page's own, which stays as long as the page; return its name.

        Raises:
            UserError: it cannot be read, or is too large.
        """
        try:
            if path.stat().st_size > self.limits.bytes:
                raise UserError(f"{path} has more than {self.limits.megabytes:g} MB: pass --max-megabytes to allow it")
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        name = secrets.token_hex(16)
        self._kept[name] = content
        return name

    def take(self, content: bytes) -> str:
        """Add an uploaded image for some minutes; return its name.

        Raises:
            UserError: it is too large, or there are too many uploads.
        """
        if len(content) > self.limits.bytes:
            raise UserError(f"the file has more than the allowed {self.limits.megabytes:g} MB: make it smaller")
        self.remove_old()
        there = sum(size for _, size in list(self._came.values()))
        if there + len(content) > _ROOM * self.limits.bytes:
            raise UserError("too many images were uploaded in the last ten minutes: try again later")
        name = secrets.token_hex(16)
        self._came[name] = time.monotonic(), len(content)
        try:
            (self.folder / name).write_bytes(content)
        except OSError as error:
            self.remove(name)
            raise UserError(f"there is no room for the image ({error.strerror}): try again later") from None
        return name

    def is_kept(self, name: object) -> bool:
        """Whether an image is one of the page's own."""
        return isinstance(name, str) and name in self._kept

    def read(self, name: object) -> bytes:
        """The content of an image.

        Raises:
            UserError: there is no such image, or no longer; the message is the same for all other names.
        """
        if isinstance(name, str) and _NAME.fullmatch(name):
            if name in self._kept:
                return self._kept[name]
            if time.monotonic() - self._came.get(name, (-KEPT, 0))[0] < KEPT:
                with suppress(OSError):
                    file = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW)
                    with open(file, "rb") as opened:
                        return opened.read()
        raise UserError("the image is no longer here: upload it again")

    def remove(self, name: str) -> None:
        """Remove an uploaded image."""
        if self._came.pop(name, None) is not None:
            (self.folder / name).unlink(missing_ok=True)

    def remove_old(self) -> None:
        """Remove old uploads; to be called every `LOOK` seconds."""
        now = time.monotonic()
        for name, (came, _) in list(self._came.items()):
            if now - came >= KEPT:
                self.remove(name)


@contextmanager
def own_folder() -> Iterator[Path]:
    """A temporary folder that is removed at the end or, if this process is killed, when the next page starts.

    Raises:
        UserError: it cannot be made.
    """
    _remove_leftovers()
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    except OSError as error:
        raise UserError(f"no temporary folder can be made ({error.strerror}): name another in TMPDIR") from None
    try:
        with locked(folder, "it is new"):
            mark(folder, _KIND)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers() -> None:
    """Remove folders of killed pages: those of this user that are marked by a page and not locked."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError, UserError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink() and is_marked(folder, _KIND):
                with locked(folder, "a page is at work"):
                    shutil.rmtree(folder, ignore_errors=True)
