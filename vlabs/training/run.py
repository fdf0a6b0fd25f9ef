"""A training from its config to its summary, as `vlabs train` runs it, alone or in a sweep."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import wandb
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from vlabs.errors import UserError, one_line, show
from vlabs.runs.config import as_given, check, command_line, explain, is_fault, plain, recorded, save_config
from vlabs.runs.logging import last_metrics, log_data, log_outcome, quiet_lightning
from vlabs.runs.record import Record, changes, changing, read_config, read_summary, run_folder, way_on
from vlabs.runs.sweep import check_table, has_table, write_table
from vlabs.runs.values import with_newer
from vlabs.training.build import Training, build, build_task, data_sets
from vlabs.training.callbacks.recording import Recorder
from vlabs.training.plan import plan_run
from vlabs.training.start import Last, last_whole
from vlabs.training.words import beginning, ending
from vlabs.utils.ranks import is_rank_zero, say


def run(config: DictConfig) -> dict[str, Any]:
    """One run, started by Hydra. In a sweep a failure is returned instead of raised, so that the sweep continues.

    Args:
        config: the config of `vlabs train`.
    """
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    sweep = Path(hydra.sweep.dir) if hydra.mode == RunMode.MULTIRUN else None
    if sweep is not None:
        _check_sweep(config, hydra)
        check_table(sweep)
        if "group" in config.logger:
            config.logger.group = config.logger.group or sweep.name
            config.logger.name = config.logger.name or hydra.job.override_dirname.replace(",", " ") or run_dir.name
    if config.plan:
        if sweep is not None:
            raise UserError("plan=true works for one training, not for a sweep: leave out -m")
        return plan_run(config, *build_task(config, _last(config, run_dir)))
    with run_folder(run_dir, config.resume is not None):
        return _run(config, hydra, run_dir, sweep)


def _run(config: DictConfig, hydra: Any, run_dir: Path, sweep: Path | None) -> dict[str, Any]:
    record = _record(hydra, run_dir, config)
    summary: dict[str, Any] = {"status": "failed"}
    try:
        summary = train(config, record)
    except (SIGTERMException, KeyboardInterrupt) as stop:
        # A stop is not a failure. It also ends a sweep, so that no further run begins.
        by = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else getattr(stop, "signal", signal.SIGTERM)
        said = f"{signal.Signals(by).name}; {way_on(run_dir)}"
        _end(record, "stopped", said)
        if is_rank_zero():
            print(f"stopped: {said}", file=sys.stderr)
        sys.exit(128 + by)
    except Exception as error:
        said = one_line(explain(error))
        if record.begun and not isinstance(error, UserError) and not is_fault(error):
            said += f"; {way_on(run_dir)}"
        if sweep is None:
            _end(record, "failed", said)
            if isinstance(error, UserError) or is_fault(error):
                raise
            raise UserError(said) from error
        summary = _failed(record, config, said)
        if is_fault(error):
            traceback.print_exception(error)
    finally:
        # The next run of a sweep is in this process, and needs its own W&B run.
        if wandb.run is not None:
            wandb.finish(exit_code=int(summary["status"] != "done"))
    if is_rank_zero():
        if sweep is not None:
            print(write_table(sweep), flush=True)
        elif config.resume is not None and (of := _sweep_of(run_dir)) is not None:
            with contextlib.suppress(UserError):  # the sweep's folder may not be writable
                write_table(of)
    return summary


def _sweep_of(run_dir: Path) -> Path | None:
    """The folder of the sweep that a run belongs to, if any."""
    return next((folder for folder in run_dir.absolute().parents[:3] if has_table(folder)), None)


def train(config: DictConfig, record: Record) -> dict[str, Any]:
    """Build everything that the config names, train, and return the content of summary.json.

    Args:
        config: the config of `vlabs train`.
        record: the record of the run.
    """
    check(config)
    resumed = _last(config, record.folder)
    if resumed is not None:
        record.take_over(resumed.callbacks.get(Recorder.__qualname__, {}).get("summary", {}))
        if record.is_done and not resumed.changed:
            return _nothing_to_train(record)
    return fit(build(config, record, resumed), record)


def fit(training: Training, record: Record) -> dict[str, Any]:
    """Run a training to its end, and return the content of summary.json."""
    task, trainer, best, last = training.task, training.trainer, training.best, training.last
    parameters = sum(p.numel() for p in task.model.parameters())
    say(beginning(task, training.data, record.folder))
    runs = [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger) and is_rank_zero()]
    for wandb_run in runs:
        log_data(wandb_run, data_sets(training.data))
    if trainer.num_nodes > 1 and trainer.local_rank == 0:  # on each node, because it may wait for half an hour
        show(f"node {trainer.node_rank} waits for all {trainer.num_nodes} of MASTER_ADDR", file=sys.stderr, flush=True)
    record.fit_started = time.perf_counter()
    try:
        trainer.fit(task, datamodule=training.data, ckpt_path=training.resumed, weights_only=True)
    except Exception as error:  # a manipulated checkpoint makes Lightning fail with any kind of error
        odd = isinstance(error, KeyError | IndexError | TypeError | ValueError | AttributeError)
        if training.resumed is None or record.begun or not (odd or is_fault(error)):
            raise
        said = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{training.resumed} is damaged, or this run cannot resume from it ({said}): start the run again "
            "(VLABS_DEBUG=1 shows where it fails)"
        ) from error
    finally:
        last.listen_no_more()
    record.fit_ended = time.perf_counter()
    if not record.begun:
        if record.is_done:
            return _nothing_to_train(record)
        record.first_step = trainer.global_step
        training.begin()
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    # No metrics in memory if an earlier process trained everything, but did not get to write summary.json.
    metrics = metrics or last_metrics(record.folder / "metrics.csv")
    kept = [path for path in (Path(best.best_model_path), last.path) if path.is_file()]
    found = {
        "parameters": parameters,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        f"best/{task.monitor}": None if best.best_model_score is None else float(best.best_model_score),
        "metrics": metrics,
        # Relative to the folder, which may be moved.
        "checkpoint": os.path.relpath(kept[0], os.path.realpath(record.folder)) if kept else None,
    }
    for wandb_run in runs:
        log_outcome(wandb_run, record.summary("done", **found), str(kept[0]) if kept else None)
    for logger in trainer.loggers:
        logger.finalize("success")
    summary = record.end("done", **found)
    say(ending(task, record.folder, training.line, _own_folders()))
    return summary


def _nothing_to_train(record: Record) -> dict[str, Any]:
    say(f"run: {record.folder} is done, and nothing is left to train: pass trainer.max_epochs=N to train further")
    return record.before


def _last(config: DictConfig, run_dir: Path) -> Last | None:
    """The checkpoint to resume from, with the options that changed; None for a new run. Seeds all generators."""
    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.resume is None:
        return None
    last = last_whole(run_dir, config.resume)
    say(f"resume: {last.path}, after {last.step:,} steps")
    # The config in the checkpoint is what the run was trained with; config.yaml may have been edited since.
    last.changed = _changed(config, last.config or _own_config(run_dir))
    return last


def _own_config(run_dir: Path) -> dict[str, Any]:
    own = read_config(run_dir)
    return {} if own is None else plain(recorded(own))


def _changed(config: DictConfig, own: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options that differ from a run's own config; those that are newer than the run had their defaults."""
    now = plain(recorded(config))
    return changes(with_newer(own, now), now) if own else {}


def _record(hydra: Any, run_dir: Path, config: DictConfig) -> Record:
    """The record of a run that is new, resumed, or new with another run's config (`--config-dir=RUN`)."""
    given = [as_given(item) for item in hydra.overrides.task if not re.match(r"hydra[./]|\+*(resume|plan)=", item)]
    before = same_as = None
    command = command_line()
    if config.resume is not None:
        before = read_summary(run_dir)
        command = shlex.join(["vlabs", "train", f"resume={config.resume}", *given])
        given = changing(given, _changed(config, _own_config(run_dir)))
    else:
        same_as = next((found for path in _own_folders() if (found := read_summary(Path(path)))), None)
    return Record(run_dir, command, given, before, same_as, hydra.runtime.choices.get("model/topdown"))


def _own_folders() -> list[str]:
    """The folders of `--config-dir`; none for a training that is not Hydra's."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    return [source.path for source in sources if source.provider == "command-line"]


def _end(record: Record, status: str, error: str) -> None:
    """Record how a run has ended, if it had begun. An error in writing this must not hide the first error."""
    if record.begun:
        with contextlib.suppress(UserError):
            record.end(status, error=error)


def _failed(record: Record, config: DictConfig, error: str) -> dict[str, Any]:
    """Record that a run of a sweep failed, also if it could not begin."""
    print(f"run {record.folder.name} failed: {error}", file=sys.stderr)
    if not record.begun and is_rank_zero():
        with contextlib.suppress(UserError, OmegaConfBaseException):
            save_config(recorded(config), record.folder / "config.yaml")
    record.begun = True
    _end(record, "failed", error)
    return record.summary("failed", error=error)


def _check_sweep(config: DictConfig, hydra: Any) -> None:
    """Check that the runs of a sweep in this process use one device: a second process would start the sweep again.

    Raises:
        UserError: they would use more, or `resume=` is given.
    """
    if config.resume is not None:
        raise UserError(f"resume={config.resume} works for one run, not for a sweep: leave out -m")
    devices, nodes = config.trainer.get("devices", 1), config.trainer.get("num_nodes", 1)
    several = {"auto": torch.cuda.device_count(), -1: torch.cuda.device_count(), "-1": torch.cuda.device_count()}
    count = len(devices) if isinstance(devices, ListConfig) else several.get(devices, devices)
    launcher = str(hydra.launcher._target_)
    if (int(count) > 1 or int(nodes) > 1) and "submitit" not in launcher:
        raise UserError(
            f"trainer.devices={devices} in a sweep: its runs use one device, or are separate jobs "
            "(hydra/launcher=slurm, hydra/launcher=submitit_local): pass trainer.devices=1"
        )
