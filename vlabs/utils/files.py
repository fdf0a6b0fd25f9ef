"""Files and folders that are written completely or not at all, and never replace something of the user's.

Everything that vlabs writes goes through this module. Unfinished output lies beside its target under a name that begins
with `.vlabs-` (a file) or ends with `.vlabs-partial` (a folder, with a mark inside). The writer holds a lock that ends
with its process. So the leftovers of a killed process can be told from the work of a running one, and are removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlabs.errors import UserError

MARK = ".vlabs"
"""The file that marks a folder as made by vlabs, and says as what."""
WORK = ".vlabs-work"
"""The sub-folder of `new_folder` for temporary files, which is removed at the end."""
_LOCK = ".vlabs-lock"
_PARTIAL = ".vlabs-partial"


def typed(option: str, path: str | Path) -> str:
    """An option with a path as a shell takes it, quoted where the path has spaces or parentheses."""
    return shlex.quote(f"{option}={path}")


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context manager: a file beside `path` to write to, which replaces `path` at the end, or is removed on failure.

    Several processes may write the same file at the same time; the last one wins. A link is followed; a device, such as
    /dev/null, is written directly.

    Raises:
        UserError: `path` is a folder, or cannot be written (full disk, no permission); its old content is unchanged.
    """
    given, path = path, Path(os.path.realpath(path))
    with _explained(path, str(given)):
        if path.is_dir():
            raise UserError(f"{given} is a folder: name a file")
        if path.exists() and not path.is_file():
            yield path
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # A hash, because the name itself may already have the greatest allowed length.
        key = hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest()[:12]
        remove_leftovers(path.parent, key)
        partial = path.with_name(f".vlabs-{key}-{secrets.token_hex(4)}")
        file = os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        try:
            _try_lock(file, fcntl.flock)
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            os.close(file)


def check_absent(path: str | Path, option: str, overwrite: bool = False) -> None:
    """Raise a UserError, before the work, if the file for its result exists.

    Args:
        path: the file.
        option: the option that names the file; if it ends with `=`, the hint on overwriting is in Hydra's style too.
        overwrite: whether it may exist.
    """
    path = Path(path)
    with _explained(Path(os.path.realpath(path)), _named(option, path)):
        if path.is_dir():
            raise UserError(f"{_named(option, path)} is a folder: name a file")
        if path.is_file() and not overwrite:
            raise UserError(f"{_named(option, path)} already exists: name another file, or pass {_how(option)}")


@contextmanager
def new_folder(
    path: str | Path,
    option: str,
    *,
    resumable: bool = False,
    replaces: Callable[[Path], bool] | None = None,
    overwrite: bool = True,
) -> Iterator[Path]:
    """Context manager: a folder beside `path` to work in, which is renamed to `path` at the end, without `WORK` in it.

    Args:
        path: the folder.
        option: the option that names the folder, for messages.
        resumable: keep what a stopped or failed process wrote, for the next one to continue; otherwise it is removed.
        replaces: says whether an existing folder at `path` was made by vlabs and may be overwritten; None for never.
        overwrite: overwrite what `replaces` allows; otherwise the message says how to ask for it.

    Raises:
        UserError: something else is at `path` or at the work folder, another process is working there, or it cannot be
            written.
    """
    given, path = path, Path(os.path.realpath(path))
    named = _named(option, given)
    partial = path.with_name(path.name + _PARTIAL)
    with _explained(path, named), contextlib.ExitStack() as held:
        _check_replaceable(path, named, replaces, None if overwrite else _how(option))
        _enter(partial, named, held)
        try:
            if not resumable:
                clear(partial)
            yield partial
            if (partial / WORK).exists():
                shutil.rmtree(partial / WORK)
            _check_replaceable(path, named, replaces)  # again, because others may have written in the meantime
            if path.exists():
                _remove_folder(path)
            partial.rename(path)
        except BaseException:
            if not resumable and partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        for name in (MARK, _LOCK):
            (path / name).unlink(missing_ok=True)


def is_free(path: Path) -> bool:
    """Whether a folder can be made at a path: nothing exists there, or an empty folder."""
    return not os.path.exists(path) or (path.is_dir() and os.access(path, os.R_OK) and not any(path.iterdir()))


def clear(folder: Path, *keep: str) -> None:
    """Remove the content of a folder of `new_folder`, except the names in `keep`."""
    for path in folder.iterdir():
        if path.name not in (MARK, _LOCK, *keep):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def mark(folder: Path, what: str) -> None:
    """Mark a folder as made by vlabs, as `what`."""
    (folder / MARK).write_text(f"{what}\n", encoding="utf-8")


def is_marked(folder: Path, what: str) -> bool:
    """Whether vlabs made a folder, as `what`."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return (folder / MARK).read_text(encoding="utf-8").strip() == what
    return False


def unmark(folder: Path) -> None:
    """Remove the mark of `mark`."""
    (folder / MARK).unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, message: str, wait: bool = False, name: str = _LOCK) -> Iterator[None]:
    """Context manager: lock an existing folder for this process. The lock ends with the process, however it ends.

    Args:
        message: message of the error if another process has the lock.
        wait: wait for that process instead.
        name: name of the file that is locked, which is removed at the end.

    Raises:
        UserError: another process has it.
    """
    path = folder / name
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            # lockf belongs to this process alone. flock would pass to its loader processes, which may outlive it.
            if not _try_lock(file, fcntl.lockf, wait):
                raise UserError(message)
            # The lock may be on a file that is no longer here: the process that held it may have removed the file or
            # renamed the folder in the meantime. Then try again.
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                try:
                    yield
                finally:
                    with contextlib.suppress(OSError):
                        path.unlink()
                return
        finally:
            os.close(file)


def write_text(path: str | Path, text: str) -> Path:
    """Write a text, completely or not at all, and return its path. What is not UTF-8 (file names) is escaped."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    return Path(path)


def write_json(path: str | Path, content: Any, indent: int = 1) -> Path:
    """Write JSON, completely or not at all, and return its path."""
    return write_text(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


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


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)


def reason_of(error: BaseException) -> str | None:
    """The system's reason why something cannot be written, in words; None if an error is not about that.

    torch.save and safetensors raise their own errors from the system's: the reason is in their context or text.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError):
        if cause.errno in _FULL:
            return "the disk is full"
        if cause.errno in _NO_FOLDER:
            return "a file stands where a folder has to be"
        return "there is no permission to write there" if cause.errno in _FORBIDDEN else cause.strerror
    return "the disk is full" if any(f"(os error {number})" in str(error) for number in _FULL) else None


@contextmanager
def _explained(path: Path, named: str) -> Iterator[None]:
    """Context manager: turn the system's errors about a written path into a UserError; others pass."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = reason_of(error)
        if reason is None or not _is_about(error, path):
            raise
        raise UserError(f"{named} cannot be written: {reason}; what was there before is unchanged") from error


def _is_about(error: Exception, path: Path) -> bool:
    """Whether an error is about writing `path`: it names a folder above it, or a partial file beside it.

    An error without a file name counts if the disk is full, which only writing can find.
    """
    names = [name for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    if not names:
        return reason_of(error) == "the disk is full"
    found = [Path(os.path.realpath(os.fsdecode(name))) for name in names]
    partial = path.with_name(path.name + _PARTIAL)
    return any(
        path.is_relative_to(one)
        or one.is_relative_to(partial)
        or (one.parent == path.parent and one.name.startswith(".vlabs-"))
        for one in found
    )


def _named(option: str, path: str | Path) -> str:
    return f"{option}{path}" if option.endswith("=") else f"{option} {path}"


def _how(option: str) -> str:
    return "overwrite=true" if option.endswith("=") else "--overwrite"


def _check_replaceable(path: Path, named: str, replaces: Callable[[Path], bool] | None, ask: str | None = None) -> None:
    if is_free(path):
        return
    if replaces is None:
        raise UserError(f"{named} already exists: name another folder")
    if not replaces(path):
        raise UserError(f"{named} already exists and was not made by this command: name another folder")
    if ask is not None:
        raise UserError(f"{named} already exists: name another folder, or pass {ask}")


def _enter(partial: Path, named: str, held: contextlib.ExitStack) -> None:
    """Make the work folder, or continue in it, marked and locked."""
    busy = f"{named} is being made by another process: wait for it, or name another folder"
    while True:
        with contextlib.suppress(FileExistsError):
            partial.mkdir(parents=True)
            mark(partial, "partial")
        ours = partial.is_dir() and not partial.is_symlink() and (is_marked(partial, "partial") or is_empty(partial))
        if not ours:
            if not partial.exists():
                continue  # another process has just ended
            raise UserError(f"{partial} is needed for making {named}, but vlabs did not make it: move it away")
        with contextlib.suppress(FileNotFoundError):  # another process has just ended
            held.enter_context(locked(partial, busy))
            mark(partial, "partial")
            return


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but its mark and its lock."""
    return all(path.name in (MARK, _LOCK) for path in folder.iterdir())


def _remove_folder(path: Path) -> None:
    """Remove a folder after renaming it, so that at its path there is never a part of it."""
    old = path.with_name(f".vlabs-old-{secrets.token_hex(4)}")
    path.rename(old)
    shutil.rmtree(old)


def size(count: float) -> str:
    """Bytes in kB, MB or GB, whichever reads best."""
    if count >= 1e9:
        return f"{count / 1e9:.1f} GB"
    return f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def remove_leftovers(folder: Path, key: str = "*") -> None:
    """Remove what `replacing` of killed processes left in a folder, of one file or of any: what is not locked."""
    for path in folder.glob(f".vlabs-{key}-*"):
        with contextlib.suppress(OSError):
            file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if _try_lock(file, fcntl.flock):
                    path.unlink()
            finally:
                os.close(file)


def _try_lock(file: int, kind: Callable[[int, int], None], wait: bool = False) -> bool:
    """Lock an open file; False if another process has the lock. File systems without locks are used without them."""
    try:
        kind(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True
