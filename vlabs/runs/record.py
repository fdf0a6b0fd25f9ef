"""The record of a run: exclusive use of its folder, and summary.json over all parts of the run.

A part is the time from a start or resume of the run to its next stop.
"""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vlabs.errors import UserError
from vlabs.utils.files import is_marked, locked, mark, reason_of, typed, unmark, write_json
from vlabs.utils.plain import parse_config, parse_json, read_text
from vlabs.utils.ranks import is_rank_zero

# Files and folders that a run writes.
_WRITTEN = (
    "config.yaml", "environment.json", "metrics.csv", "summary.json", "fit-profile.txt", "checkpoints", "figures",
    "tensorboard", "wandb",
)  # fmt: skip
# Entries of summary.json that a part of a run keeps, unless it has new values.
_RESULTS = ("parameters", "epochs", "steps", "metrics", "checkpoint")


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file of a run; None if it is missing or damaged (which is printed)."""
    if not path.is_file():
        return None
    with contextlib.suppress(UserError):
        content = parse_json(read_text(path), str(path), finite=False)
        if isinstance(content, dict):
            return content
    say_left_out(path)
    return None


def read_summary(run: Path) -> dict[str, Any] | None:
    """Read summary.json of a run folder; None if it is missing or damaged (which is printed)."""
    summary = read_json(run / "summary.json")
    if summary is None or is_summary(summary):
        return summary
    say_left_out(run / "summary.json")
    return None


def is_summary(found: Mapping[str, Any]) -> bool:
    """Whether data from a file or a checkpoint have the form that `Record` writes."""
    parts, overrides = found.get("parts", []), found.get("overrides")
    return (
        isinstance(found.get("status"), str)
        and all(isinstance(found.get(name) or 0, int | float) for name in ("parameters", "fit_seconds", "seconds"))
        and isinstance(overrides, list)
        and all(isinstance(item, str) for item in overrides)
        and isinstance(parts, list)
        and all(isinstance(part, dict) for part in parts)
        and all(isinstance(part.get(name) or 0, int | float) for part in parts for name in ("fit_seconds", "seconds"))
    )


def read_config(run: Path) -> DictConfig | None:
    """Read config.yaml of a run folder; None if it is missing or damaged."""
    if not (path := run / "config.yaml").is_file():
        return None
    try:
        config = OmegaConf.create(parse_config(read_text(path), str(path)))
    except (UserError, OmegaConfBaseException):
        return None
    content = OmegaConf.to_container(config, resolve=False)  # not trusted: interpolations are not resolved
    is_whole = isinstance(content, dict) and isinstance(content.get("data"), dict)
    return config if isinstance(config, DictConfig) and is_whole else None


def say_left_out(path: Path) -> None:
    """Print that a damaged file is left out."""
    if is_rank_zero():
        print(f"left out: {path} is damaged", file=sys.stderr, flush=True)


def find_runs(folder: Path) -> list[Path]:
    """The run folders in a folder, at any depth, in natural order of names; run folders are not searched."""
    found: list[Path] = []

    def look(here: Path) -> None:
        for child in here.iterdir():
            if child.is_dir() and not child.name.startswith("."):
                if (child / "summary.json").is_file():
                    found.append(child)
                elif not child.is_symlink():
                    look(child)

    look(folder)
    return sorted(found, key=lambda run: [(len(part), part) for part in run.relative_to(folder).parts])


def way_on(run: Path) -> str:
    """How to continue a run that was stopped."""
    last = run / "checkpoints" / "last.ckpt"
    kept = any(path.is_file() for path in (last, last.with_name("last.ckpt.previous")))
    return f"continue with {typed('resume', run)}" if kept else "start it again, because it has no checkpoint yet"


@contextmanager
def run_folder(folder: Path, resumes: bool) -> Iterator[None]:
    """Hold the lock on a run folder. A start that fails before its first step leaves the folder as it was.

    Args:
        folder: an existing folder; it may have files of a start that was killed before its first checkpoint.
        resumes: resume the run in this folder.

    Raises:
        UserError: the folder has another run, another process is training there, or it cannot be written.
    """
    if not is_rank_zero():
        yield
        return
    named = f"{'resume' if resumes else 'hydra.run.dir'}={folder}"
    wait = "wait for it to end" if resumes else "name another folder"
    with contextlib.ExitStack() as held:
        with _explained(folder, named):
            held.enter_context(locked(folder, f"{named}: another process is training there: {wait}"))
            if not resumes:
                _make_room(folder)
                mark(folder, "run")
        try:
            yield
        except BaseException:
            if not resumes and not (folder / "summary.json").is_file():
                _remove(folder)
                unmark(folder)
            raise


@contextmanager
def _explained(folder: Path, named: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{named} cannot be written: {reason_of(error)}; name another folder, or make it so") from None


def _make_room(folder: Path) -> None:
    """Remove files of a start without a checkpoint; refuse a folder with other files that a run would overwrite."""
    found = [name for name in _WRITTEN if (folder / name).exists() or (folder / name).is_symlink()]
    if not found:
        return
    checkpoints = [path for path in (folder / "checkpoints").glob("*") if path.suffix in (".ckpt", ".previous")]
    summary = read_summary(folder)
    if checkpoints or not is_marked(folder, "run") or (summary is not None and summary["status"] == "done"):
        raise UserError(
            f"hydra.run.dir={folder} already has {', '.join(found)}: continue that run with "
            f"{typed('resume', folder)}, or name a new folder"
        )
    _remove(folder)


def _remove(folder: Path) -> None:
    for path in (folder / name for name in _WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Record:
    """summary.json of a run: its command, its results, and all its parts.

    Args:
        folder: the run folder.
        command: the command of this part.
        given: the overrides of this part.
        before: the summary of the earlier parts; None for a new run.
        same_as: the summary of the run whose config this new run uses.
        variant: the choice of `model/topdown`; None if there is none.
    """

    def __init__(
        self,
        folder: Path,
        command: str,
        given: Sequence[str],
        before: Mapping[str, Any] | None = None,
        same_as: Mapping[str, Any] | None = None,
        variant: str | None = None,
    ) -> None:
        self.folder = folder
        self.before = _of_parts(before or {})
        base = self.before or same_as or {}
        self.command = str(self.before.get("command", command))
        self.overrides = merged(base.get("overrides", []), given)
        self.variant = variant or base.get("variant")
        self.part = {"command": command, "overrides": list(given), "started": datetime.now().isoformat("T", "seconds")}
        self.started = time.perf_counter()
        self.fit_started: float | None = None
        self.fit_ended: float | None = None
        self.first_step = 0
        self.step: Callable[[], int] = lambda: self.first_step
        self.begun = False

    @property
    def is_done(self) -> bool:
        """Whether the earlier parts finished the training."""
        return self.before.get("status") == "done"

    def begin(self) -> None:
        """Write that the run is running. From now on the folder belongs to it.

        Raises:
            UserError: the file cannot be written.
        """
        self._write(self.summary("running"))
        self.begun = True

    def end(self, status: str, **found: Any) -> dict[str, Any]:
        """Write how this part ended, and its results.

        Raises:
            UserError: the file cannot be written.
        """
        summary = self.summary(status, **found)
        self._write(summary)
        return summary

    def summary(self, status: str, **found: Any) -> dict[str, Any]:
        """The content of summary.json at this moment."""
        now = time.perf_counter()
        part = self.part | {
            "steps": [self.first_step, self.step()],
            "fit_seconds": round((self.fit_ended or now) - (self.fit_started or now), 1),
            "seconds": round(now - self.started, 1),
            "status": status,
        }
        parts = [*self.before.get("parts", []), part]
        kept = {key: value for key, value in self.before.items() if key in _RESULTS or key.startswith("best/")}
        totals = {name: round(sum(one.get(name) or 0 for one in parts), 1) for name in ("fit_seconds", "seconds")}
        begun = {"status": status, "command": self.command, "overrides": self.overrides, "variant": self.variant}
        return begun | kept | found | totals | {"parts": parts}

    def take_over(self, last: Mapping[str, Any]) -> None:
        """Take over the summary that the last checkpoint holds.

        It has the cost of a part that was killed, and replaces a damaged summary.json.
        """
        known = _of_parts(last)
        if not self.before:
            self.before = known
            self.command = str(known.get("command", self.command))
            self.overrides = merged(known.get("overrides", []), self.part["overrides"])
            self.variant = self.variant or known.get("variant")
        parts = self.before.get("parts", [])
        for n, (part, then) in enumerate(zip(parts, known.get("parts", []), strict=False)):
            if part.get("status") == "running":
                parts[n] = then | {"status": "killed"}

    def _write(self, summary: dict[str, Any]) -> None:
        if is_rank_zero():
            with resumable(self.folder):
                write_json(self.folder / "summary.json", summary, indent=2)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Add to an error in writing how to continue the run."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; when that is fixed, {way_on(folder)}") from error


def _of_parts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with its parts; one from an older version, without parts, gets a single part."""
    found = copy.deepcopy(dict(summary))
    if found and not isinstance(found.get("parts"), list):
        found["overrides"] = [item for item in found.get("overrides", []) if _key(item) != "resume"]
        names = ("command", "overrides", "fit_seconds", "seconds", "status")
        found["parts"] = [{name: found.get(name) for name in names} | {"steps": [0, found.get("steps", 0)]}]
    return found


def merged(overrides: Sequence[str], given: Sequence[str]) -> list[str]:
    """Merge a run's overrides with those of its resume: the last value of each option, at its first position."""
    result = list(overrides)
    for item in given:
        place = next((n for n, old in enumerate(result) if _key(old) == _key(item)), None)
        if place is None:
            result.append(item)
        else:
            plus = "" if item.startswith("~") else re.match(r"\+*", result[place])[0]  # type: ignore[index]
            result[place] = plus + item.lstrip("+")
    return result


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options that differ between two configs, with both values; None if a config does not have the option."""
    before, after = _leaves(old), _leaves(new)
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changing(given: Sequence[str], changed: Mapping[str, Any]) -> list[str]:
    """The overrides that change an option."""
    return [item for item in given if any(f"{name}.".startswith(f"{_key(item)}.") for name in changed)]
