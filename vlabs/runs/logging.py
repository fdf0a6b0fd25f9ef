"""Loggers of a run: metrics.csv always, W&B by default."""

from __future__ import annotations

import contextlib
import csv
import logging
import netrc
import os
import re
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
    """Keep Lightning's hints out of a run's output, and warnings about what vlabs does knowingly."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*worker processes in total.*",  # data.num_workers is refused where it is too many
        ".*infer the `batch_size`.*",
        ".*`isinstance.treespec.*",
        ".*predict returned None.*",
        ".*is smaller than the logging interval.*",
        ".*in eval mode at the start of training.*",  # what task.freeze names
        ".*Checkpoint directory .* exists and is not empty.*",  # of a run that goes on
        r".*on epoch level in distributed setting.*",  # a metric's value is of all ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


class Metrics(NamedTuple):
    """What can be read of a metrics.csv.

    Attributes:
        header: the columns.
        rows: each with all columns, as text.
        lost: how many lines could not be read.
    """

    header: list[str]
    rows: list[dict[str, str]]
    lost: int


def read_metrics(path: Path) -> Metrics:
    """Read a metrics.csv, also one that a full disk or a machine that went down has cut or filled with zeros."""
    lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    lost = bool(lines.pop())  # what does not end with its line was being written
    fields = [None if {"\0", "\ufffd"} & set(line) else next(csv.reader([line.rstrip("\r")]), []) for line in lines]
    header = fields[0] if fields and fields[0] and "step" in fields[0] else []
    rows = [dict(zip(header, row, strict=True)) for row in fields[1:] if header and row and len(row) == len(header)]
    rows = [row for row in rows if row["step"].isdecimal()]
    return Metrics(header, rows, lost + len(lines) - len(rows) - bool(header))


def last_metrics(path: Path) -> dict[str, float]:
    """The last value of every metric in a metrics.csv; none where there is no such file."""
    found: dict[str, float] = {}
    for row in read_metrics(path).rows if path.is_file() else []:
        found |= {name: float(value) for name, value in row.items() if value and name not in ("step", "epoch")}
    return found


class _Rows(ExperimentWriter):
    """Lightning's writer of metrics.csv, which loses nothing that is in the file where it cannot be written.

    Args:
        resumed_step, validates: of `csv_logger`.
    """

    def __init__(self, log_dir: str, resumed_step: int | None, validates: bool) -> None:
        self.path = Path(log_dir) / self.NAME_METRICS_FILE
        self.resumed_step, self.validates = resumed_step, validates
        self.opened = False
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """What is there belongs to this run; Lightning would remove it."""

    def save(self) -> None:
        """Append what was logged since.

        Raises:
            UserError: the system does not let it be written; no row is there in part.
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
        """Keep the rows before the step that a run goes on from; of a new run none."""
        self.opened = True
        if self.resumed_step is None or not self.path.is_file():
            self.path.unlink(missing_ok=True)
            return
        header, rows, lost = read_metrics(self.path)
        if lost:
            say(f"{self.path}: {lost} lines are damaged and left out")
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
        run_dir, rows: as of `csv_logger`.
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
    """Log to RUN_DIR/metrics.csv, which is left as it is until there is something to log.

    Args:
        resumed_step: the optimizer step that a resumed run goes on from: rows before it are kept.
        validates: the resumed run begins with the validation after the step before, whose row is then not kept.
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
    """Log to Weights & Biases: online when the user is logged in and W&B answers, else offline. Never asks.

    A connection that is lost later is W&B's to mend: it goes on trying, what it could not send stays in the run folder,
    and a run waits five minutes for it at its end (WANDB_FINISH_TIMEOUT, in seconds).

    Args:
        project: W&B project of the run.
        save_dir: run folder.
        name: display name of the run.
        group: group of runs, such as those of a sweep.
        mode: whether W&B is `online`, `offline` or `disabled`; None for online where you are logged in. WANDB_MODE, if
            it is set, decides.
    """
    save_dir = Path(save_dir)
    wanted = os.environ.get("WANDB_MODE") or mode or ("online" if logged_in() else "offline")
    if wanted not in ("online", "offline", "disabled", "shared", "dryrun", "run"):
        raise UserError(f"WANDB_MODE={wanted}: choose one of online, offline, disabled")
    run_id = _run_id(save_dir / "wandb")
    # A lost connection must not hold a run at its end: what was not sent by then is on disk.
    waits = {
        "init_timeout": _seconds("WANDB_INIT_TIMEOUT", 60),
        "finish_timeout": _seconds("WANDB_FINISH_TIMEOUT", 300),
    }

    def make(mode: str) -> WandbLogger:
        settings = wandb.Settings(quiet=True, **waits)
        logger = WandbLogger(
            project=project, save_dir=save_dir, name=name, group=group, id=run_id, mode=mode, resume="allow",
            settings=settings,
        )  # fmt: skip
        logger._wandb_init.pop("anonymous", None)  # of which W&B warns
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
    """Keep the W&B run's id in the run folder, so that a resumed run goes on in the same W&B run."""
    write_text(Path(logger.save_dir or ".") / "wandb" / "run_id", str(logger.experiment.id))


def _run_id(folder: Path) -> str | None:
    """The W&B run that a run folder's logs are of; None where there is none yet."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"[\w-]+", found := (folder / "run_id").read_text(encoding="utf-8").strip()):
            return found
    # Damaged: W&B names the folder of each part by it.
    parts = sorted(path.name for path in folder.glob("*run-*-*"))
    return parts[-1].rpartition("-")[2] if parts else None


@contextmanager
def sending(what: str) -> Iterator[None]:
    """Say in a line that W&B does not take something, and go on: a run does not end because its log cannot be sent."""
    try:
        yield
    except (wandb.errors.Error, WandbApiFailedError, OSError, ValueError) as error:
        say(f"W&B does not take {what}: {one_line(str(error))}")


def log_data(run: Any, sets: Sequence[dict[str, Any]]) -> threading.Thread | None:
    """Say in W&B which prepared data a run uses, as artifacts that hold the manifest and the folder's path.

    Args:
        run: of W&B; nothing is said where it is offline, which has no artifacts to use.
        sets: of `vlabs.data.loading.identity_of`.

    Returns:
        The thread that says it, beside the run; None where the run is offline.
    """
    if not run.offline:
        # W&B waits for its server here, forever if need be, and a run must not.
        thread = threading.Thread(target=_use_data, args=(run, list(sets)), daemon=True)
        thread.start()
        return thread
    return None


def _use_data(run: Any, sets: Sequence[dict[str, Any]]) -> None:
    for item in sets:
        with sending("this run's data as an artifact"):
            name = re.sub(r"[^\w.-]+", "-", item["name"] or Path(item["dir"]).name)
            artifact = wandb.Artifact(name, "dataset", metadata=item)
            artifact.add_file(str(Path(item["dir"]) / "manifest.json"))
            run.use_artifact(artifact)


def log_outcome(run: Any, summary: dict[str, Any], checkpoint: str | None) -> None:
    """Write what a finished run cost into its W&B summary and, online, its best checkpoint as an artifact."""
    run.summary.update({key: summary[key] for key in ("parameters", "fit_seconds", "epochs", "steps")})
    if checkpoint is not None and not run.offline:
        with sending("the best checkpoint as an artifact"):
            artifact = wandb.Artifact(f"checkpoint-{run.id}", "model")
            artifact.add_file(checkpoint)
            run.log_artifact(artifact, aliases=["best"])


def logged_in() -> bool:
    """Whether W&B would find credentials: its environment variables, or the netrc entry that `wandb login` writes."""
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
