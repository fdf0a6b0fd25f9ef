"""Evaluate a checkpoint: `vlabs evaluate ckpt=RUN split=val`, or `task=retrieval data=flickr30k ckpt=RUN`.

What is measured is in `vlabs.evaluation`, with one module per task.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from vlabs.errors import UserError
from vlabs.runs.config import check, run_hydra, save_config
from vlabs.utils.files import is_empty, is_marked, locked, mark, unmark
from vlabs.utils.ranks import is_rank_zero

if TYPE_CHECKING:
    from vlabs.checkpoints.checkpoint import Checkpoint
    from vlabs.data.module import PreparedDataModule
    from vlabs.evaluation.base import Evaluation

# `task=NAME` on the command line chooses a file of the group `evaluation`.
RENAMED = {"task": "evaluation@task"}

_OF_THE_MODEL = re.compile(
    r"\+*data\.(image_size|image_mean|image_std|interpolation|crop|crop_mode|max_length|tokenizer)=.*"
)


def run(config: DictConfig) -> None:
    """One evaluation, as Hydra calls it."""
    given = list(HydraConfig.get().overrides.task)
    if of_model := [item for item in given if _OF_THE_MODEL.fullmatch(item)]:
        raise UserError(f"{of_model[0]}: images and texts are always read as in the model's training: leave it out")
    out_dir = Path(HydraConfig.get().runtime.output_dir)
    if is_rank_zero():
        with _claimed(out_dir, bool(config.overwrite)):
            evaluate_checkpoint(config, out_dir, given)
        return
    evaluate_checkpoint(config, out_dir, given)


@contextlib.contextmanager
def _claimed(out_dir: Path, overwrite: bool) -> Iterator[None]:
    """Lock a folder that is empty, or has an evaluation that did not finish or may be overwritten.

    An evaluation that fails before it has written anything leaves no mark.

    Raises:
        UserError: it has something else, or another process is working there.
    """
    ours = is_marked(out_dir, "evaluation")
    if not ours and any(out_dir.iterdir()):
        raise UserError(f"hydra.run.dir={out_dir} holds something other than an evaluation: name another folder")
    mark(out_dir, "evaluation")
    with locked(out_dir, f"hydra.run.dir={out_dir} is being written by another evaluation: name another folder"):
        if (out_dir / "config.yaml").is_file() and not overwrite:  # config.yaml is written last
            raise UserError(
                f"hydra.run.dir={out_dir} already holds an evaluation: name another folder, or pass overwrite=true"
            )
        try:
            yield
        except BaseException:
            if is_empty(out_dir):
                unmark(out_dir)
            raise


def evaluate_checkpoint(config: DictConfig, out_dir: Path, given: Sequence[str] = ()) -> dict[str, Any]:
    """Load a checkpoint, measure it, write the results to a folder, and return the metrics.

    Args:
        config: the config of `vlabs evaluate`.
        given: the overrides of the command line.

    Raises:
        UserError: an override has no effect on what is measured, or on this checkpoint.
    """
    # Imported here, so that --help is fast.
    import torch
    from pytorch_lightning.loggers import WandbLogger

    from vlabs.evaluation.results import Setting
    from vlabs.prediction.predictor import load_any
    from vlabs.runs.logging import quiet_lightning

    torch.set_float32_matmul_precision("high")
    quiet_lightning()
    check(config)
    evaluation: Evaluation = instantiate(config.task, _convert_="all")
    _check_given(given, config, evaluation)
    checkpoint = load_any(config.ckpt, answers=config.data.dir, tokenizer=config.tokenizer, needs=evaluation.needs)
    if given and evaluation.brings_data and config.data.dir is not None and not checkpoint.released:
        raise UserError(f"data.dir={config.data.dir}: {_OWN_DATA}")
    checkpoint.use_share(config.keep)
    data: PreparedDataModule | None = None
    split = "" if evaluation.brings_data else str(config.split)
    if not evaluation.brings_data:
        if config.data.dir is None:
            config.data.dir = _dir_of(checkpoint)
        # Partial, because Hydra would turn a dataclass among the arguments into a config.
        data = instantiate(config.data, _partial_=True, _convert_="all")(preprocessing=checkpoint.preprocessing)
        _check_kind(data, evaluation)
    old = [out_dir / name for name in ("config.yaml", "metrics.json")]
    metrics = evaluation.run(checkpoint, data, Setting(split, out_dir, config.trainer, config.keep, old))
    if not is_rank_zero():
        return metrics  # only rank zero writes
    save_config(config, out_dir / "config.yaml")
    if config.logger.get("_target_") is not None:
        logger = instantiate(config.logger, save_dir=str(out_dir))
        prefix = split or evaluation.name
        logger.log_metrics(numbers_of(metrics, f"{prefix}/"))
        if isinstance(logger, WandbLogger):
            for figure in sorted((out_dir / "figures").glob("*.png")):
                logger.log_image(f"{prefix}/{figure.stem}", [str(figure)])
        logger.finalize("success")
    return metrics


_OWN_DATA = "this task is measured on data of its own: leave it out"


def _check_given(given: Sequence[str], config: DictConfig, evaluation: Evaluation) -> None:
    """Raise a UserError for an override of a part that the evaluation does not read."""
    for item in given:
        name = re.split("[=@]", item.lstrip("+~"), maxsplit=1)[0]
        part = name.split(".")[0]
        # A released file takes its answers from `data.dir`, whatever is measured.
        if evaluation.brings_data and part in ("data", "split") and name != "data.dir":
            raise UserError(f"{item}: {_OWN_DATA}")
        if part == "ranker" and "ranker" not in config.task:
            raise UserError(f"{item}: this task does not rank with it: leave it out, or pass task=retrieval")


def numbers_of(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """All numbers in nested metrics, by their paths."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            found |= numbers_of(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found[prefix + name] = value
    return found


def _dir_of(checkpoint: Checkpoint) -> str:
    """The folder of the data that a checkpoint was trained on."""
    directory = checkpoint.data.get("dir")
    if directory is None or not Path(directory).is_dir():
        raise UserError(f"the data that {checkpoint.path} was trained on is not at {directory}: pass data.dir=FOLDER")
    return str(directory)


def _check_kind(data: Any, evaluation: Evaluation) -> None:
    if not isinstance(data, evaluation.reads):
        wanted = evaluation.measured_on or evaluation.reads.holds
        raise UserError(f"{data.dir} holds {data.holds}, but this task is measured on {wanted}")


def main() -> None:
    """Entry point of `vlabs evaluate`."""
    run_hydra(run, "evaluate", renamed=RENAMED)


if __name__ == "__main__":
    main()
