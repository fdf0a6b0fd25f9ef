"""Hydra programs that answer a wrong override with one sentence, and resumed runs in their own config."""

from __future__ import annotations

import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra
import pytorch_lightning as pl
import torch
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, SimpleProfiler
from pytorch_lightning.utilities.exceptions import MisconfigurationException

import vlabs.runs.folders  # noqa: F401  (what the configs name their folders by)
from vlabs.errors import UserError, exit_with, run_cli
from vlabs.utils.files import replacing


def config_dir() -> str:
    """Where the configs lie: `vlabs/conf` when installed, `conf` beside `vlabs` in a checkout."""
    here = Path(__file__).resolve().parent.parent
    for path in (here / "conf", here.parent / "conf"):
        if (path / "train.yaml").is_file():
            return str(path)
    raise UserError(f"the configs are missing from the installation at {here}: install vlabs again")


def run_hydra(main: Callable[[DictConfig], Any], config_name: str, renamed: Mapping[str, str] | None = None) -> None:
    """Run `main(config)` as a Hydra program. Errors of the user's become one line and status 1.

    Args:
        main: what to run.
        config_name: the file it is configured by.
        renamed: groups that have a shorter name on the command line: `{"task": "evaluation@task"}`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, and the sentence is ours
    ours = (UserError, HydraException, OmegaConfBaseException)
    renamed = renamed or {}
    sys.argv[1:] = [_rename(item, renamed) for item in sys.argv[1:]]

    def sentence(error: BaseException) -> str:
        text = explain(error)
        for short, group in renamed.items():
            text = text.replace(f"there is no {group.split('@')[0]}=", f"there is no {short}=")
        return text

    @functools.wraps(main)
    def guarded(config: DictConfig) -> Any:
        try:
            return main(config)
        except ours as error:
            exit_with(sentence(error))  # here, because Hydra adds lines of its own to an exception that reaches it

    program = hydra.main(version_base="1.3", config_path=config_dir(), config_name=config_name)(guarded)

    def run() -> None:
        try:
            program()
        except ours as error:
            raise UserError(sentence(error)) from error

    run_cli(run)


def _rename(argument: str, renamed: Mapping[str, str]) -> str:
    name, equals, value = argument.partition("=")
    return f"{renamed[name]}={value}" if equals and name in renamed else argument


def explain(error: BaseException) -> str:
    """One sentence for an error of Hydra or OmegaConf, with the valid choices where it is a wrong name."""
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, UserError):
            return str(cause)
    for cause in chain:
        if isinstance(cause, ConfigKeyError | ConfigAttributeError) and cause.parent_node is not None:
            parent = cause.parent_node
            key = cause.full_key or str(cause.key)
            valid = sorted(str(name) for name in parent) if OmegaConf.is_dict(parent) else []
            if valid:
                where = key.rsplit(".", 1)[0] if "." in key else "the config"
                return (
                    f"there is no option '{key}': {where} has {', '.join(valid)} (a new one takes a plus: +{key}=...)"
                )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: pass {error.full_key}=..."
    missing = re.search(
        r"Could not find '(.+)/(.+?)'\s+Available options in '.+?':\s+(.+?)\s+Config search", str(error), re.S
    )
    if missing:
        group, choice, names = missing.groups()
        return f"there is no {group}={choice}: choose one of {', '.join(names.split())}"
    # Of a group that several files may be chosen of, Hydra does not say which there are.
    if unloaded := re.search(r"Could not load '(.+)/(.+?)'", str(error)):
        group, choice = unloaded.groups()
        names = sorted(path.stem for path in (Path(config_dir()) / group).glob("*.yaml"))
        return f"there is no {group}={choice}: choose one of {', '.join(names)}"
    message = str(chain[-1]) if isinstance(error, InstantiationException) else str(error)
    return re.sub(r"\s+", " ", message.replace("Set the environment variable HYDRA_FULL_ERROR=1", ""))


_PROFILERS: dict[str, type[Profiler]] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}


def make_trainer(config: DictConfig, **parts: Any) -> pl.Trainer:
    """Lightning's trainer from the group `trainer`; vlabs shares batches out over devices itself.

    Raises:
        UserError: Lightning does not take an option's value.
    """
    for name in ("max_epochs", "max_steps", "num_nodes", "accumulate_grad_batches", "log_every_n_steps"):
        if not isinstance(config.get(name), int | None):
            raise UserError(f"trainer.{name}={config.get(name)} must be a whole number")
    profiler = config.get("profiler")
    if isinstance(profiler, str):
        if profiler not in _PROFILERS:
            raise UserError(f"trainer.profiler={profiler} must be one of {', '.join(_PROFILERS)}, or null")
        parts["profiler"] = _PROFILERS[profiler](parts.get("default_root_dir"), "profile")
    try:
        trainer: pl.Trainer = instantiate(config, _partial_=True, _convert_="all")(
            use_distributed_sampler=False, enable_model_summary=False, **parts
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(f"trainer: {error}") from None
    return trainer


def device_of(config: DictConfig) -> str:
    """The device for what is computed without Lightning's loops, by the option `trainer.accelerator`."""
    wanted = str(config.get("accelerator", "auto"))
    return "cuda" if torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda") else "cpu"


def plain(config: DictConfig) -> dict[str, Any]:
    """A resolved config as plain data."""
    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def save_config(config: DictConfig, path: Path) -> None:
    """Write a resolved config, whole or not at all."""
    with replacing(path) as partial:
        OmegaConf.save(OmegaConf.create(plain(config)), partial)


def command_line() -> str:
    """The command that started this process, as a shell would take it."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"vlabs.{module}", *sys.argv[1:]])
