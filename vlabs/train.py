"""Train: `python -m vlabs.train task=vqa [group=choice] [key=value]`, with `-m` a sweep, with `resume=RUN_DIR` go on.

A run folder holds config.yaml (resolved), environment.json, metrics.csv, summary.json, checkpoints/, figures/, wandb/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import wandb
from filelock import FileLock
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from pytorch_lightning.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException

from vlabs.callbacks import (
    FiniteGradients,
    GoOn,
    GroundingCurve,
    KeepLast,
    PredictionTable,
    SamplesPerSecond,
    WholeCheckpointIO,
    previous_of,
    validation_is_next,
)
from vlabs.checkpoint import packaged_starts, read_tensors
from vlabs.config import command_line, explain, make_trainer, run_hydra, save_config
from vlabs.environment import describe_environment, write_environment
from vlabs.errors import UserError, one_line
from vlabs.initialize import initialize, read_source
from vlabs.logging import csv_logger, log_data, log_outcome, quiet_lightning, remember_run_id, say
from vlabs.plan import plan_run
from vlabs.sweep import write_table
from vlabs.tasks.vqa import VQATask

_failed_runs: list[str] = []


def run(config: DictConfig) -> dict[str, Any]:
    """One run, as Hydra calls it. In a sweep a failure is returned, not raised, so that the sweep goes on."""
    hydra = HydraConfig.get()
    run_dir = Path(hydra.runtime.output_dir)
    sweeping = hydra.mode == RunMode.MULTIRUN
    overrides = [item for item in hydra.overrides.task if not item.startswith("hydra.")]
    if sweeping:
        _check_sweep(config, hydra)
    if config.plan:
        if sweeping:
            raise UserError("plan=true is of one training, not of a sweep: leave out -m")
        found = train(config, run_dir)
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra made it; what is not empty stays
        return found
    summary: dict[str, Any] = {"status": "running", "command": command_line(), "overrides": overrides}
    started = time.perf_counter()
    try:
        summary |= train(config, run_dir, sweep=Path(hydra.sweep.dir) if sweeping else None)
        summary["status"] = "done"
    except SIGTERMException:
        # Not a failure of this run, and no next run of a sweep is to begin.
        summary |= {"status": "stopped", "error": f"SIGTERM; go on with resume={run_dir}"}
        _write_summary(run_dir, summary, started)
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        if "DataLoader worker" in str(error):
            # torch raises it wherever the main process happens to be.
            error = UserError(
                f"a loader process died ({one_line(str(error))}): if memory ran out, pass a smaller data.num_workers; "
                f"go on with resume={run_dir}"
            )
        user_error = error if isinstance(error, UserError) else None
        summary |= {"status": "failed", "error": one_line(explain(error))}
        if not sweeping:
            _write_summary(run_dir, summary, started)
            raise error
        _failed_runs.append(run_dir.name)
        print(f"run {run_dir.name} failed: {summary['error']}", file=sys.stderr)
        if user_error is None:
            traceback.print_exc()
    finally:
        # The next run of a sweep, in this same process, is a W&B run of its own.
        if wandb.run is not None:
            wandb.finish(exit_code=int(summary["status"] != "done"))
    _write_summary(run_dir, summary, started)
    if not _is_rank_zero():
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra makes one in every process; the run's is rank zero's
    if sweeping and _is_rank_zero():
        print(write_table(Path(hydra.sweep.dir)), flush=True)
    return summary


def train(config: DictConfig, run_dir: Path, sweep: Path | None = None) -> dict[str, Any]:
    """Build everything that the config names, fit, and return what goes into summary.json."""
    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.init is not None and config.init_by:
        _make_start(Path(config.init), list(config.init_by))
    data = instantiate(config.data)
    if config.init is not None and config.data.get("tokenizer") is None:
        header = read_source(config.init)[1]["vlabs"]
        if "trained" not in header or "text" in header["trained"]:
            # The text encoder's weights mean something for its own tokens only.
            tokenizer = header["preprocessing"]["tokenizer"]
            data.preprocessing = dataclasses.replace(data.preprocessing, tokenizer=tokenizer)
    with open_dict(config.model):
        if config.model.text.get("vocab_size", 0) is None:
            config.model.text.vocab_size = data.preprocessing.vocab_size
        if config.model.head.get("num_answers", 0) is None:
            config.model.head.num_answers = len(data.preprocessing.answers)
        if config.model.head.get("vocab_size", 0) is None:
            config.model.head.vocab_size = config.model.text.get("vocab_size") or data.preprocessing.vocab_size
    if not config.plan and _is_rank_zero():
        save_config(config, run_dir / "config.yaml")
    model = instantiate(config.model)
    data.preprocessing = dataclasses.replace(data.preprocessing, pad_to_max_length=model.pads_to_fixed_length)
    _check_fit(model, data)
    history: list[dict[str, Any]] = []
    if config.init is not None:
        initialized = initialize(model, config.init, data.preprocessing.answers)
        history = initialized.history
        say(initialized.report())
    # Partial, because Hydra would turn a dataclass among the arguments into a config.
    make_task = instantiate(config.task, _partial_=True, _convert_="all")
    task = make_task(model=model, preprocessing=data.preprocessing, data=data.identity | {"history": history})
    if not isinstance(data, task.reads):
        named = {"VQADataModule": "questions (data=scenes, vqav2)"}
        wanted = named.get(task.reads.__name__, "captions (data=scenes_captions, flickr30k, coco_captions)")
        raise UserError(f"task={task.name} trains on {wanted}, and data.dir={config.data.get('dir')} holds none")
    if config.plan:
        return plan_run(config, task, data)
    checkpoint = _last_whole(run_dir, config.resume) if config.resume is not None else None
    sets = data.identity.get("sets", [data.identity])
    if _is_rank_zero():
        found = describe_environment(sets)
        if changed := write_environment(run_dir / "environment.json", found, going_on=checkpoint is not None):
            say(f"not as when this run began: {'; '.join(changed)}")
    loggers = _loggers(config, run_dir, sweep, checkpoint)
    best, last = _checkpoints(run_dir, task.monitor, config.checkpoints)
    callbacks: list[Callback] = [
        best,
        last,
        GoOn(),
        FiniteGradients(config.max_bad_steps, last.path),
        SamplesPerSecond(),
        LearningRateMonitor("step"),
    ]
    callbacks.append(GroundingCurve(**config.grounding))
    if isinstance(task, VQATask):
        callbacks.append(PredictionTable(run_dir / "figures", **config.predictions))
    if config.trainer.get("enable_progress_bar"):
        callbacks.append(TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50))
    trainer = make_trainer(
        config.trainer,
        callbacks=callbacks,
        logger=loggers,
        plugins=[WholeCheckpointIO()],
        default_root_dir=str(run_dir),
    )
    parameters = sum(p.numel() for p in model.parameters())
    say(f"run: {run_dir} · {parameters / 1e6:.1f} M parameters · seed {config.seed}")
    runs = [logger.experiment for logger in loggers if isinstance(logger, WandbLogger) and _is_rank_zero()]
    for wandb_run in runs:
        log_data(wandb_run, sets)
    fit_started = time.perf_counter()
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    summary = {
        "parameters": parameters,
        "fit_seconds": round(time.perf_counter() - fit_started, 1),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        f"best/{task.monitor}": None if best.best_model_score is None else float(best.best_model_score),
        "metrics": metrics,
        "checkpoint": best.best_model_path or (str(last.path) if last.path.is_file() else None),
    }
    for wandb_run in runs:
        log_outcome(wandb_run, summary, summary["checkpoint"])
    for logger in loggers:
        logger.finalize("success")
    return summary


def _check_sweep(config: DictConfig, hydra: Any) -> None:
    """Runs of a sweep that Hydra starts in this process use one device: another process would start the sweep again.

    Raises:
        UserError: they would use more.
    """
    devices, nodes = config.trainer.get("devices", 1), config.trainer.get("num_nodes", 1)
    several = {"auto": torch.cuda.device_count(), -1: torch.cuda.device_count(), "-1": torch.cuda.device_count()}
    count = len(devices) if isinstance(devices, ListConfig) else several.get(devices, devices)
    launcher = str(hydra.launcher._target_)
    if (int(count) > 1 or int(nodes) > 1) and "submitit" not in launcher:
        raise UserError(
            f"trainer.devices={devices} in a sweep: its runs use one device, or are jobs of their own "
            "(hydra/launcher=slurm, hydra/launcher=submitit_local): pass trainer.devices=1"
        )


def _make_start(folder: Path, overrides: list[str]) -> None:
    """Train the run that this one starts from, unless it is there; processes of one machine wait for each other.

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


def _checkpoints(run_dir: Path, monitor: str, often: DictConfig) -> tuple[ModelCheckpoint, KeepLast]:
    """best.ckpt, the weights with the best value of a metric; last.ckpt, all that a resumed run needs."""
    minutes, steps = often.every_minutes, often.every_n_steps
    for name, value in (("every_minutes", minutes), ("every_n_steps", steps)):
        if value is not None and (not isinstance(value, int | float) or value <= 0):
            raise UserError(f"checkpoints.{name}={value} must be a number above 0, or null")
    if minutes is not None and steps is not None:
        raise UserError("checkpoints: every_minutes and every_n_steps exclude each other; set one of them to null")
    best = ModelCheckpoint(
        run_dir / "checkpoints",
        filename="best",
        monitor=monitor,
        mode="max",
        save_weights_only=True,
        enable_version_counter=False,
    )
    return best, KeepLast(run_dir / "checkpoints" / "last.ckpt", minutes, steps)


def _last_whole(run_dir: Path, resume: str) -> Path:
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


def _check_fit(model: Any, data: Any) -> None:
    """The text encoder must know every token that the tokenizer can make, and have a position for each."""
    known = model.text.spec["vocab_size"]
    if data.preprocessing.vocab_size > known:
        raise UserError(
            f"the tokenizer has {data.preprocessing.vocab_size} tokens and the text encoder {known}: "
            "pass data.tokenizer=DIR of the text encoder's own"
        )
    if data.preprocessing.max_length > model.text.max_length:
        raise UserError(
            f"data.max_length={data.preprocessing.max_length} is more than the text encoder's {model.text.max_length}"
        )


def _loggers(config: DictConfig, run_dir: Path, sweep: Path | None, resumed: Path | None) -> list[Logger]:
    """metrics.csv, and the logger that was chosen."""
    step, validates = None, False
    if resumed is not None:
        state = read_tensors(resumed)
        step, validates = int(state["global_step"]), validation_is_next(state["loops"])
    loggers: list[Logger] = [csv_logger(run_dir, step, validates)]
    if config.logger.get("_target_") is None:
        return loggers
    chosen = config.logger.copy()
    if sweep is not None and "group" in chosen:
        overrides = HydraConfig.get().job.override_dirname.replace(",", " ")
        chosen.group = chosen.group or sweep.name
        chosen.name = chosen.name or overrides or run_dir.name
    logger = instantiate(chosen, save_dir=str(run_dir))
    if isinstance(logger, WandbLogger) and _is_rank_zero():
        remember_run_id(logger)
        logged = OmegaConf.to_container(config, resolve=True)
        assert isinstance(logged, dict)
        # A resumed run reads its config from its folder, and no choices are made; W&B has the variant already.
        if (variant := HydraConfig.get().runtime.choices.get("model/topdown")) is not None:
            logged["variant"] = variant
        logger.experiment.config.update(logged, allow_val_change=True)
    return [*loggers, logger]


def _is_rank_zero() -> bool:
    return int(getattr(rank_zero_only, "rank", 0)) == 0


def _write_summary(run_dir: Path, summary: dict[str, Any], started: float) -> None:
    if not _is_rank_zero():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    summary["seconds"] = round(time.perf_counter() - started, 1)
    partial = run_dir / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    partial.replace(run_dir / "summary.json")


def _resume_arguments(arguments: list[str]) -> list[str]:
    """Turn `resume=RUN_DIR` into Hydra's arguments for that run's own config and folder."""
    named = [item for item in arguments if item.startswith("resume=")]
    if not named or named[-1] == "resume=null":
        return arguments
    run_dir = Path(named[-1].removeprefix("resume="))
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"resume={run_dir}: there is no config.yaml, so it is not a run folder")
    others = [item for item in arguments if not item.startswith("resume=")]
    return [
        f"--config-dir={run_dir.resolve()}",
        "--config-name=config",
        f"++resume='{run_dir}'",
        f"hydra.run.dir='{run_dir}'",
        "hydra.output_subdir=null",
        "hydra/job_logging=stdout",
        "hydra.job_logging.root.level=WARNING",
        *others,
    ]


def main() -> None:
    """Entry point of `python -m vlabs.train`."""
    try:
        sys.argv[1:] = _resume_arguments(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    run_hydra(run, "train")
    if _failed_runs:
        sys.exit(1)


if __name__ == "__main__":
    main()
