"""Train: `python -m vlabs.train task=vqa [group=choice] [key=value]`, with `-m` a sweep, with `resume=RUN_DIR` go on.

A run folder holds config.yaml (resolved), environment.json, metrics.csv, summary.json, checkpoints/, figures/, wandb/.
"""

from __future__ import annotations

import argparse
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
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from vlabs.errors import UserError, one_line, show
from vlabs.runs.config import (
    as_config,
    as_given,
    check,
    command_line,
    config_dir,
    explain,
    is_fault,
    path_of,
    plain,
    recorded,
    run_hydra,
    save_config,
)
from vlabs.runs.logging import last_metrics, log_data, log_outcome, quiet_lightning
from vlabs.runs.record import Record, changes, changing, read_config, read_summary, run_folder, way_on
from vlabs.runs.sweep import check_table, has_table, write_table
from vlabs.training.build import Training, build, build_task, data_sets
from vlabs.training.callbacks.recording import Recorder
from vlabs.training.plan import plan_run
from vlabs.training.start import Last, last_whole
from vlabs.utils.ranks import is_rank_zero, say

_failed_runs: list[str] = []
_began = time.time()  # of the process; a folder that is older was there before


def run(config: DictConfig) -> dict[str, Any]:
    """One run, as Hydra calls it. In a sweep a failure is returned, not raised, so that the sweep goes on."""
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
            raise UserError("plan=true is of one training, not of a sweep: leave out -m")
        found = plan_run(config, *build_task(config, _last(config, run_dir)))
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra made it; what is not empty stays
        return found
    with run_folder(run_dir, config.resume is not None, _began):
        return _run(config, hydra, run_dir, sweep)


def _run(config: DictConfig, hydra: Any, run_dir: Path, sweep: Path | None) -> dict[str, Any]:
    record = _record(hydra, run_dir, config)
    summary: dict[str, Any] = {"status": "failed"}
    try:
        summary = train(config, record)
    except (SIGTERMException, KeyboardInterrupt) as stop:
        # Not a failure of this run, and no next run of a sweep is to begin.
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
        # The next run of a sweep, in this same process, is a W&B run of its own.
        if wandb.run is not None:
            wandb.finish(exit_code=int(summary["status"] != "done"))
    if not is_rank_zero():
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra makes one in every process; the run's is rank zero's
    if is_rank_zero():
        if sweep is not None:
            print(write_table(sweep), flush=True)
        elif config.resume is not None and (of := _sweep_of(run_dir)) is not None:
            with contextlib.suppress(UserError):  # of a folder that is not ours to write
                write_table(of)
    return summary


def _sweep_of(run_dir: Path) -> Path | None:
    """The sweep that a run was one of."""
    return next((folder for folder in run_dir.absolute().parents[:3] if has_table(folder)), None)


def train(config: DictConfig, record: Record) -> dict[str, Any]:
    """Build everything that the config names, fit, and return what summary.json says then.

    Args:
        config: of this module's program.
        record: of the run.
    """
    check(config)
    resumed = _last(config, record.folder)
    if resumed is not None:
        record.take_over(resumed.callbacks.get(Recorder.__qualname__, {}).get("summary", {}))
        if record.is_done and not resumed.changed:
            return _nothing_to_train(record)
    return fit(build(config, record, resumed), record)


def fit(training: Training, record: Record) -> dict[str, Any]:
    """Run a training to its end, and return what summary.json says then."""
    task, trainer, best, last = training.task, training.trainer, training.best, training.last
    parameters = sum(p.numel() for p in task.model.parameters())
    say(f"run: {trainer.default_root_dir} · {parameters / 1e6:.1f} M parameters · seed {os.environ['PL_GLOBAL_SEED']}")
    runs = [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger) and is_rank_zero()]
    for wandb_run in runs:
        log_data(wandb_run, data_sets(training.data))
    if trainer.num_nodes > 1 and trainer.local_rank == 0:  # of every node: one may wait for half an hour
        show(f"node {trainer.node_rank} waits for all {trainer.num_nodes} of MASTER_ADDR", file=sys.stderr, flush=True)
    record.fit_started = time.perf_counter()
    try:
        trainer.fit(task, datamodule=training.data, ckpt_path=training.resumed, weights_only=True)
    except Exception as error:  # a checkpoint that was tampered with makes Lightning fail in every way there is
        odd = isinstance(error, KeyError | IndexError | TypeError | ValueError | AttributeError)
        if training.resumed is None or record.begun or not (odd or is_fault(error)):
            raise
        said = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{training.resumed} is damaged, or no run goes on from it here ({said}): start the run again "
            "(VLABS_DEBUG=1 says where it fails)"
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
    metrics = metrics or last_metrics(record.folder / "metrics.csv")  # all was trained before summary.json was written
    kept = [path for path in (Path(best.best_model_path), last.path) if path.is_file()]
    found = {
        "parameters": parameters,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        f"best/{task.monitor}": None if best.best_model_score is None else float(best.best_model_score),
        "metrics": metrics,
        # Within the folder, which may be moved.
        "checkpoint": os.path.relpath(kept[0], os.path.realpath(record.folder)) if kept else None,
    }
    for wandb_run in runs:
        log_outcome(wandb_run, record.summary("done", **found), str(kept[0]) if kept else None)
    for logger in trainer.loggers:
        logger.finalize("success")
    return record.end("done", **found)


def _nothing_to_train(record: Record) -> dict[str, Any]:
    say(f"run: {record.folder} is done, and nothing is left to train: pass trainer.max_epochs=N to go on further")
    return record.before


def _last(config: DictConfig, run_dir: Path) -> Last | None:
    """What a run goes on from, with what is to be other than before; None for a new run. Seeds all generators."""
    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.resume is None:
        return None
    last = last_whole(run_dir, config.resume)
    # What it was trained with; config.yaml may have been edited since.
    last.changed = _changed(config, last.config or _own_config(run_dir))
    return last


def _own_config(run_dir: Path) -> dict[str, Any]:
    own = read_config(run_dir)
    return {} if own is None else plain(recorded(own))


def _changed(config: DictConfig, own: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The options that are other than in a run's own config."""
    return changes(own, plain(recorded(config))) if own else {}


def _record(hydra: Any, run_dir: Path, config: DictConfig) -> Record:
    """The record of a run that begins, goes on, or begins with another run's config (`--config-dir=RUN`)."""
    given = [as_given(item) for item in hydra.overrides.task if not re.match(r"hydra[./]|\+*(resume|plan)=", item)]
    before = same_as = None
    command = command_line()
    if config.resume is not None:
        before = read_summary(run_dir)
        command = shlex.join(["python", "-m", "vlabs.train", f"resume={config.resume}", *given])
        given = changing(given, _changed(config, _own_config(run_dir)))
    else:
        folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
        same_as = next((found for path in folders if (found := read_summary(Path(path)))), None)
    return Record(run_dir, command, given, before, same_as, hydra.runtime.choices.get("model/topdown"))


def _end(record: Record, status: str, error: str) -> None:
    """Say how a run ended that has begun; where that cannot be written, the first error is the one to be told."""
    if record.begun:
        with contextlib.suppress(UserError):
            record.end(status, error=error)


def _failed(record: Record, config: DictConfig, error: str) -> dict[str, Any]:
    """Say of a run of a sweep that it failed, also where it could not begin."""
    _failed_runs.append(record.folder.name)
    print(f"run {record.folder.name} failed: {error}", file=sys.stderr)
    if not record.begun and is_rank_zero():
        with contextlib.suppress(UserError, OmegaConfBaseException):
            save_config(recorded(config), record.folder / "config.yaml")
    record.begun = True
    _end(record, "failed", error)
    return record.summary("failed", error=error)


def _check_sweep(config: DictConfig, hydra: Any) -> None:
    """Runs of a sweep that Hydra starts in this process use one device: another process would start the sweep again.

    Raises:
        UserError: they would use more, or it is a sweep over runs that go on.
    """
    if config.resume is not None:
        raise UserError(f"resume={config.resume} is of one run, not of a sweep: leave out -m")
    devices, nodes = config.trainer.get("devices", 1), config.trainer.get("num_nodes", 1)
    several = {"auto": torch.cuda.device_count(), -1: torch.cuda.device_count(), "-1": torch.cuda.device_count()}
    count = len(devices) if isinstance(devices, ListConfig) else several.get(devices, devices)
    launcher = str(hydra.launcher._target_)
    if (int(count) > 1 or int(nodes) > 1) and "submitit" not in launcher:
        raise UserError(
            f"trainer.devices={devices} in a sweep: its runs use one device, or are jobs of their own "
            "(hydra/launcher=slurm, hydra/launcher=submitit_local): pass trainer.devices=1"
        )


def _arguments(given: list[str]) -> list[str]:
    """Arguments for Hydra of a run that goes on, or begins with the config of another."""
    resumed = _resume_arguments(given)
    return resumed if resumed != given else _same_arguments(given)


def _resume_arguments(arguments: list[str]) -> list[str]:
    """Turn `resume=RUN_DIR` into Hydra's arguments for that run's own config and folder."""
    named = [item.partition("=")[2] for item in arguments if re.match(r"\+*resume=", item)]
    if not named or named[-1] == "null":
        return arguments
    run_dir = _run_named(path_of(named[-1]))
    others = [item for item in arguments if not re.match(r"\+*resume=", item)]
    for item in others:
        is_same = (
            item.startswith("hydra.run.dir=") and Path(path_of(item.partition("=")[2])).resolve() == run_dir.resolve()
        )
        if not is_same and re.match(r"\+*hydra\.run\.dir=|--config-|-c[dnp]\b", item):
            raise UserError(f"{item}: resume={run_dir} goes on in its own folder, with its own config: leave it out")
    _mend_config(run_dir)
    return [
        f"--config-dir={run_dir.resolve()}",
        "--config-name=config",
        f"++resume={run_dir}",  # quoted as all paths are
        f"hydra.run.dir={run_dir}",
        *_QUIET,
        *others,
    ]


def _run_named(path: str) -> Path:
    """The run folder that `resume=` names.

    Raises:
        UserError: it names none.
    """
    run_dir = Path(path)
    if not path:
        raise UserError("resume= names no folder: pass resume=RUN_DIR")
    within = run_dir.parent if run_dir.is_file() else run_dir
    if within.name == "checkpoints" and not (within / "config.yaml").exists():
        raise UserError(f"resume={run_dir} lies in a run, which goes on as a whole: pass resume={within.parent}")
    if not run_dir.is_dir():
        raise UserError(f"resume={run_dir}: there is no such folder")
    return run_dir


# What conf/train.yaml sets for runs whose config is a file of their own.
_QUIET = ("hydra.output_subdir=null", "hydra/job_logging=stdout", "hydra.job_logging.root.level=WARNING")


def _mend_config(run_dir: Path) -> None:
    """Write a config.yaml that is damaged or gone as the run's last checkpoint has it.

    Raises:
        UserError: that has none either.
    """
    config, path = read_config(run_dir), run_dir / "config.yaml"
    if config is not None and "resume" in config:  # the last of its lines
        return
    reason = "is damaged" if path.exists() else "is not there"
    try:
        kept = last_whole(run_dir, str(run_dir)).callbacks[Recorder.__qualname__]["config"]
    except (UserError, KeyError):
        raise UserError(f"resume={run_dir}: config.yaml {reason}, so it is not a run folder to go on with") from None
    save_config(as_config(kept), path)
    say(f"{path} {reason}: the last checkpoint has it")


def _same_arguments(arguments: list[str]) -> list[str]:
    """Add what conf/train.yaml says of run folders to the arguments of `--config-dir=RUN --config-name=config`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn")
    named, _ = parser.parse_known_args(arguments)
    config = read_config(Path(named.config_dir or ""))
    if named.config_name not in ("config", "config.yaml") or config is None or "resume" not in config:
        return arguments
    own: Any = OmegaConf.load(Path(config_dir()) / "train.yaml")
    folders: Any = OmegaConf.to_container(own.hydra, resolve=False)
    content: Any = OmegaConf.to_container(config, resolve=False)
    task = content.get("task")
    name = str(task.get("name", "train")) if isinstance(task, dict) else "train"
    dirs = [f"hydra.{group}.{key}='{folders[group][key]}'" for group in ("run", "sweep") for key in folders[group]]
    # Among the other overrides: Hydra takes them all in one place.
    first = next((n for n, one in enumerate(arguments) if re.match(r"[^-].*=|~", one)), len(arguments))
    return [*arguments[:first], *_QUIET, f"hydra.job.name={name}", *dirs, *arguments[first:]]


def main() -> None:
    """Entry point of `python -m vlabs.train`."""
    global _began
    _began = time.time()
    run_hydra(run, "train", prepare=_arguments)
    if _failed_runs:
        sys.exit(1)


if __name__ == "__main__":
    main()
