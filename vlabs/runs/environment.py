"""The environment of a run: code, packages, device and data, written into its folder before it starts."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import torch

from vlabs.runs.record import read_json, say_left_out
from vlabs.utils.files import write_json


def describe_environment(sets: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe the environment as plain data.

    Args:
        sets: `vlabs.data.loading.identity_of` each prepared folder.
    """
    try:
        installed = version("vlabs")
    except PackageNotFoundError:
        installed = None
    return {
        "vlabs": installed,
        "code": code_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "data": list(sets),
        "packages": dict(sorted({item.metadata["Name"]: item.version for item in distributions()}.items())),
    }


def code_version() -> str | None:
    """The git commit of this code, with `+changes` if files differ from it; None if it is not a git checkout."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
        return result.stdout.strip() if result.returncode == 0 else ""

    try:
        # vlabs may be installed inside another repository, whose commit would be wrong.
        commit = git("rev-parse", "HEAD") if git("ls-files", Path(__file__).name) else ""
        return commit + "+changes" * bool(git("status", "--porcelain", "--untracked-files=no")) if commit else None
    except (OSError, subprocess.TimeoutExpired):
        return None


def write_environment(path: str | Path, found: dict[str, Any], going_on: bool) -> list[str]:
    """Write `environment.json` of a new run; for a resumed run keep it, and return what has changed since.

    Args:
        path: path of the file.
        found: the result of `describe_environment`.
        going_on: the run is resumed. For a new run, or if the file is damaged, an existing file is replaced.

    Returns:
        A line for each difference: `torch 2.9.0, was 2.8.0`.
    """
    path = Path(path)
    before = read_json(path) if going_on else None
    if before is not None and not _is_whole(before):
        say_left_out(path)
        before = None
    if before is None:
        write_json(path, found)
        return []
    compared = [
        ({key: part[key] for key in ("code", "python", "device")}, part["packages"]) for part in (before, found)
    ]
    changed = []
    for old, new in zip(*compared, strict=True):
        names = sorted({*old, *new})
        changed += [f"{name} {new.get(name)}, was {old.get(name)}" for name in names if old.get(name) != new.get(name)]
    hashes = [[item["manifest_sha256"] for item in part["data"]] for part in (before, found)]
    return changed + ["the prepared data"] * (hashes[0] != hashes[1])


def _is_whole(found: dict[str, Any]) -> bool:
    return (
        {"code", "python", "device"} <= found.keys()
        and isinstance(found.get("packages"), dict)
        and isinstance(found.get("data"), list)
        and all(isinstance(item, dict) and "manifest_sha256" in item for item in found["data"])
    )
