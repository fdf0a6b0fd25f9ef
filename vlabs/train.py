"""Train: `python -m vlabs.train task=vqa [group=choice] [key=value]`, with `-m` a sweep, with `resume=RUN_DIR` go on.

A run folder holds config.yaml (resolved), environment.json, metrics.csv, summary.json, checkpoints/, figures/, wandb/.
"""

from __future__ import annotations

import contextlib
import os
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
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException

from vlabs.errors import UserError, one_line
from vlabs.runs.config import check, command_line, explain, hydra_quoted, is_fault, path_of, run_hydra
from vlabs.runs.logging import log_data, log_outcome, quiet_lightning, say
from vlabs.runs.sweep import write_table
from vlabs.training.build import Training, build, build_task, data_sets
from vlabs.training.plan import plan_run
from vlabs.utils.files import write_json
from vlabs.utils.ranks import is_rank_zero

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
        summary |= {"status": "failed", "error": one_line(explain(error))}
        if not sweeping:
            _write_summary(run_dir, summary, started)
            raise error
        _failed_runs.append(run_dir.name)
        print(f"run {run_dir.name} failed: {summary['error']}", file=sys.stderr)
        if is_fault(error):
            traceback.print_exception(error)
    finally:
        # The next run of a sweep, in this same process, is a W&B run of its own.
        if wandb.run is not None:
            wandb.finish(exit_code=int(summary["status"] != "done"))
    _write_summary(run_dir, summary, started)
    if not is_rank_zero():
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # Hydra makes one in every process; the run's is rank zero's
    if sweeping and is_rank_zero():
        print(write_table(Path(hydra.sweep.dir)), flush=True)
    return summary


def train(config: DictConfig, run_dir: Path, sweep: Path | None = None) -> dict[str, Any]:
    """Build everything that the config names, fit, and return what goes into summary.json.

    With `plan=true` nothing is written, and what the whole training would cost is returned.
    """
    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    check(config)
    pl.seed_everything(config.seed, workers=True, verbose=False)
    if config.plan:
        return plan_run(config, *build_task(config))
    return fit(build(config, run_dir, sweep))


def fit(training: Training) -> dict[str, Any]:
    """Run a training to its end, and return what goes into summary.json."""
    task, trainer, best, last = training.task, training.trainer, training.best, training.last
    parameters = sum(p.numel() for p in task.model.parameters())
    say(f"run: {trainer.default_root_dir} · {parameters / 1e6:.1f} M parameters · seed {os.environ['PL_GLOBAL_SEED']}")
    runs = [logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger) and is_rank_zero()]
    for wandb_run in runs:
        log_data(wandb_run, data_sets(training.data))
    started = time.perf_counter()
    trainer.fit(task, datamodule=training.data, ckpt_path=training.resumed, weights_only=True)
    metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
    checkpoint = best.best_model_path or (str(last.path) if last.path.is_file() else None)
    summary = {
        "parameters": parameters,
        "fit_seconds": round(time.perf_counter() - started, 1),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        f"best/{task.monitor}": None if best.best_model_score is None else float(best.best_model_score),
        "metrics": metrics,
        "checkpoint": checkpoint,
    }
    for wandb_run in runs:
        log_outcome(wandb_run, summary, checkpoint)
    for logger in trainer.loggers:
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


def _write_summary(run_dir: Path, summary: dict[str, Any], started: float) -> None:
    if not is_rank_zero():
        return
    summary["seconds"] = round(time.perf_counter() - started, 1)
    write_json(run_dir / "summary.json", summary, indent=2)


def _resume_arguments(arguments: list[str]) -> list[str]:
    """Turn `resume=RUN_DIR` into Hydra's arguments for that run's own config and folder."""
    named = [item for item in arguments if item.startswith("resume=")]
    if not named or named[-1] == "resume=null":
        return arguments
    run_dir = Path(path_of(named[-1].removeprefix("resume=")))
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"resume={run_dir}: there is no config.yaml, so it is not a run folder")
    others = [item for item in arguments if not item.startswith("resume=")]
    return [
        f"--config-dir={run_dir.resolve()}",
        "--config-name=config",
        f"++resume={hydra_quoted(run_dir)}",
        f"hydra.run.dir={hydra_quoted(run_dir)}",
        "hydra.output_subdir=null",
        "hydra/job_logging=stdout",
        "hydra.job_logging.root.level=WARNING",
        *others,
    ]


def main() -> None:
    """Entry point of `python -m vlabs.train`."""
    run_hydra(run, "train", prepare=_resume_arguments)
    if _failed_runs:
        sys.exit(1)


if __name__ == "__main__":
    main()
