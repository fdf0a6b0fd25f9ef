"""Lightning's trainer from the group `trainer`: options work as Lightning documents them, or are refused by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import AcceleratorRegistry
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, SimpleProfiler
from pytorch_lightning.strategies import StrategyRegistry

from vlabs.data.loading import GroupLoader
from vlabs.errors import UserError, one_line
from vlabs.utils.options import as_given

_PROFILERS: dict[str, type[Profiler]] = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}


def _whole(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _whole_or_null(least: int) -> Callable[[Any], bool]:
    return lambda value: value is None or _whole(least)(value)


def _limit(value: Any) -> bool:
    return _whole_or_null(0)(value) or (isinstance(value, float) and 0 <= value <= 1)


def _interval(value: Any) -> bool:
    return value is None or _whole(1)(value) or (isinstance(value, float) and 0 < value <= 1)


def _clip(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and value >= 0)


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


_LIMIT = (_limit, "a number of batches or, with a point, a share of them in [0.0, 1.0]")
_FLAG = (_flag, "true or false")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_epochs": (_whole_or_null(-1), "a whole number, -1 for no limit"),
    "max_steps": (_whole(-1), "a whole number, -1 for no limit"),
    "min_epochs": (_whole_or_null(0), "a whole number, or null"),
    "min_steps": (_whole_or_null(0), "a whole number, or null"),
    "num_nodes": (_whole(1), "a whole number, at least 1"),
    "accumulate_grad_batches": (_whole(1), "a whole number, at least 1"),
    "log_every_n_steps": (_whole_or_null(0), "a whole number of steps, 0 to log none"),
    "check_val_every_n_epoch": (
        _whole_or_null(1),
        "a whole number of epochs, at least 1 (limit_val_batches=0 for no validation), or null to count "
        "val_check_interval=N over epochs",
    ),
    "val_check_interval": (
        _interval,
        "a number of batches, or a share of an epoch in (0.0, 1.0] (limit_val_batches=0 for no validation)",
    ),
    "limit_train_batches": _LIMIT,
    "limit_val_batches": _LIMIT,
    "limit_test_batches": _LIMIT,
    "limit_predict_batches": _LIMIT,
    "overfit_batches": _LIMIT,
    "fast_dev_run": (lambda value: _flag(value) or _whole(0)(value), "true, false, or a number of batches"),
    "num_sanity_val_steps": (_whole_or_null(-1), "a number of batches, -1 for all"),
    "reload_dataloaders_every_n_epochs": (_whole(0), "a number of epochs, 0 for never"),
    "gradient_clip_val": (_clip, "a number, at least 0, or null for none"),
    "gradient_clip_algorithm": (lambda value: value in (None, "norm", "value"), "norm or value"),
    "deterministic": (lambda value: _flag(value) or value == "warn", "true, false or warn"),
    "profiler": (lambda value: value is None or value in _PROFILERS, "one of simple, advanced, or null"),
    "benchmark": _FLAG,
    "detect_anomaly": _FLAG,
    "sync_batchnorm": _FLAG,
    "inference_mode": _FLAG,
    "enable_progress_bar": _FLAG,
    "enable_model_summary": _FLAG,
}
"""Whether the value of an option is valid, and the valid values in words."""
_ELSEWHERE = {
    "callbacks": "pass +callbacks.NAME._target_=...",
    "logger": "pass logger=csv, tensorboard or wandb",
    "default_root_dir": "pass hydra.run.dir=DIR",
    "use_distributed_sampler": "vlabs distributes batches over devices itself",
    "enable_checkpointing": "best.ckpt and last.ckpt are always kept; see checkpoints.every_n_steps",
    "plugins": "vlabs has its own plugin, which keeps checkpoints complete",
    "barebones": "it leaves out checkpoints and logs; plan=true measures only steps",
    "enable_autolog_hparams": "the run folder has config.yaml",
    "model_registry": "the checkpoints are in the run folder",
}
"""Lightning's options that vlabs sets itself, and what to do instead."""


def make_trainer(config: DictConfig, **parts: Any) -> pl.Trainer:
    """Make Lightning's trainer. vlabs distributes batches over devices itself.

    Args:
        config: options of the group `trainer`.
        parts: arguments of the trainer that are not options: callbacks, logger and so on.

    Raises:
        UserError: an option has an invalid value, or Lightning's trainer does not have it.
    """
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    options: dict[str, Any] = {str(name): value for name, value in resolved.items()}
    check_options(options)
    if (profiler := options.pop("profiler", None)) is not None:
        parts["profiler"] = _PROFILERS[profiler](parts.get("default_root_dir"), "profile")
    if few := options.pop("overfit_batches", 0):
        options["limit_train_batches"] = options["limit_val_batches"] = few
        parts["callbacks"] = [*(parts.get("callbacks") or []), SameBatches()]
    options = {"use_distributed_sampler": False, "enable_model_summary": False} | options
    try:
        trainer: pl.Trainer = instantiate(OmegaConf.create(options), _partial_=True, _convert_="all")(**parts)
    except Exception as error:
        said = one_line(str(error))
        # Find the option that the message is about, by its name or its value.
        words = re.findall(r"\w+", said.lower())
        about = (n for n, given in options.items() if n in words or (isinstance(given, str) and given in said.lower()))
        option = next(about, None)
        what = "trainer" if option is None else f"trainer.{option}={as_given(options[option])}"
        raise UserError(f"{what}: {named(said)}") from error
    return trainer


def named(text: str) -> str:
    """Replace the names of Lightning's options in a message by those of vlabs (`trainer.NAME`)."""
    options = "|".join(inspect.signature(pl.Trainer).parameters)
    return re.sub(rf"`(?:Trainer\()?({options})\b(=[^`)]*)?\)?`", r"`trainer.\1\2`", text)


def check_options(options: dict[str, Any]) -> None:
    """Check the options of the group `trainer`.

    Raises:
        UserError: one has an invalid value, or Lightning's trainer does not have it.
    """
    known = ["_target_", *(name for name in inspect.signature(pl.Trainer).parameters if name not in _ELSEWHERE)]
    for name, value in options.items():
        if name in _ELSEWHERE:
            raise UserError(f"trainer.{name}={as_given(value)} is not for vlabs: {_ELSEWHERE[name]}")
        if name not in known:
            raise UserError(f"there is no option trainer.{name}: Lightning's trainer has {', '.join(known[1:])}")
        fits, words = _CHECKS.get(name, (lambda value: True, ""))
        if not fits(value):
            raise UserError(f"trainer.{name}={as_given(value)} must be {words}")
    _check_length(options)
    _check_accelerator(options)


def _check_length(options: dict[str, Any]) -> None:
    """Check the options that define the length of a training."""
    if (limit := options.get("max_time")) is not None:
        try:
            Timer(limit)
        except Exception:
            raise UserError(
                f"trainer.max_time={limit} must be days:hours:minutes:seconds such as 00:08:00:00, or numbers by name "
                "such as {hours: 8}"
            ) from None
    if options.get("max_epochs") == -1 and options.get("max_steps", -1) == -1 and limit is None:
        raise UserError("trainer.max_epochs=-1 has no end: pass trainer.max_steps=N or +trainer.max_time=DD:HH:MM:SS")
    if options.get("check_val_every_n_epoch", 1) is None and not _whole(1)(options.get("val_check_interval")):
        raise UserError(
            "trainer.check_val_every_n_epoch=null counts batches over epochs: pass trainer.val_check_interval=N, a "
            "whole number of them"
        )


def _check_accelerator(options: dict[str, Any]) -> None:
    """Check that this machine has the devices that a training needs."""
    accelerator, devices = options.get("accelerator", "auto"), options.get("devices", "auto")
    names = AcceleratorRegistry.available_accelerators()
    if accelerator not in ("auto", "gpu", *names):
        raise UserError(f"trainer.accelerator={accelerator}: choose one of auto, gpu, {', '.join(sorted(names))}")
    kinds = ("cuda", "mps") if accelerator == "gpu" else () if accelerator == "auto" else (accelerator,)
    if kinds and not any(_is_available(kind) for kind in kinds):
        raise UserError(f"trainer.accelerator={accelerator}: there is none that torch can use; pass auto or cpu")
    wrong = devices in (0, "0", [], "") or not isinstance(devices, int | str | list) or isinstance(devices, bool)
    if wrong or (isinstance(devices, str) and not _are_devices(devices)):
        raise UserError(f"trainer.devices={devices} must be a number of devices, a list of their indices, auto, or -1")
    strategy, known = options.get("strategy", "auto"), StrategyRegistry.available_strategies()
    if isinstance(strategy, str) and strategy not in ("auto", *known):
        raise UserError(f"trainer.strategy={strategy}: choose one of auto, {', '.join(known)}")


def _is_available(accelerator: str) -> bool:
    try:
        return bool(AcceleratorRegistry.get(accelerator).is_available())
    except Exception:  # its package is missing
        return False


def _are_devices(text: str) -> bool:
    parts = text.split(",")
    return text in ("auto", "-1") or all(part.strip().isdecimal() for part in parts if part.strip())


def device_of(config: DictConfig) -> str:
    """The device for computations outside Lightning's loops, by the option `trainer.accelerator`.

    Raises:
        UserError: there is no such accelerator here.
    """
    wanted = str(config.get("accelerator", "auto"))
    _check_accelerator({"accelerator": wanted})
    return "cuda" if torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda") else "cpu"


def autocast_of(config: DictConfig) -> AbstractContextManager[None]:
    """Lightning's context of `trainer.precision`, for computations outside its loops on `device_of`.

    Raises:
        UserError: the precision converts the weights, which only Lightning's loops do.
    """
    device = device_of(config)
    here: Any = OmegaConf.merge(config, {"accelerator": device, "devices": 1, "num_nodes": 1, "strategy": "auto"})
    plugin = make_trainer(here, logger=False, enable_checkpointing=False).precision_plugin
    if not isinstance(plugin, MixedPrecision) and plugin.precision != "32-true":
        raise UserError(
            f"trainer.precision={config.precision}: this evaluation works with 32-true, bf16-mixed and 16-mixed"
        )
    return plugin.forward_context()


class SameBatches(pl.Callback):
    """`trainer.overfit_batches`: every epoch has the batches of the first, in the same order and augmented the same."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Make a share of the validation batches at least one batch."""
        share = trainer.limit_val_batches
        if stage == "fit" and isinstance(share, float):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            trainer.limit_val_batches = max(1, int(len(data.val_dataloader()) * share))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reset the epoch of the sampler, before the first batch is planned."""
        loader = trainer.train_dataloader
        if isinstance(loader, GroupLoader):
            loader.groups.epoch = 0
