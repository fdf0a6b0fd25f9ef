"""Lightning callbacks of a run: checkpoints written whole, and pictures of what the model answers."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO
from PIL import Image
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

from vlabs.attention.figures import Panel, overlay, question_figure, save_figure
from vlabs.attention.maps import MAPS, attention_map, default_map
from vlabs.attention.pictures import alpha_figure, pathway_figure, questions_figure
from vlabs.checkpoint import Checkpoint
from vlabs.data.captions import CaptionBatch, CaptionDataModule
from vlabs.data.loading import GroupLoader
from vlabs.data.preprocessing import decode_image
from vlabs.data.vqa import VQABatch, VQADataModule, VQADataset
from vlabs.errors import UserError
from vlabs.evaluation.grounding import Targets, find_targets, measure
from vlabs.logging import say, sending
from vlabs.tasks.base import VisionLanguageTask
from vlabs.tasks.vqa import VQATask


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name and renames it, so that a stop leaves the one before.

    Of `last.ckpt`, which a run goes on from, the one before is kept too, as `last.ckpt.previous`.
    """

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
            if path.name == "last.ckpt" and path.is_file():
                # A second name of the old file first: at no time is there no checkpoint.
                older = path.with_name(path.name + ".older")
                older.unlink(missing_ok=True)
                older.hardlink_to(path)
                older.replace(previous_of(path))
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


def previous_of(path: Path) -> Path:
    """Where the checkpoint before this one is."""
    return path.with_name(path.name + ".previous")


class GoOn(pl.Callback):
    """Makes a run that goes on the run that it would have been: generators and place in the epoch as they were.

    Goes with `KeepLast`, which saves where that can be done.
    """

    def __init__(self) -> None:
        self.saved: dict[str, Any] | None = None
        self.loader: dict[str, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """As plain data and tensors, which load without executing anything."""
        version, internal, gauss = random.getstate()
        name, keys, *rest = np.random.get_state()
        return {
            "python": [version, list(internal), gauss],
            "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training really begins, because getting there may draw."""
        self.saved = state_dict

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the place in the epoch. Lightning keeps it too, but loads it before it has read the checkpoint where the
        schedule asks for the number of steps.
        """
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        if batches["completed"] < batches["processed"] and _validation_follows(trainer):
            _go_on_with_validation(checkpoint["loops"])
        if isinstance(trainer.train_dataloader, GroupLoader):
            checkpoint["train_loader"] = trainer.train_dataloader.state_dict()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Kept until there is a loader."""
        self.loader = checkpoint.get("train_loader")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go to the place in the epoch."""
        if self.loader is not None and isinstance(trainer.train_dataloader, GroupLoader):
            trainer.train_dataloader.load_state_dict(self.loader)
        self.loader = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A whole epoch begins with its first batch, also where `limit_train_batches` ended the one before early."""
        if isinstance(trainer.train_dataloader, GroupLoader):
            trainer.train_dataloader.first = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore, before the first batch after a stop."""
        self._restore()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore, where a validation is the first thing after a stop."""
        if not trainer.sanity_checking and self.saved is not None:
            self._restore()
            # The batch with which it is said to have begun is counted again.
            batches: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            batches.ready = batches.started = batches.completed

    def _restore(self) -> None:
        if self.saved is None:
            return
        state, self.saved = self.saved, None
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])


class FiniteGradients(pl.Callback):
    """Stops a run before a step whose gradient is not finite, or leaves some such steps out. Logs the gradient's norm.

    With 16-bit float precision and its scaler such steps are part of the search for a scale, and left to it.

    Args:
        max_bad_steps: how many may be left out.
        checkpoint: named in the message.
    """

    def __init__(self, max_bad_steps: int, checkpoint: Path) -> None:
        if not isinstance(max_bad_steps, int) or max_bad_steps < 0:
            raise UserError(f"max_bad_steps={max_bad_steps} must be a whole number, at least 0")
        self.max_bad_steps = max_bad_steps
        self.checkpoint = checkpoint
        self.bad_steps = 0
        self.seen: list[int] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember which texts go into the step."""
        # A batch of a task of one's own may have neither.
        self.seen += getattr(batch, "question_ids", None) or getattr(batch, "caption_ids", [])

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at the gradient. Ranks agree on it, as each sees only its part where the model is sharded (FSDP).

        Raises:
            UserError: it is not finite, and no more steps may be left out.
        """
        texts, self.seen = self.seen, []
        norm = nn.utils.get_total_norm([p.grad for p in pl_module.parameters() if p.grad is not None])
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/gradient_norm", norm)
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        if trainer.strategy.reduce_boolean_decision(bool(torch.isfinite(norm))):
            return
        self.bad_steps += 1
        named = ", ".join(map(str, texts[:20])) + (", …" if len(texts) > 20 else "")
        what = f"the gradient is not finite at step {trainer.global_step} (texts {named})"
        if self.bad_steps > self.max_bad_steps:
            go_on = (
                f"{self.checkpoint} is from before it: go on with resume={self.checkpoint.parent.parent}"
                if self.checkpoint.is_file()
                else "there is no checkpoint yet"
            )
            raise UserError(f"{what}; {go_on}; lower task.recipe.lr, or allow some such steps with max_bad_steps=N")
        say(f"{what}: left out, {self.bad_steps} of at most {self.max_bad_steps}")
        for parameter in pl_module.parameters():
            parameter.grad = None  # the optimiser leaves alone what has none


class KeepLast(pl.callbacks.Checkpoint):
    """Keeps `last.ckpt`, all that a run needs to go on.

    It is saved before and after every validation, at the end of every epoch, at intervals, and when SIGTERM (then the
    run stops) or SIGUSR1 (then it goes on) comes, as SLURM sends them before it takes a job's machine. It is saved
    between two optimiser steps only: the gradients of a step that is half accumulated are not in it.

    Args:
        path: of the checkpoint.
        every_minutes: save so often, at least.
        every_n_steps: save after so many optimiser steps.
    """

    def __init__(self, path: Path, every_minutes: float | None = None, every_n_steps: int | None = None) -> None:
        self.path = path
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.saved_at = time.monotonic()
        self.save_asked = False
        self.stop_asked = False
        self.stops = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Listen for SIGUSR1 before Lightning does: it would look for its own kind of checkpoint after a requeue."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, self._ask_save)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen for SIGTERM in the place of Lightning, which would stop in mid-validation and in half a step."""
        self.saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._ask_stop)

    def _ask_save(self, *_: Any) -> None:
        self.save_asked = True

    def _ask_stop(self, *_: Any) -> None:
        self.save_asked = self.stop_asked = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, on all ranks if one of them was asked to or has its clock ahead."""
        if not _can_go_on(trainer):
            return
        late = self.every_minutes is not None and time.monotonic() - self.saved_at >= 60 * self.every_minutes
        due = trainer.strategy.reduce_boolean_decision(self.save_asked or late, all=False)
        due |= self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        # An epoch that ends without validation is saved once it has ended.
        if _validation_follows(trainer) or (due and not trainer.is_last_batch):
            self._save(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop if asked to: all is saved. Several ranks end the validation first, as they may have unequal batches."""
        if self.stop_asked and trainer.world_size == 1 and _can_go_on(trainer):
            raise SIGTERMException

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation in mid-epoch, so that it is not done again."""
        if _can_go_on(trainer) and not (trainer.sanity_checking or trainer.is_last_batch):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save. Where steps are counted and not epochs, Lightning would end the epoch a second time if it went on from
        here; the checkpoint from before its validation does as well.
        """
        if trainer.max_steps == -1 or trainer.global_step >= trainer.max_steps:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop if asked to, now that the batch before has been logged."""
        self._stop_if_saved()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_train_batch_start`."""
        self._stop_if_saved()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """As `on_train_batch_start`."""
        self._stop_if_saved()

    def _stop_if_saved(self) -> None:
        if self.stops:
            raise SIGTERMException

    def _save(self, trainer: pl.Trainer) -> None:
        """Save; nothing more is to be done if one of the ranks was asked to stop."""
        trainer.save_checkpoint(self.path)
        self.saved_at = time.monotonic()
        if trainer.strategy.reduce_boolean_decision(self.save_asked, all=False):
            self.save_asked = False
            say(f"saved {self.path} because of a signal; go on with resume={self.path.parent.parent}")
        self.stops = trainer.strategy.reduce_boolean_decision(self.stop_asked, all=False)


def _can_go_on(trainer: pl.Trainer) -> bool:
    """Whether a run could go on from a checkpoint of now: no gradients wait for those of the next batch, and steps are
    left; of a run that has made its last step, Lightning would not do the validation after it.
    """
    return not trainer.fit_loop._should_accumulate() and trainer.global_step != trainer.max_steps


def _validation_follows(trainer: pl.Trainer) -> bool:
    """Whether Lightning validates after the batch that has just ended. It tells nobody, so its own loop is asked."""
    fit = trainer.fit_loop
    return (
        trainer.enable_validation
        and fit._data_fetcher is not None
        and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)
    )


def _go_on_with_validation(loops: dict[str, Any]) -> None:
    """Write into the state of Lightning's loops that a batch is over and that the validation after it has begun.

    Lightning's own state between the two stands for a batch that is not over: it leaves the validation out when it goes
    on, and where the epoch was over too, loses count of the epochs when that run is stopped in its turn.
    """
    fit = loops["fit_loop"]
    for part in ("total", "current"):
        batches = fit["epoch_loop.batch_progress"][part]
        batches["completed"] = batches["processed"]
        first = fit["epoch_loop.val_loop.batch_progress"][part]
        if part == "current":
            first.update(processed=0, completed=0)
        first["ready"] = first["started"] = first["completed"] + 1


def validation_is_next(loops: dict[str, Any]) -> bool:
    """Whether a run that goes on from this state of Lightning's loops begins with a validation."""
    batches = loops["fit_loop"]["epoch_loop.val_loop.batch_progress"]["total"]
    return bool(batches["processed"] < batches["started"])


class SamplesPerSecond(pl.Callback):
    """Log `train/samples_per_second`: texts of this process since the value before, loading included.

    With every validation it logs what training has cost until then, over stops of the run too: `seen/texts`, of all
    processes, and `seen/minutes`, without validation.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.since = 0.0
        self.last = 0.0
        self.texts = 0
        self.seconds = 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock anew, so that validation does not count."""
        self.samples, self.since = 0, time.perf_counter()
        self.last = self.since

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: VQABatch | CaptionBatch,
        batch_idx: int,
    ) -> None:
        """Count a batch, and log as often as Lightning logs."""
        now = time.perf_counter()
        self.texts += len(batch.input_ids) * trainer.world_size
        self.seconds += now - self.last
        self.last = now
        self.samples += len(batch.input_ids)
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/samples_per_second", self.samples / (now - self.since))
            self.samples, self.since = 0, now

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what was seen, beside what it was worth."""
        if not trainer.sanity_checking:
            pl_module.log("seen/texts", float(self.texts), rank_zero_only=True)
            pl_module.log("seen/minutes", self.seconds / 60, rank_zero_only=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the clock after a validation in mid-epoch."""
        self.last = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """What was seen."""
        return {"texts": self.texts, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.texts, self.seconds = state_dict["texts"], state_dict["seconds"]


class EveryNValidations(pl.Callback):
    """What is done after every N validations, counted over stops of the run too.

    Args:
        every: N; 0 for never.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.validations = 0

    def is_due(self, trainer: pl.Trainer) -> bool:
        """Count a validation; whether it is the N-th."""
        if trainer.sanity_checking:
            return False
        self.validations += 1
        return bool(self.every) and self.validations % self.every == 0

    def state_dict(self) -> dict[str, Any]:
        """How many there were."""
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.validations = state_dict["validations"]


class PredictionTable(EveryNValidations):
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
        super().__init__(every_n_validations)
        self.directory = Path(directory)
        self.num_images = num_images
        self.questions_per_image = questions_per_image

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the figures, and the table to W&B."""
        assert isinstance(pl_module, VQATask)
        if not self.is_due(trainer) or not trainer.is_global_zero:
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
            map_name = default_map(pl_module.model)
            maps = attention_map(output, pl_module.model.vision, map_name).cpu().numpy()
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
            figure = question_figure(picture, panels, map_name)
            save_figure(figure, self.directory / f"val_step{trainer.global_step:06d}_{shown}.png")
            if shown == 0:
                self._paper_figures(trainer, pl_module, picture, batch.questions)
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
        self, trainer: pl.Trainer, task: VQATask, picture: Image.Image, questions: Sequence[str]
    ) -> None:
        """The figures of `vlabs.attention` that are of one picture and one model, as files and in W&B."""
        model = task.model
        checkpoint = Checkpoint(model, task.preprocessing, task.name, {}, self.directory)
        figures = {"questions": questions_figure(checkpoint, [picture], questions, default_map(model))}
        if model.vision.needs_prior:
            figures["pathway"] = pathway_figure(checkpoint, picture, questions)
        if hasattr(model.vision.topdown, "alpha"):
            figures["alpha"] = alpha_figure(checkpoint, picture, questions, (1, 3, 10), "fusion")
        for name, figure in figures.items():
            path = save_figure(figure, self.directory / f"{name}_step{trainer.global_step:06d}.png")
            for logger in trainer.loggers:
                if isinstance(logger, WandbLogger):
                    with sending(f"the figure {name}"):
                        logger.log_image(f"figures/{name}", [str(path)], step=trainer.global_step)


class GroundingCurve(EveryNValidations):
    """Every N validations: does it look where the questions or captions are about? Logs `val/grounding/MAP_energy`.

    The share of a map's energy inside the target, in percent, beside `val/grounding/area`, the share that a map which
    looks everywhere alike would have; on texts of the validation split whose target is known, evenly spread. Where none
    is known, nothing is measured.

    Args:
        every_n_validations: how often; 0 for never.
        num_texts: how many texts.
        maps: of `vlabs.attention.maps.MAPS`.
        instances: COCO's instances; what the data were prepared with if not given.
    """

    def __init__(
        self,
        every_n_validations: int = 1,
        num_texts: int = 100,
        maps: Sequence[str] = ("norm", "fusion"),
        instances: str | None = None,
    ) -> None:
        super().__init__(every_n_validations)
        self.num_texts = num_texts
        self.maps = list(maps)
        self.instances = instances
        self.targets: Targets | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the targets once."""
        if wrong := [name for name in self.maps if name not in MAPS]:
            raise UserError(f"grounding.maps names {', '.join(wrong)}: choose of {', '.join(MAPS)}")
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self.every or self.targets is not None or not isinstance(data, VQADataModule | CaptionDataModule):
            return
        directory = next(iter(data.sets.values())) if isinstance(data, CaptionDataModule) else data.dir
        self.targets = find_targets(data.rows(data.val_split), directory, self.instances, self.num_texts)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        if not self.is_due(trainer) or self.targets is None:
            return
        assert isinstance(pl_module, VisionLanguageTask)
        values: dict[str, list[float]] = {}
        if trainer.is_global_zero:
            for record in measure(pl_module.model, pl_module.preprocessing, self.targets, self.maps):
                if record is not None:
                    values.setdefault("area", []).append(record["area"])
                    for name in self.maps:
                        values.setdefault(f"{name}_energy", []).append(record["maps"][name]["energy"])
        for name, shares in values.items():
            pl_module.log(f"val/grounding/{name}", 100 * sum(shares) / len(shares), rank_zero_only=True)
