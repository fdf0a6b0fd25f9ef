"""What a run says of itself: the folder that it alone writes to, and summary.json, over all parts of the run."""

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
from vlabs.utils.files import is_marked, locked, mark, reason_of, unmark, write_json
from vlabs.utils.plain import parse_config, parse_json, read_text
from vlabs.utils.ranks import is_rank_zero

# What a run writes into its folder.
_WRITTEN = (
    "config.yaml", "environment.json", "metrics.csv", "summary.json", "fit-profile.txt", "checkpoints", "figures",
    "tensorboard", "wandb",
)  # fmt: skip
# What a part of a run leaves as it is in summary.json, unless it finds it anew.
_RESULTS = ("parameters", "epochs", "steps", "metrics", "checkpoint")


def read_json(path: Path) -> dict[str, Any] | None:
    """A small file of a run; None where it is not there or, which is said in a line, cannot be read."""
    if not path.is_file():
        return None
    with contextlib.suppress(UserError):
        content = parse_json(read_text(path), str(path), finite=False)
        if isinstance(content, dict):
            return content
    say_left_out(path)
    return None


def read_summary(run: Path) -> dict[str, Any] | None:
    """summary.json of a run folder; None where it is not there or, which is said in a line, cannot be read."""
    summary = read_json(run / "summary.json")
    if summary is None or is_summary(summary):
        return summary
    say_left_out(run / "summary.json")
    return None


def is_summary(found: Mapping[str, Any]) -> bool:
    """Whether what a file or a checkpoint holds may be what `Record` has written."""
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
    """config.yaml of a run folder; None where it is not there or cannot be read."""
    if not (path := run / "config.yaml").is_file():
        return None
    try:
        config = OmegaConf.create(parse_config(read_text(path), str(path)))
    except (UserError, OmegaConfBaseException):
        return None
    content = OmegaConf.to_container(config, resolve=False)  # it may be somebody else's: nothing is looked up
    is_whole = isinstance(content, dict) and isinstance(content.get("data"), dict)
    return config if isinstance(config, DictConfig) and is_whole else None


def say_left_out(path: Path) -> None:
    """Say that a damaged file is left out."""
    if is_rank_zero():
        print(f"left out: {path} is damaged", file=sys.stderr, flush=True)


def find_runs(folder: Path) -> list[Path]:
    """The run folders within a folder, at any depth, ordered by name and number; within a run nobody looks."""
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
    """What there is to do about a run that was stopped."""
    last = run / "checkpoints" / "last.ckpt"
    kept = any(path.is_file() for path in (last, last.with_name("last.ckpt.previous")))
    return f"go on with resume={run}" if kept else "start it again, as it has no checkpoint yet"


@contextmanager
def run_folder(folder: Path, resumes: bool, since: float) -> Iterator[None]:
    """Be the only run in a folder. A start that fails before its first step leaves the folder as it was.

    Args:
        folder: is there; what a start left that was killed before its first checkpoint may lie in it.
        resumes: go on with the run that lies in it.
        since: seconds of the epoch; a folder that was made after that was made for this run.

    Raises:
        UserError: another run lies in the folder or is at work there, or it cannot be written.
    """
    if not is_rank_zero():
        yield
        return
    named = f"{'resume' if resumes else 'hydra.run.dir'}={folder}"
    wait = "wait for it to end" if resumes else "name another folder"
    made = folder.stat().st_mtime >= since
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
        finally:
            held.close()
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # what is not empty stays


@contextmanager
def _explained(folder: Path, named: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{named} cannot be written: {reason_of(error)}; name another folder, or make it so") from None


def _make_room(folder: Path) -> None:
    """Remove what a start left that has no checkpoint; refuse all else that a run would write over."""
    found = [name for name in _WRITTEN if (folder / name).exists() or (folder / name).is_symlink()]
    if not found:
        return
    checkpoints = [path for path in (folder / "checkpoints").glob("*") if path.suffix in (".ckpt", ".previous")]
    summary = read_summary(folder)
    if checkpoints or not is_marked(folder, "run") or (summary is not None and summary["status"] == "done"):
        raise UserError(
            f"hydra.run.dir={folder} has {', '.join(found)} in it already: go on with that run by resume={folder}, or "
            "name a new folder"
        )
    _remove(folder)


def _remove(folder: Path) -> None:
    for path in (folder / name for name in _WRITTEN):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


class Record:
    """summary.json of a run: what began it, what came out, and each part that it was trained in.

    Args:
        folder: of the run.
        command: of this part.
        given: overrides of this part.
        before: the summary that the parts before left; None for a new run.
        same_as: the summary of the run whose config this one begins with.
        variant: the choice of `model/topdown`; None where nothing was chosen.
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
        """Whether the parts before came to the end of the training."""
        return self.before.get("status") == "done"

    def begin(self) -> None:
        """Say that the run is there; a new one takes its folder with this.

        Raises:
            UserError: the system does not let it be written.
        """
        self._write(self.summary("running"))
        self.begun = True

    def end(self, status: str, **found: Any) -> dict[str, Any]:
        """Say how this part ended, and what came out.

        Raises:
            UserError: the system does not let it be written.
        """
        summary = self.summary(status, **found)
        self._write(summary)
        return summary

    def summary(self, status: str, **found: Any) -> dict[str, Any]:
        """What would be written now."""
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
        """Go on from what the last checkpoint holds of this (`summary` of then).

        It says what a part that was killed had cost until then, and all of it where summary.json is damaged.
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
    """Say with an error that something cannot be written how a run goes on."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; when that is mended, {way_on(folder)}") from error


def _of_parts(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with its parts; one of before there were any is of one part."""
    found = copy.deepcopy(dict(summary))
    if found and not isinstance(found.get("parts"), list):
        found["overrides"] = [item for item in found.get("overrides", []) if _key(item) != "resume"]
        names = ("command", "overrides", "fit_seconds", "seconds", "status")
        found["parts"] = [{name: found.get(name) for name in names} | {"steps": [0, found.get("steps", 0)]}]
    return found


def merged(overrides: Sequence[str], given: Sequence[str]) -> list[str]:
    """Overrides of a run and those that it goes on with: of each option the last, in the first one's place."""
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
    """The options of two configs that differ, with both values; None where one of them does not have it."""
    before, after = _leaves(old), _leaves(new)
    names = dict.fromkeys([*before, *after])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def changing(given: Sequence[str], changed: Mapping[str, Any]) -> list[str]:
    """Those of some overrides that change an option."""
    return [item for item in given if any(f"{name}.".startswith(f"{_key(item)}.") for name in changed)]
