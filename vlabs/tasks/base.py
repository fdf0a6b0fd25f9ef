"""What every task shares: training step, sum of losses over all ranks, optimization, frozen parts, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pytorch_lightning.callbacks import Timer
from pytorch_lightning.plugins.precision import MixedPrecision, Precision
from pytorch_lightning.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from vlabs.checkpoints.checkpoint import header_of
from vlabs.data.images import random_generator
from vlabs.data.module import PreparedDataModule, Wants
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT
from vlabs.models.lora import LoRA, add_adapters
from vlabs.tasks.optim import PARTS, Recipe
from vlabs.utils.options import checked
from vlabs.utils.ranks import is_distributed, say


@dataclass
class Losses:
    """What a batch gives, not weighted yet.

    Attributes:
        task: the task's own losses by name, each a mean over the batch; their sum is trained.
        count: of how many texts (or images) they are means.
        others: losses that have a weight, by the names of `task.NAME_weight`.
        right: what was guessed right, by name: vectors of truth values, for accuracies.
    """

    task: dict[str, Tensor]
    count: int
    others: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)


_STEPS_OF_A_TIMED_SCHEDULE = 1_000_000  # whatever they are, `trainer.max_time` is shared out among them


@checked("task")
class Task(pl.LightningModule):
    """A task says what the losses of a batch are (`losses`), which samples a batch has (`sample_ids`), the data that it
    reads and the metric that it is judged by; see `docs/add_a_task.md`.

    Args:
        model: the model to train, registered (`vlabs.models.registry`) and with `recompute_activations` and
            `compile_parts`.
        preprocessing: goes into the checkpoint, so that it can be used alone.
        data: identity of the training data, for the checkpoint.
        recipe: of optimization.
        freeze: what is not trained: parts (`vision`, `text`, `fusion`, `head`, `feedback`, with `vision` the
            pre-trained image encoder and `feedback` its decoders and ξ), or beginnings of parameter names
            (`text.roberta.embeddings`).
        recompute_activations: recompute activations in the backward pass: less memory, a third more time.
        compile: compile the encoders and the fusion with `torch.compile`: minutes at the start, faster steps after.
        lora: low-rank adapters in the encoders, of which then nothing else is trained.
    """

    name: str
    monitor: str
    """The metric by which the best checkpoint is chosen; more is better."""
    reads: type[PreparedDataModule]
    """The kind of data that it trains on."""
    of_all_ranks: tuple[str, ...] = ()
    """Other losses that are over the samples of all ranks already, on every rank."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked("task")(cls)

    def __init__(
        self,
        model: Any,
        preprocessing: Preprocessing,
        data: dict[str, Any],
        recipe: Recipe,
        freeze: Sequence[str] = (),
        recompute_activations: bool = False,
        compile: bool = False,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.data = data
        self.recipe = recipe
        self.frozen = self._freeze(freeze)
        self.lora = lora if lora is not None and lora.rank else None
        if self.lora is not None:
            if both := [prefix for prefix in freeze if prefix.split(".")[0] in self.lora.parts]:
                raise UserError(
                    f"task.freeze names '{both[0]}', which gets adapters: leave it out, or pass task.lora.parts"
                )
            add_adapters(model, self.lora)
        if recompute_activations:
            model.recompute_activations()
        if compile:
            model.compile_parts()
        self.train()  # Lightning takes the modes of modules as they are

    def _freeze(self, chosen: Sequence[str]) -> list[nn.Module]:
        """Stop training what `freeze` names; returns the modules that are frozen whole."""
        names = [name for name, _ in self.model.named_parameters()]
        parts = {*PARTS, *(self.lr_group(f"model.{name}") for name in names)}

        def is_frozen(name: str, by: Sequence[str] = chosen) -> bool:
            starts = tuple(f"{one}." for one in by if one not in parts)
            return self.lr_group(f"model.{name}") in by or f"{name}.".startswith(starts)

        for one in chosen:
            # A model without feedback has no decoders and no ξ map to freeze.
            if one.split(".")[0] not in ("feedback", "prior") and not any(is_frozen(name, [one]) for name in names):
                known = ", ".join(dict.fromkeys([*PARTS, *(name for name, _ in self.model.named_children())]))
                raise UserError(f"task.freeze names '{one}', which the model does not have: start with one of {known}")
        for name in filter(is_frozen, names):
            self.model.get_parameter(name).requires_grad_(False)
        # What has no parameters, such as dropout, is of the part that its name says.
        return [
            module
            for name, module in self.model.named_modules()
            if name and all(is_frozen(f"{name}.{one}") for one in [*dict(module.named_parameters())] or ["weight"])
        ]

    def train(self, mode: bool = True) -> Task:
        """Frozen parts stay in eval mode: no dropout in what does not learn."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def wants(self, data: Any) -> Wants:
        """What the task wants of its data beside texts and images.

        Args:
            data: of the kind `reads`.

        Raises:
            UserError: the data do not have it.
        """
        return Wants()

    def setup(self, stage: str) -> None:
        """Tell the data what is wanted of them."""
        if stage in ("fit", "validate") and (data := self.trainer.datamodule) is not None:  # type: ignore[attr-defined]
            data.wants = self.wants(data)

    def losses(self, batch: Any) -> Losses:
        """What a batch gives; it has at least one sample."""
        raise NotImplementedError

    def sample_ids(self, batch: Any) -> list[Any]:
        """The data's own ids of a batch's samples: as many as it has, and named where something is wrong with them."""
        raise NotImplementedError

    def lr_group(self, name: str) -> str:
        """Which of the rates in `task.recipe.lr` a parameter of this task has.

        What a task adds to the model is as new as a head, adapters too. Another group than METER's needs a rate of its
        own, `+task.recipe.lr.GROUP=...`.

        Args:
            name: of the parameter, as in `named_parameters()`.
        """
        part, _, rest = name.removeprefix("model.").partition(".")
        if ".lora_" in rest:
            return "head"
        if part in ("prior", "prior_loss") or rest.startswith(("decoders.", "modulations.", "topdown.")):
            return "feedback"
        return part if name.startswith("model.") and part in PARTS else "head"

    def on_fit_start(self) -> None:
        """Say so if nothing will ever be fed back."""
        encoders = [one for one in self.model.modules() if isinstance(one, AbSViT)]
        if any(one.is_silent and one.decoders in self.frozen for one in encoders):
            say(
                "task.freeze names the feedback, which is new and begins at nothing, so the second pass is the first: "
                "leave it out, start from a run that has feedback (init=RUN), or pass model/topdown=none"
            )

    def shorten_validation(self) -> None:
        """Leave out what is done once a validation, before some steps that only measure what a training will cost."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The total loss of a batch."""
        skipped = getattr(batch, "skipped", ())  # your own data need not leave anything out
        if skipped:
            self.log("train/skipped_images", float(len(skipped)), reduce_fx="sum", on_step=True)
        if not self.sample_ids(batch):
            self.leave_out(", ".join(map(str, skipped)))
            return None
        with self._keeping():
            losses = self.losses(batch)
        total = self.total(losses)
        self.log("train/loss", total, prog_bar=True, batch_size=losses.count)
        for name, loss in (losses.task | losses.others).items():
            self.log(f"train/{name}_loss", loss, batch_size=losses.count)
        return total

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Let the image encoder keep one of its shares of the patches; which, is a function of the step."""
        with ExitStack() as stack:
            for encoder in (one for one in self.model.modules() if isinstance(one, AbSViT)):
                drawn = random_generator(self.global_step).integers(len(encoder.shares))
                stack.enter_context(encoder.keeping(encoder.shares[drawn]))
            yield

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the task's losses, and the accuracy of what it guesses."""
        if not self.sample_ids(batch):
            return
        losses = self.losses(batch)
        for name, loss in losses.task.items():
            self.log(f"val/{name}_loss", loss, batch_size=losses.count, sync_dist=True)
        for name, right in losses.right.items():
            # Nothing guessed is a weight of 0, and not a NaN.
            percent = 100 * right.float().sum() / max(len(right), 1)
            self.log(f"val/{name}_accuracy", percent, prog_bar=True, batch_size=len(right), sync_dist=True)

    def total(self, losses: Losses) -> Tensor:
        """The task's losses and, times `NAME_weight`, the others (paper, Eq. 14).

        Over several ranks, DDP takes the mean of their gradients. Means over a rank's own n samples are therefore
        weighted by n, so that every sample counts the same where ranks have unequal numbers of them.
        """
        share = self._share(losses.count)
        total = share * torch.stack(list(losses.task.values())).sum()
        for name, loss in losses.others.items():
            weight = getattr(self, f"{name}_weight")
            total = total + (weight if name in self.of_all_ranks else share * weight) * loss
        return total

    def leave_out(self, what: str) -> None:
        """Note that a whole batch was left out.

        Raises:
            UserError: there are several ranks: the others would wait for this one's gradients.
        """
        if is_distributed() and self.training:
            raise UserError(
                f"no image of a batch can be decoded ({what}), which one of several processes cannot leave out: "
                "prepare the data again with --on-bad skip"
            )

    def _share(self, count: int) -> float | Tensor:
        """A rank's number of texts over the mean number of all ranks."""
        if not is_distributed():
            return 1.0
        everyone = torch.tensor(float(count), device=self.device)
        dist.all_reduce(everyone)
        return count * dist.get_world_size() / everyone

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped once an optimizer step.

        Raises:
            UserError: nothing says how long the training is.
        """
        # Where losses are scaled (16-mixed), gradients must be seen before the step, which a fused one does not allow.
        scales = getattr(self.trainer.precision_plugin, "scaler", None) is not None
        recipe = replace(self.recipe, fused=False) if scales else self.recipe
        optimizer = recipe.optimizer(self, self.lr_group)
        steps = self.trainer.estimated_stepping_batches
        endless = steps == float("inf")
        schedule = self.recipe.scheduler(optimizer, _STEPS_OF_A_TIMED_SCHEDULE if endless else int(steps))
        if endless:
            schedule.lr_lambdas[0].elapsed = self._share_of_time()  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _share_of_time(self) -> Callable[[], float]:
        """The share of `trainer.max_time` that has passed, the same on all ranks."""
        timers = [one for one in self.trainer.callbacks if isinstance(one, Timer) and one.time_remaining() is not None]  # type: ignore[attr-defined]
        if not timers:
            raise UserError(
                "trainer.max_epochs=-1 has no end: pass trainer.max_steps=N or +trainer.max_time=DAYS:HOURS:MM:SS too"
            )

        def elapsed() -> float:
            passed, left = timers[0].time_elapsed(), timers[0].time_remaining() or 0.0
            return float(self.trainer.strategy.broadcast(passed / max(passed + left, 1e-9)))

        return elapsed

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning clips; in bf16-mixed too, where nothing is scaled: it refuses that for a fused optimizer."""
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and type(plugin) is MixedPrecision and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the `"vlabs"` entry: architecture and preprocessing as plain data."""
        checkpoint["vlabs"] = header_of(self.model, self.preprocessing, self.name, self.data)
        if self.lora is not None:
            checkpoint["vlabs"]["lora"] = asdict(self.lora) | {"scale": self.lora.scale, "parts": list(self.lora.parts)}


class _AllGather(torch.autograd.Function):
    """The tensors of all ranks, of one shape; backward, every rank's gradient of this rank's tensor is added up.

    Torch's own with gradients, which Lightning uses too, is deprecated in favor of a private one.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]


def gather(local: Tensor) -> Tensor:
    """Concatenate a tensor of every rank along the first dimension, with gradients; ranks may differ in length."""
    world = dist.get_world_size()
    sizes = [torch.zeros((), dtype=torch.int64, device=local.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor(len(local), device=local.device))
    lengths = [int(size) for size in sizes]
    padded = F.pad(local, [0, 0] * (local.ndim - 1) + [0, max(lengths) - len(local)])
    parts = _AllGather.apply(padded)  # type: ignore[no-untyped-call]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
