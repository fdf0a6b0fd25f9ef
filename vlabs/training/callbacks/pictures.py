"""Pictures of what a model answers and where it looks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import WandbLogger

from vlabs.attention.figures import Panel, overlay, question_figure, save_figure
from vlabs.attention.maps import attention_map, default_map
from vlabs.attention.pictures import alpha_figure, pathway_figure, questions_figure
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import read_bytes
from vlabs.data.preprocessing import decode_image
from vlabs.data.vqa import VQADataModule, VQADataset
from vlabs.runs.logging import sending
from vlabs.tasks.vqa import VQATask
from vlabs.training.callbacks.schedule import EveryNValidations


class PredictionTable(EveryNValidations):
    """Every N validations: some images with questions, true answers, the top 3 answers and where the model looked.

    Args:
        every_n_validations: how often; 0 for never.
        num_images: images shown; the first of the validation split.
        questions_per_image: questions shown of each.
        directory: where the figures go; `figures` in the run folder if not given.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        num_images: int = 4,
        questions_per_image: int = 2,
        directory: str | Path | None = None,
    ) -> None:
        super().__init__(every_n_validations)
        self.directory = None if directory is None else Path(directory)
        self.num_images = num_images
        self.questions_per_image = questions_per_image

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures, and the table to W&B."""
        # Nothing else answers questions.
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
            batch = pl_module.transfer_batch_to_device(batch, pl_module.device, 0)
            output = pl_module(batch, read_image=True)
            map_name = default_map(pl_module.model)
            maps = attention_map(output, pl_module.model.vision, map_name).cpu().numpy()
            probabilities, ids = pl_module.model.head.probabilities(output.logits).topk(min(3, output.logits.shape[1]))  # type: ignore[operator]
            picture = data.preprocessing.resize(decode_image(read_bytes(dataset.rows[group.row]), "validation image"))
            panels = []
            for n, question in enumerate(batch.questions):
                answers = batch.answers[n]
                true = max(answers, key=answers.count) if answers else ""
                top = [
                    f"{data.preprocessing.names[i]} {p:.0%}"
                    for i, p in zip(ids[n].tolist(), probabilities[n].tolist(), strict=True)
                ]
                panels.append(Panel(question, maps[n], [", ".join(top), f"true: {true}"]))
                table.append((overlay(picture, maps[n]), question, true, *top, *[""] * (3 - len(top))))
            figure = question_figure(picture, panels, map_name)
            save_figure(figure, folder / f"val_step{trainer.global_step:06d}_{shown}.png")
            if shown == 0:
                self._paper_figures(trainer, pl_module, picture, batch.questions, folder)
            if shown + 1 == self.num_images:
                break
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                import wandb

                rows = [[wandb.Image(image), *rest] for image, *rest in table]
                columns = ["where it looked", "question", "true", "1st", "2nd", "3rd"]
                with sending("the table of predictions"):
                    logger.log_table("val/predictions", columns=columns, data=rows, step=trainer.global_step)

    def _paper_figures(
        self, trainer: pl.Trainer, task: VQATask, picture: Image.Image, questions: Sequence[str], folder: Path
    ) -> None:
        """The figures of `vlabs.attention` that are of one picture and one model, as files and in W&B."""
        model = task.model
        checkpoint = Checkpoint(model, task.preprocessing, task.name, {}, folder)
        figures = {"questions": questions_figure(checkpoint, [picture], questions, default_map(model))}
        if model.vision.needs_prior:
            figures["pathway"] = pathway_figure(checkpoint, picture, questions)
        if hasattr(model.vision.topdown, "alpha"):
            figures["alpha"] = alpha_figure(checkpoint, picture, questions, (1, 3, 10), "fusion")
        for name, figure in figures.items():
            path = save_figure(figure, folder / f"{name}_step{trainer.global_step:06d}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    with sending(f"the figure {name}"):
                        logger.log_image(f"figures/{name}", [str(path)], step=trainer.global_step)
