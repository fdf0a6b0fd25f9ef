"""Loggers of a run: metrics.csv always, W&B by default."""

from __future__ import annotations

import contextlib
import csv
import logging
import netrc
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlparse

import wandb
from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from vlabs.errors import UserError, one_line
from vlabs.runs.record import resumable
from vlabs.utils.files import reason_of, replacing, write_text
from vlabs.utils.ranks import is_rank_zero, say


def quiet_lightning() -> None:
    """Hide Lightning's hints, and warnings about things that vlabs does on purpose."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*worker processes in total.*",  # vlabs itself refuses too many data.num_workers
        ".*infer the `batch_size`.*",
        ".*`isinstance.treespec.*",
        ".*predict returned None.*",
        ".*is smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",  # frozen parts (task.freeze)
        ".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
        r".*on epoch level in distributed setting.*",  # metrics are already computed over all ranks
    ):
        warnings.filterwarnings("ignore", message=message)


class Metrics(NamedTuple):
    """The readable content of a metrics.csv.

    Attributes:
        header: the columns.
        rows: the rows, each with all columns as strings.
        lost: number of lines that could not be read.
    """

    header: list[str]
    rows: list[dict[str, str]]
    lost: int


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.csv, also if it was cut or filled with zeros by a full disk or a crash."""
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lost = bool(lines.pop())  # a last line without a line end was not written completely
    fields = [None if {"\0", "\ufffd"} & set(line) else next(csv.reader([line.rstrip("\r")]), []) for line in lines]
    header = fields[0] if fields and fields[0] and "step" in fields[0] else []
    rows = [dict(zip(header, row, strict=True)) for row in fields[1:] if header and row and len(row) == len(header)]
    rows = [row for row in rows if row["step"].isdecimal()]
    return Metrics(header, rows, lost + len(lines) - len(rows) - bool(header))


def last_metrics(path: Path) -> dict[str, float]:
    """The last value of each metric in a metrics.csv; empty if there is no such file."""
    found: dict[str, float] = {}
    for row in read_metrics(path).rows if path.is_file() else []:
        found |= {name: float(value) for name, value in row.items() if value and name not in ("step", "epoch")}
    return found


class _Rows(ExperimentWriter):
    """Lightning's writer of metrics.csv, but nothing in the file is lost if writing fails.

    Args:
        log_dir: folder of the file.
        resumed_step, validates: as in `csv_logger`.
    """

    def __init__(self, log_dir: str, resumed_step: int | None, validates: bool) -> None:
        self.path = Path(log_dir) / self.NAME_METRICS_FILE
        self.resumed_step, self.validates = resumed_step, validates
        self.opened = False
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Do nothing: Lightning would remove an existing file, but it belongs to this run."""

    def save(self) -> None:
        """Append what was logged since the last call.

        Raises:
            UserError: the file cannot be written; it then has no partial row.
        """
        if not self.metrics:
            return
        with resumable(self.path.parent):
            if not self.opened:
                self._open()
            size = self.path.stat().st_size if self.path.exists() else None
            try:
                super().save()
            except OSError as error:
                self.metrics = []
                with contextlib.suppress(OSError):
                    os.truncate(self.path, size or 0)
                raise UserError(f"{self.path} cannot be written: {reason_of(error)}") from error

    def _open(self) -> None:
        """Keep the rows before the step that a run resumes from; a new run starts with an empty file."""
        self.opened = True
        if self.resumed_step is None or not self.path.is_file():
            self.path.unlink(missing_ok=True)
            return
        header, rows, lost = read_metrics(self.path)
        if lost:
            say(f"{self.path}: {lost} damaged lines are left out")
        rows = [row for row in rows if int(row["step"]) < self.resumed_step]
        if self.validates:
            rows = [row for row in rows if int(row["step"]) < self.resumed_step - 1 or not _is_of_validation(row)]
        self.metrics_keys = header
        self._write(header, rows)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._write(fieldnames, read_metrics(self.path).rows)

    def _write(self, header: list[str], rows: list[dict[str, str]]) -> None:
        with replacing(self.path) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=header)
            if header:
                writer.writeheader()
                writer.writerows(rows)


class _MetricsFile(CSVLogger):
    """RUN_DIR/metrics.csv, written after every step.

    Args:
        run_dir, rows: as in `csv_logger`.
    """

    def __init__(self, run_dir: str | Path, *rows: Any) -> None:
        super().__init__(run_dir, name="", version="", flush_logs_every_n_steps=1)
        self._rows = rows

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """See `CSVLogger`."""
        if self._experiment is None:
            self._experiment = _Rows(self.log_dir, *self._rows)
        return self._experiment


def csv_logger(run_dir: str | Path, resumed_step: int | None = None, validates: bool = False) -> CSVLogger:
    """Log to RUN_DIR/metrics.csv, which is not changed until there is something to log.

    Args:
        run_dir: the run folder.
        resumed_step: the optimizer step that a resumed run continues from; rows before it are kept.
        validates: the resumed run begins with the validation after the step before, whose row is then removed.
    """
    return _MetricsFile(run_dir, resumed_step, validates)


def _is_of_validation(row: dict[str, str]) -> bool:
    return any(value for key, value in row.items() if key.startswith("val/"))


def wandb_logger(
    project: str,
    save_dir: str | Path,
    name: str | None = None,
    group: str | None = None,
    mode: Literal["online", "offline", "disabled"] | None = None,
) -> WandbLogger:
    """Log to Weights & Biases: online if the user is logged in and W&B answers, else offline. It never prompts.

    If the connection is lost later, W&B keeps trying. What it could not send stays in the run folder, and a run waits
    five minutes for it at its end (WANDB_FINISH_TIMEOUT, in seconds).

    Args:
        project: W&B project of the run.
        save_dir: run folder.
        name: display name of the run.
        group: group of runs, such as those of a sweep.
        mode: whether W&B is `online`, `offline` or `disabled`; None for online if you are logged in. The environment
            variable WANDB_MODE overrides it.
    """
    save_dir = Path(save_dir)
    wanted = os.environ.get("WANDB_MODE") or mode or ("online" if logged_in() else "offline")
    if wanted not in ("online", "offline", "disabled", "shared", "dryrun", "run"):
        raise UserError(f"WANDB_MODE={wanted}: choose one of online, offline, disabled")
    run_id = _run_id(save_dir / "wandb")
    # A lost connection must not block the end of a run: what was not sent is on disk.
    waits = {
        "init_timeout": _seconds("WANDB_INIT_TIMEOUT", 60),
        "finish_timeout": _seconds("WANDB_FINISH_TIMEOUT", 300),
    }

    def make(mode: str) -> WandbLogger:
        # What W&B says of a run offline is one line of ours; online it may have to warn.
        settings = wandb.Settings(quiet=True, silent=mode == "offline", **waits)
        logger = WandbLogger(
            project=project, save_dir=save_dir, name=name, group=group, id=run_id, mode=mode, resume="allow",
            settings=settings,
        )  # fmt: skip
        logger._wandb_init.pop("anonymous", None)  # W&B warns about this argument
        return logger

    logger = make(wanted)
    why = "not logged in"
    if wanted == "online" and is_rank_zero():
        try:
            say(f"W&B: {logger.experiment.url}")  # it connects
        except wandb.errors.Error as error:
            why, wanted = f"cannot be reached or refuses ({one_line(str(error))})", "offline"
            wandb.teardown()
            logger = make(wanted)
    if wanted == "offline":
        say(f"W&B: {why}, so this run is recorded offline; upload it with `wandb sync {save_dir}/wandb/offline-run-*`")
    return logger


def _seconds(variable: str, otherwise: float) -> float:
    given = os.environ.get(variable) or otherwise
    try:
        return float(given)
    except ValueError:
        raise UserError(f"{variable}={given} must be a number of seconds") from None


def remember_run_id(logger: WandbLogger) -> None:
    """Keep the W&B run's id in the run folder, so that a resumed run continues the same W&B run."""
    write_text(Path(logger.save_dir or ".") / "wandb" / "run_id", str(logger.experiment.id))


def _run_id(folder: Path) -> str | None:
    """The id of the W&B run in a run folder's logs; None if there is none yet."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[\w-]+", found := (folder / "run_id").read_text(encoding="utf-8").strip()):
            return found
    # The file is damaged. W&B's folder of each part has the id in its name.
    parts = sorted(path.name for path in folder.glob("*run-*-*"))
    return parts[-1].rpartition("-")[2] if parts else None


_PATIENCE = 20  # a server that was waited for is asked again after this many times the wait
_silent_until = 0.0


def send(what: str, log: Callable[[], object]) -> None:
    """Log something to W&B for which its library may wait for the server: figures, tables, artifacts.

    A run must neither fail nor become slow because its log cannot be sent: an error is one line, and until much longer
    than the wait has passed, nothing more is sent. Numbers are not affected: W&B sends them in the background.
    """
    global _silent_until
    began = time.monotonic()
    if began < _silent_until:
        return
    try:
        log()
    except (wandb.errors.Error, WandbApiFailedError, OSError, ValueError) as error:
        now = time.monotonic()
        _silent_until = now + _PATIENCE * (now - began)
        say(f"W&B: {what} cannot be sent ({one_line(str(error))}); the run continues, and its numbers are on disk")


def log_data(run: Any, sets: Sequence[dict[str, Any]]) -> threading.Thread | None:
    """Log the prepared data of a run to W&B, as artifacts with the manifest and the folder's path.

    Args:
        run: the W&B run; an offline run cannot use artifacts, so nothing is logged.
        sets: `vlabs.data.loading.identity_of` each prepared folder.

    Returns:
        The thread that logs it in the background; None if the run is offline.
    """
    if not run.offline:
        # W&B may wait for its server forever here, so this is done in a daemon thread.
        thread = threading.Thread(target=_use_data, args=(run, list(sets)), daemon=True)
        thread.start()
        return thread
    return None


def _use_data(run: Any, sets: Sequence[dict[str, Any]]) -> None:
    for item in sets:
        send("what it was trained on", partial(_use_set, run, item))


def _use_set(run: Any, item: dict[str, Any]) -> None:
    name = re.sub(r"[^\w.-]+", "-", item["name"] or Path(item["dir"]).name)
    artifact = wandb.Artifact(name, "dataset", metadata=item)
    artifact.add_file(str(Path(item["dir"]) / "manifest.json"))
    run.use_artifact(artifact)


def log_outcome(run: Any, summary: dict[str, Any], checkpoint: str | None) -> None:
    """Write the cost of a finished run into its W&B summary and, if online, log its best checkpoint as an artifact."""
    run.summary.update({key: summary[key] for key in ("parameters", "fit_seconds", "epochs", "steps")})
    if checkpoint is not None and not run.offline:
        send("the best checkpoint", partial(_log_checkpoint, run, checkpoint))


def _log_checkpoint(run: Any, path: str) -> None:
    artifact = wandb.Artifact(f"checkpoint-{run.id}", "model")
    artifact.add_file(path)
    run.log_artifact(artifact, aliases=["best"])


def logged_in() -> bool:
    """Whether W&B would find credentials: in environment variables, or in netrc, where `wandb login` writes them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            if path and netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
