"""Evaluate a checkpoint: `python -m vlabs.evaluate ckpt=RUN split=val`, or `task=retrieval data=flickr30k ckpt=RUN`.

What is measured is in `vlabs.evaluation`, a module a task.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from vlabs.checkpoint import Checkpoint
from vlabs.config import run_hydra, save_config
from vlabs.errors import UserError
from vlabs.logging import quiet_lightning
from vlabs.predictor import load_any


def run(config: DictConfig) -> None:
    """One evaluation, as Hydra calls it."""
    hydra = HydraConfig.get()
    evaluate_checkpoint(config, hydra.runtime.choices.task, Path(hydra.runtime.output_dir))


def evaluate_checkpoint(config: DictConfig, task: str, out_dir: Path) -> dict[str, Any]:
    """Load a checkpoint, measure it, write what comes out to a folder, and return the metrics.

    Args:
        config: of `vlabs.evaluate`.
        task: `vqa`, `retrieval`, `grounding` or `steering`.
    """
    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    checkpoint = load_any(config.ckpt, answers=config.data.dir, tokenizer=config.tokenizer, task=task)
    evaluate = instantiate(config.task)
    metrics: dict[str, Any] = evaluate(
        checkpoint=checkpoint, config=config, data_dir=_data_dir(config, checkpoint), out_dir=out_dir
    )
    if getattr(rank_zero_only, "rank", 0):
        return metrics  # what is written is written once
    save_config(config, out_dir / "config.yaml")
    if config.logger.get("_target_") is not None:
        logger = instantiate(config.logger, save_dir=str(out_dir))
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        logger.log_metrics({f"{config.split}/{name}": value for name, value in numbers.items()})
        if isinstance(logger, WandbLogger):
            for figure in sorted((out_dir / "figures").glob("*.png")):
                logger.log_image(f"{config.split}/{figure.stem}", [str(figure)])
        logger.finalize("success")
    return metrics


def _data_dir(config: DictConfig, checkpoint: Checkpoint) -> str:
    if config.data.dir is not None:
        return str(config.data.dir)
    directory = str(checkpoint.data["dir"])
    if not Path(directory).is_dir():
        raise UserError(f"the data that {checkpoint.path} was trained on is not at {directory}: pass data.dir=FOLDER")
    return directory


def main() -> None:
    """Entry point of `python -m vlabs.evaluate`."""
    run_hydra(run, "evaluate", folder="evaluation")


if __name__ == "__main__":
    main()
