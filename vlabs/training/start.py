"""What a run starts from: another run's weights, which are trained first if need be, or its own last checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from vlabs.checkpoints.checkpoint import packaged_starts, read_tensors
from vlabs.errors import UserError
from vlabs.runs.logging import say
from vlabs.training.callbacks.checkpoints import previous_of


def make_start(folder: Path, overrides: list[str]) -> None:
    """Train the run that another starts from, unless it is there; processes of one machine wait for each other.

    Args:
        folder: the run folder, as in `init=`.
        overrides: of its training, as in `init_by=`.

    Raises:
        UserError: its training failed.
    """
    if folder.is_file() or str(folder) in packaged_starts():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        summary = folder / "summary.json"
        if summary.is_file() and json.loads(summary.read_text())["status"] == "done":
            return
        if int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1) > 1:
            raise UserError(
                f"init={folder} is not there yet, and only a run of one process trains it by itself: first run "
                f"python -m vlabs.train {' '.join(overrides)} hydra.run.dir={folder}"
            )
        say(f"init: {folder} is not there yet, so it is trained first: {' '.join(overrides)}")
        command = [sys.executable, "-m", "vlabs.train", *overrides, f"hydra.run.dir={folder}"]
        if subprocess.run(command).returncode:
            raise UserError(f"init={folder}: its training (init_by) failed, see above")


def last_whole(run_dir: Path, resume: str) -> Path:
    """The last checkpoint of a run, or the one before it where the last is damaged.

    Raises:
        UserError: there is none, or neither can be read.
    """
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.is_file():
        raise UserError(f"resume={resume}: {last} does not exist, so there is nothing to go on from")
    try:
        read_tensors(last)
        return last
    except UserError as error:
        older = previous_of(last)
        if not older.is_file():
            raise
        say(f"{error}; going on from the one before, {older}")
        read_tensors(older)
        return older
