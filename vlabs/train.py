"""Train: `vlabs train task=vqa [group=choice] [key=value]`; `-m` runs a sweep, `resume=RUN_DIR` continues a run.

A run folder holds config.yaml (resolved), environment.json, metrics.csv, summary.json, checkpoints/, figures/, wandb/.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from vlabs.errors import UserError
from vlabs.runs.config import as_config, path_of, run_hydra, save_config
from vlabs.runs.groups import config_dir
from vlabs.runs.record import read_config
from vlabs.runs.values import is_newer
from vlabs.utils.ranks import say

_failures = 0  # failed runs of a sweep


def run(config: DictConfig) -> dict[str, Any]:
    """One run, as Hydra calls it."""
    from vlabs.training.run import run as train  # imported here, so that --help is fast

    global _failures
    found = train(config)
    _failures += found.get("status") == "failed"
    return found


def _check_hub(config: DictConfig) -> None:
    """Check that pre-trained parts are there or can be fetched, in seconds; a resumed run needs none."""
    parts: list[Any] = [config.get("model", {}).get(part) or {} for part in ("vision", "text")]
    weights, text = parts[0].get("weights"), parts[1].get("name_or_path")
    tokenizer = config.get("data", {}).get("tokenizer")
    if config.get("resume") is None and (weights or text or tokenizer):
        from vlabs.utils.hub import check_reachable, hub_name  # imports the hub's library, which few runs need

        check_reachable(
            {
                "model.vision.weights": weights and hub_name(str(weights)),
                "model.text.name_or_path": text and str(text),
                "data.tokenizer": tokenizer and str(tokenizer),
            }
        )


def _arguments(given: list[str]) -> list[str]:
    """Hydra's arguments for a resumed run, or for one with the config of another."""
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
            raise UserError(f"{item}: resume={run_dir} uses the run's own folder and config: leave it out")
    _mend_config(run_dir)
    return [
        f"--config-dir={run_dir.resolve()}",
        "--config-name=config",
        f"++resume={run_dir}",  # will be quoted like all paths
        f"hydra.run.dir={run_dir}",
        *_QUIET,
        *_with_newer(others, run_dir),
    ]


def _with_newer(overrides: list[str], run_dir: Path) -> list[str]:
    """Overrides of a run's config, with a plus where an option is newer than the run."""
    own: Any = OmegaConf.to_container(read_config(run_dir) or OmegaConf.create(), resolve=False)
    return [f"++{item}" if is_newer(item.partition("=")[0], own) else item for item in overrides]


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
        raise UserError(f"resume={run_dir} is inside a run folder: pass resume={within.parent}")
    if not run_dir.is_dir():
        raise UserError(f"resume={run_dir}: there is no such folder")
    return run_dir


# Settings of conf/train.yaml that runs with a config file of their own need too.
_QUIET = ("hydra.output_subdir=null", "hydra/job_logging=stdout", "hydra.job_logging.root.level=WARNING")


def _mend_config(run_dir: Path) -> None:
    """Restore a damaged or missing config.yaml from the run's last checkpoint.

    Raises:
        UserError: the checkpoint has none either.
    """
    config, path = read_config(run_dir), run_dir / "config.yaml"
    if config is not None and "resume" in config:  # `resume` is its last line, so the file is complete
        return
    from vlabs.training.callbacks.recording import Recorder
    from vlabs.training.start import last_whole

    reason = "is damaged" if path.exists() else "is missing"
    try:
        kept = last_whole(run_dir, str(run_dir)).callbacks[Recorder.__qualname__]["config"]
    except (UserError, KeyError):
        raise UserError(f"resume={run_dir}: config.yaml {reason}, so this run cannot be resumed") from None
    save_config(as_config(kept), path)
    say(f"{path} {reason}: restored from the last checkpoint")


def _same_arguments(arguments: list[str]) -> list[str]:
    """Add conf/train.yaml's settings of run folders to the arguments of `--config-dir=RUN --config-name=config`."""
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
    # Put them before the first override, because Hydra wants all overrides together.
    first = next((n for n, one in enumerate(arguments) if re.match(r"[^-].*=|~", one)), len(arguments))
    given = _with_newer(arguments[first:], Path(named.config_dir))
    return [*arguments[:first], *_QUIET, f"hydra.job.name={name}", *dirs, *given]


def main() -> None:
    """Entry point of `vlabs train`."""
    run_hydra(run, "train", prepare=_arguments, check_first=_check_hub)
    if _failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
