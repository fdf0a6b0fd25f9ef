"""The table of a sweep's runs, read from their folders."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from vlabs.errors import UserError
from vlabs.runs.record import find_runs, read_summary
from vlabs.utils.files import replacing

_SHOWN = ("fit_seconds", "parameters")


def has_table(folder: Path) -> bool:
    """Whether a folder has the runs.csv of a sweep."""
    path = folder / "runs.csv"
    return path.is_file() and path.read_bytes().startswith(b"run,status")


def check_table(sweep_dir: Path) -> None:
    """Raise a UserError if the folder has a runs.csv that was not written by a sweep."""
    if (sweep_dir / "runs.csv").is_file() and not has_table(sweep_dir):
        raise UserError(f"hydra.sweep.dir={sweep_dir} has a runs.csv that no sweep wrote: name another folder")


def write_table(sweep_dir: Path) -> str:
    """Write SWEEP_DIR/runs.csv, one row per run with its overrides and results, and return it as text.

    The text has one line for what all runs have in common, and columns only for what differs.

    Runs may be at any depth in the folder. The row of a failed run has the error. A run with a damaged summary.json is
    left out, which is printed.
    """
    rows, overrides = [], []
    for run in find_runs(sweep_dir):
        summary = read_summary(run)
        if summary is None:
            continue
        row: dict[str, Any] = {"run": run.relative_to(sweep_dir).as_posix(), "status": summary["status"]}
        overrides.append(dict(item.lstrip("+").split("=", 1) for item in summary["overrides"] if "=" in item))
        row |= overrides[-1]
        row |= {key: value for key, value in summary.items() if key.startswith("best/")}
        row |= {key: summary.get(key) for key in _SHOWN}
        row["error"] = summary.get("error", "")
        rows.append(row)
    header = list(dict.fromkeys(key for row in rows for key in row if key != "error")) + ["error"]
    with replacing(sweep_dir / "runs.csv") as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=header)
        writer.writeheader()
        writer.writerows(rows)
    first = overrides[0] if len(overrides) > 1 else {}
    common = {name: value for name, value in first.items() if all(one.get(name) == value for one in overrides)}
    shown = [name for name in header if name not in common and (name != "error" or any(row[name] for row in rows))]
    cells = [shown] + [[_short(row.get(key)) for key in shown] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(shown))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    said = [" ".join(["all runs:", *(f"{name}={value}" for name, value in common.items())])] if common else []
    return "\n".join([f"{sweep_dir / 'runs.csv'}:", *said, *lines])


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)[:100]
