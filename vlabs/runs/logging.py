"""Loggers of a run: metrics.csv always, W&B by default."""

from __future__ import annotations

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
from typing import Any, Literal
from urllib.parse import urlparse

import wandb
from pytorch_lightning.loggers import CSVLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from wandb.sdk.lib.service.service_connection import WandbApiFailedError

from vlabs.errors import UserError, one_line
from vlabs.utils.ranks import is_rank_zero


@rank_zero_only
def say(message: str) -> None:
    """Print a line of a run's own, once whatever the number of processes."""
    print(message, flush=True)


def quiet_lightning() -> None:
    """Keep Lightning's hints out of a run's output, and warnings about what vlabs does knowingly."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*infer the `batch_size`.*",
        ".*`isinstance.treespec.*",
        ".*predict returned None.*",
        ".*is smaller than the logging interval.*",
        r".*on epoch level in distributed setting.*",  # a metric's value is of all ranks already
    ):
        warnings.filterwarnings("ignore", message=message)


def csv_logger(run_dir: str | Path, resumed_step: int | None = None, validates: bool = False) -> CSVLogger:
    """Log to RUN_DIR/metrics.csv.

    Args:
        resumed_step: the optimiser step that a resumed run goes on from: rows before it are kept.
        validates: the resumed run begins with the validation after the step before, whose row is then not kept.
    """
    path = Path(run_dir) / "metrics.csv"
    kept: list[dict[str, str]] = []
    header: list[str] = []
    if resumed_step is not None and path.is_file():
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            header = list(reader.fieldnames or [])
            kept = [row for row in reader if int(row["step"]) < resumed_step]
        if validates:
            kept = [row for row in kept if int(row["step"]) < resumed_step - 1 or not _is_of_validation(row)]
    logger = CSVLogger(run_dir, name="", version="", flush_logs_every_n_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Experiment logs directory")
        experiment = logger.experiment  # Lightning deletes an old metrics.csv here
    if header:
        experiment.metrics_keys = header
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=header)
            writer.writeheader()
            writer.writerows(kept)
    return logger


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
        mode: `online` or `offline` to decide it; W&B's own WANDB_MODE decides before that.
    """
    save_dir = Path(save_dir)
    wanted = os.environ.get("WANDB_MODE") or mode or ("online" if logged_in() else "offline")
    if wanted not in ("online", "offline", "disabled", "shared", "dryrun", "run"):
        raise UserError(f"WANDB_MODE={wanted}: choose one of online, offline, disabled")
    id_file = save_dir / "wandb" / "run_id"
    run_id = id_file.read_text().strip() if id_file.is_file() else None
    # A lost connection must not hold a run at its end: what was not sent by then is on disk.
    waits = {
        "init_timeout": _seconds("WANDB_INIT_TIMEOUT", 60),
        "finish_timeout": _seconds("WANDB_FINISH_TIMEOUT", 300),
    }

    def make(mode: str) -> WandbLogger:
        settings = wandb.Settings(**waits)
        return WandbLogger(
            project=project, save_dir=save_dir, name=name, group=group, id=run_id, mode=mode, resume="allow",
            settings=settings,
        )  # fmt: skip

    logger = make(wanted)
    why = "not logged in"
    if wanted == "online" and is_rank_zero():
        try:
            logger.experiment  # noqa: B018  it connects
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
    path = Path(logger.save_dir or ".") / "wandb" / "run_id"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(logger.experiment.id))


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
        # W&B waits for its server here, for ever if need be, and a run must not.
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
