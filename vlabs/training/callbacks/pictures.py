"""Figures of answers and of where a model looks, during training."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from vlabs.attention.figures import Cell, overlay, question_figure, save_figure
from vlabs.attention.maps import default_map, look_by
from vlabs.attention.pictures import alpha_figure, pathway_figure, questions_figure, seen_of
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import read_bytes
from vlabs.data.preprocessing import decode_image
from vlabs.data.vqa import VQADataModule, VQADataset
from vlabs.runs.logging import send
from vlabs.tasks.vqa import VQATask
from vlabs.training.callbacks.schedule import EveryNValidations
from vlabs.utils.options import Count


class PredictionTable(EveryNValidations):
    """Every N validations, show some images with questions, true answers, the top 3 answers and where the model looked.

    Args:
        every_n_validations: number of validations between two figures; 0 for never.
        num_images: number of images of the validation split.
        questions_per_image: number of questions per image.
        directory: folder of the figures; None for `figures` in the run folder.
    """

    def __init__(
        self,
        every_n_validations: Count = 1,
        num_images: Count = 4,
        questions_per_image: Count = 2,
        directory: str | Path | None = None,
    ) -> None:
        super().__init__(every_n_validations)
        self.directory = None if directory is None else Path(directory)
        self.num_images = num_images
        self.questions_per_image = questions_per_image

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures, and the table to W&B."""
        # Only this task answers questions.
        if not isinstance(pl_module, VQATask) or not self.is_due(trainer) or not trainer.is_global_zero:
            return
        folder = self.directory or Path(trainer.default_root_dir) / "figures"
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
            model = pl_module.model
            checkpoint = Checkpoint(model, data.preprocessing, pl_module.name, {}, folder)
            picture = decode_image(read_bytes(dataset.rows[group.row]), "validation image")
            view, tensor = seen_of(checkpoint, picture)
            found = look_by(model, tensor, batch.input_ids, batch.attention_mask, default_map(model))
            logits = found.output.logits
            probabilities, ids = model.head.probabilities(logits).topk(min(3, logits.shape[1]))  # type: ignore[operator]
            cells = []
            for n, question in enumerate(batch.questions):
                answers = batch.answers[n]
                true = max(answers, key=answers.count) if answers else ""
                top = [
                    f"{data.preprocessing.names[i]} {p:.0%}"
                    for i, p in zip(ids[n].tolist(), probabilities[n].tolist(), strict=True)
                ]
                cells.append(Cell(view, found.maps[n, 0], found.names[n], question, f"{', '.join(top)}\ntrue: {true}"))
                table.append((overlay(view, found.maps[n, 0]), question, true, *top, *[""] * (3 - len(top))))
            figure = question_figure(view, cells)
            save_figure(figure, folder / f"val_step{trainer.global_step:06d}_{shown}.png")
            if shown == 0:
                self._paper_figures(trainer, checkpoint, picture, batch.questions, folder)
            if shown + 1 == self.num_images:
                break
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                rows = [[wandb.Image(image), *rest] for image, *rest in table]
                columns = ["where it looked", "question", "true", "1st", "2nd", "3rd"]
                log = partial(logger.log_table, "val/predictions", columns, rows, step=trainer.global_step)
                send("the table of predictions", log)

    def _paper_figures(
        self,
        trainer: pl.Trainer,
        checkpoint: Checkpoint,
        picture: Image.Image,
        questions: Sequence[str],
        folder: Path,
    ) -> None:
        """Save the figures of `vlabs attention` for one image and one model as files and in W&B."""
        model = checkpoint.model
        figures = {"questions": questions_figure(checkpoint, [picture], questions, default_map(model))}
        if model.vision.needs_prior:
            figures["pathway"] = pathway_figure(checkpoint, picture, questions)
        if hasattr(model.vision.topdown, "alpha"):
            figures["alpha"] = alpha_figure(checkpoint, picture, questions, None, "fusion")
        for name, figure in figures.items():
            path = save_figure(figure, folder / f"{name}_step{trainer.global_step:06d}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    log = partial(logger.log_image, f"figures/{name}", [str(path)], step=trainer.global_step)
                    send(f"the figure {name}", log)
