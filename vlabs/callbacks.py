"""Lightning callbacks of a run: checkpoints written whole, and pictures of what the model answers."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning.loggers import WandbLogger

from vlabs.attention.figures import Panel, overlay, question_figure, save_figure
from vlabs.attention.maps import attention_map
from vlabs.data.captions import CaptionBatch
from vlabs.data.preprocessing import decode_image
from vlabs.data.vqa import VQABatch, VQADataModule, VQADataset
from vlabs.errors import UserError
from vlabs.tasks.vqa import VQATask


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, so that a stop leaves the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`.

        Raises:
            UserError: the disk is full or the folder cannot be written to; what was there before is untouched.
        """
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__
            full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if not isinstance(error, OSError) and not full:
                raise
            reason = "the disk is full" if full else str(error)
            raise UserError(
                f"checkpoint {path} could not be written: {reason}; the one before it is untouched, "
                "make room and go on with resume=RUN_DIR"
            ) from None


class SamplesPerSecond(pl.Callback):
    """Log `train/samples_per_second`: texts of this process since the value before, loading included."""

    def __init__(self) -> None:
        self.samples = 0
        self.since = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock anew, so that validation does not count."""
        self.samples, self.since = 0, time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: VQABatch | CaptionBatch,
        batch_idx: int,
    ) -> None:
        """Count a batch, and log as often as Lightning logs."""
        self.samples += len(batch.input_ids)
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            now = time.perf_counter()
            pl_module.log("train/samples_per_second", self.samples / (now - self.since))
            self.samples, self.since = 0, now


class PredictionTable(pl.Callback):
    """Every N validations: some images with questions, true answers, the top 3 answers and where the model looked.

    Args:
        every_n_validations: how often; 0 for never.
        num_images: images shown; the first of the validation split.
        questions_per_image: questions shown of each.
        directory: where the figures go.
    """

    def __init__(
        self, directory: str | Path, every_n_validations: int = 1, num_images: int = 4, questions_per_image: int = 2
    ) -> None:
        self.directory = Path(directory)
        self.every = every_n_validations
        self.num_images = num_images
        self.questions_per_image = questions_per_image
        self.validations = 0

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures, and the table to W&B."""
        assert isinstance(pl_module, VQATask)
        self.validations += 1
        if not self.every or self.validations % self.every or trainer.sanity_checking or not trainer.is_global_zero:
            return
        data: VQADataModule = trainer.datamodule  # type: ignore[attr-defined]
        loader = data.val_dataloader()
        dataset = loader.dataset
        assert isinstance(dataset, VQADataset)
        table = []
        for shown, plan in enumerate(loader.sampler):  # type: ignore[arg-type]
            group = plan.groups[0]._replace(questions=plan.groups[0].questions[: self.questions_per_image])
            batch = dataset[plan._replace(groups=[group])]
            if not batch.question_ids:
                continue
            batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            output = pl_module(batch, read_image=True)
            maps = attention_map(output, pl_module.model.vision).cpu().numpy()
            probabilities, ids = output.logits.float().sigmoid().topk(min(3, output.logits.shape[1]))
            picture = data.preprocessing.resize(decode_image(dataset.rows[group.row]["image"], "validation image"))
            panels = []
            for n, question in enumerate(batch.questions):
                answers = batch.answers[n]
                true = max(answers, key=answers.count) if answers else ""
                top = [
                    f"{data.preprocessing.answers[i]} {p:.0%}"
                    for i, p in zip(ids[n].tolist(), probabilities[n].tolist(), strict=True)
                ]
                panels.append(Panel(question, maps[n], [", ".join(top), f"true: {true}"]))
                table.append((overlay(picture, maps[n]), question, true, *top, *[""] * (3 - len(top))))
            figure = question_figure(picture, panels, "fusion attention")
            save_figure(figure, self.directory / f"val_step{trainer.global_step:06d}_{shown}.png")
            if shown + 1 == self.num_images:
                break
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                rows = [[wandb.Image(image), *rest] for image, *rest in table]
                columns = ["where it looked", "question", "true", "1st", "2nd", "3rd"]
                logger.log_table("val/predictions", columns=columns, data=rows, step=trainer.global_step)
