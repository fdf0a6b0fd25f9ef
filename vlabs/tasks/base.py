"""The base of all tasks: training step, total loss over all ranks, optimization, frozen parts, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, asdict, dataclass, field, fields, replace
from typing import Any, ClassVar

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
from vlabs.models.diversity import is_of_pool
from vlabs.models.lora import LoRA, add_adapters
from vlabs.tasks.optim import PARTS, Recipe
from vlabs.utils.options import check_type, checked, options_of
from vlabs.utils.ranks import is_distributed, say


@dataclass
class Losses:
    """The losses of a batch, without weights.

    Attributes:
        task: the task's own losses by name, each a mean over the batch; the training minimizes their sum.
        count: number of texts (or images) that they are means of.
        others: losses with a weight, named as in `task.NAME_weight`.
        right: which predictions are right, by name: bool vectors, from which accuracies are computed.
    """

    task: dict[str, Tensor]
    count: int
    others: dict[str, Tensor] = field(default_factory=dict)
    right: dict[str, Tensor] = field(default_factory=dict)


_STEPS_OF_A_TIMED_SCHEDULE = 1_000_000  # any number will do: a timed schedule only uses the share that has passed


@dataclass(eq=False, repr=False)
class Task(pl.LightningModule):
    """A subclass defines the losses and the samples of a batch (`losses`, `sample_ids`), the data that it reads and the
    metric that it is monitored by; see `docs/add_a_task.md`. The options of a task are its fields.

    Args:
        model: the model to train, registered (`vlabs.models.registry`) and with `recompute_activations` and
            `compile_parts`.
        preprocessing: goes into the checkpoint, so that it can be used alone.
        data: identity of the training data, for the checkpoint.
        recipe: how the parts are optimized.
        freeze: what is not trained: parts (`vision`, `text`, `fusion`, `head`, `feedback`, with `vision` the
            pre-trained image encoder and `feedback` its decoders and ξ), or beginnings of parameter names
            (`text.roberta.embeddings`).
        recompute_activations: recompute activations in the backward pass: less memory, a third more time.
        compile: compile the encoders and the fusion with `torch.compile`: minutes at the start, then faster steps.
        lora: low-rank adapters in the encoders, whose own weights are then frozen.

    Raises:
        UserError: an option is out of range, or two exclude each other.
    """

    model: Any
    preprocessing: Preprocessing
    data: dict[str, Any]
    recipe: Recipe
    _: KW_ONLY
    freeze: Sequence[str] = ()  # type: ignore[assignment]  # a method of Lightning, as `compile` of torch; see below
    recompute_activations: bool = False
    compile: bool = False  # type: ignore[assignment]
    lora: LoRA | None = None

    name: ClassVar[str]
    monitor: ClassVar[str]
    """The metric by which the best checkpoint is chosen; higher is better."""
    reads: ClassVar[type[PreparedDataModule]]
    """The kind of data that it trains on."""
    of_all_ranks: ClassVar[tuple[str, ...]] = ()
    """Names of other losses that every rank computes over the samples of all ranks."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):  # written by hand
            checked("task")(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Task:
        """A task that modules may be assigned to."""
        if cls.__hash__ is None:  # a subclass with a plain `@dataclass`; torch and Lightning need modules as keys
            cls.__eq__, cls.__hash__ = Task.__eq__, Task.__hash__  # type: ignore[method-assign]
        task = super().__new__(cls)
        pl.LightningModule.__init__(task)
        return task

    def __post_init__(self) -> None:
        hints = options_of(type(self))
        for one in fields(self):
            if (value := getattr(self, one.name)) is not one.default:
                check_type(f"task.{one.name}", value, hints.get(one.name, Any))
        # On the made task these are the methods again.
        freeze, compile = self.__dict__.pop("freeze", ()), self.__dict__.pop("compile", False)
        self.freezes = tuple(dict.fromkeys(freeze))  # for the first lines of a run
        self.frozen = self._freeze(freeze)
        if isinstance(self.lora, Mapping):  # of a config that does not name the class
            self.lora = LoRA(**self.lora)
        self.lora = self._adapt(self.lora, freeze) if self.lora is not None and self.lora.rank else None
        if self.recompute_activations:
            self.model.recompute_activations()
        if compile:
            self.model.compile_parts()
        self.train()  # Lightning does not change the modes of modules, so frozen parts must be in eval mode here

    def encoders(self) -> dict[str, nn.Module]:
        """The encoders that adapters are added to, by the names of `task.lora.parts`."""
        found = {"vision": self.model.vision.vit, "text": self.model.text}
        return {part: encoder for part, encoder in found.items() if encoder is not None}

    def _adapt(self, lora: LoRA, freeze: Sequence[str]) -> LoRA:
        """Add adapters; return them with the parts that the model has."""
        encoders, names = self.encoders(), {module: name for name, module in self.named_modules()}
        parts = tuple(part for part in lora.parts if part in encoders)
        if both := [prefix for prefix in freeze if prefix.split(".")[0] in parts]:
            raise UserError(
                f"task.freeze names '{both[0]}', which gets adapters: leave it out, or pass task.lora.parts"
            )
        if not parts:
            raise UserError(f"task.lora.parts={list(lora.parts)}: this model has {', '.join(encoders)}")
        for part in parts:
            encoder, place = encoders[part], names[encoders[part]]
            new = [name for name, _ in encoder.named_parameters() if self.lr_group(f"{place}.{name}") == "head"]
            add_adapters(encoder, lora, new)
        return replace(lora, parts=parts)

    def _freeze(self, chosen: Sequence[str]) -> list[nn.Module]:
        """Freeze the parameters that `freeze` names; return the modules all of whose parameters are frozen."""
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
        # Modules without parameters, such as dropout, belong to the part that their name says.
        return [
            module
            for name, module in self.model.named_modules()
            if name and all(is_frozen(f"{name}.{one}") for one in [*dict(module.named_parameters())] or ["weight"])
        ]

    def train(self, mode: bool = True) -> Task:
        """Set the training mode; frozen parts stay in eval mode, without dropout."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def wants(self, data: Any) -> Wants:
        """What the task needs from its data besides texts and images; the data module asks for it before a training.

        Args:
            data: a data module of the kind `reads`.

        Raises:
            UserError: the data do not have what the task needs.
        """
        return Wants()

    def losses(self, batch: Any) -> Losses:
        """The losses of a batch, which has at least one sample."""
        raise NotImplementedError

    def sample_ids(self, batch: Any) -> list[Any]:
        """The ids of a batch's samples, one each; error messages name them."""
        raise NotImplementedError

    def lr_group(self, name: str) -> str:
        """The group of a parameter, which chooses its learning rate in `task.recipe.lr`.

        Parameters that a task adds to the model, adapters and those of `model.vision.tap` are new like a head, so they
        belong to `head`. A group that is not one of `vlabs.tasks.optim.PARTS` needs its own learning rate,
        `+task.recipe.lr.GROUP=...`.

        Args:
            name: name of the parameter, as in `named_parameters()`.
        """
        part, _, rest = name.removeprefix("model.").partition(".")
        if ".lora_" in rest or is_of_pool(rest):
            return "head"
        if part in ("prior", "prior_loss", "focus_prior_loss") or rest.startswith(
            ("decoders.", "modulations.", "topdown.")
        ):
            return "feedback"
        return part if name.startswith("model.") and part in PARTS else "head"

    def on_fit_start(self) -> None:
        """Print what has no effect in the image encoder, such as feedback that can never learn."""
        for encoder in (one for one in self.model.modules() if isinstance(one, AbSViT)):
            if _stays_zero(encoder.zero_parameters()):
                say(
                    "task.freeze names the feedback, which is new and begins at zero, so the second pass equals the "
                    "first: leave it out, start from a run that has feedback (init=RUN), or pass model/topdown=none"
                )
            if encoder.start > 1 and not encoder.looks_twice:
                say(f"model.vision.start={encoder.start} has no effect: this model/topdown has no second pass")
            pointer = None if encoder.topdown is None else encoder.topdown.pointer
            if pointer is not None and _stays_zero([*pointer.parameters()]):
                say(
                    "model.vision.topdown.points=head: the head is new and nothing trains it, so its map is uniform: "
                    "pass points=prior, a region loss with data that have regions, or start from a run (init=RUN)"
                )

    def shorten_validation(self) -> None:
        """Leave out what is done once per validation; called before a few steps that measure a training's cost."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The total loss of a batch."""
        skipped = getattr(batch, "skipped", ())  # batches of a user's own data need not have it
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
        """Let the image encoder keep one of its shares of the patches, drawn as a function of the step."""
        with ExitStack() as stack:
            for encoder in (one for one in self.model.modules() if isinstance(one, AbSViT)):
                drawn = random_generator(self.global_step).integers(len(encoder.shares))
                stack.enter_context(encoder.keeping(encoder.shares[drawn]))
            yield

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Log the task's losses and the accuracies of its predictions."""
        if not self.sample_ids(batch):
            return
        losses = self.losses(batch)
        for name, loss in losses.task.items():
            self.log(f"val/{name}_loss", loss, batch_size=losses.count, sync_dist=True)
        for name, right in losses.right.items():
            # A batch without predictions has weight 0, and must not be NaN.
            percent = 100 * right.float().sum() / max(len(right), 1)
            self.log(f"val/{name}_accuracy", percent, prog_bar=True, batch_size=len(right), sync_dist=True)

    def total(self, losses: Losses) -> Tensor:
        """The sum of the task's losses and of the other losses times `NAME_weight` (paper, Eq. 14).

        DDP takes the mean of the gradients of all ranks. The mean over a rank's own n samples is therefore weighted by
        n, so that every sample counts the same if ranks have different numbers of samples.
        """
        share = self._share(losses.count)
        total = share * torch.stack(list(losses.task.values())).sum()
        for name, loss in losses.others.items():
            weight = getattr(self, f"{name}_weight")
            total = total + (weight if name in self.of_all_ranks else share * weight) * loss
        return total

    def leave_out(self, what: str) -> None:
        """Called when a whole batch is left out.

        Raises:
            UserError: there are several ranks, and the others would wait for this rank's gradients.
        """
        if is_distributed() and self.training:
            raise UserError(
                f"no image of a batch can be decoded ({what}), and one of several processes cannot leave out a batch: "
                "prepare the data again with --on-bad skip"
            )

    def _share(self, count: int) -> float | Tensor:
        """This rank's number of texts divided by the mean number over all ranks."""
        if not is_distributed():
            return 1.0
        everyone = torch.tensor(float(count), device=self.device)
        dist.all_reduce(everyone)
        return count * dist.get_world_size() / everyone

    def configure_optimizers(self) -> Any:
        """AdamW and its learning rate schedule, which steps with every optimizer step.

        Raises:
            UserError: no option says how long the training is.
        """
        # With a gradient scaler (16-mixed), fused AdamW unscales gradients inside its step: too late for clipping.
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
        """Clip gradients as Lightning does, and also for a fused optimizer in bf16-mixed.

        Lightning refuses that because a fused optimizer may unscale gradients itself; in bf16 there is no scaler.
        """
        plugin = self.trainer.precision_plugin
        if gradient_clip_val and type(plugin) is MixedPrecision and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the entry `"vlabs"`: architecture and preprocessing as plain data."""
        checkpoint["vlabs"] = header_of(self.model, self.preprocessing, self.name, self.data)
        if self.lora is not None:
            checkpoint["vlabs"]["lora"] = asdict(self.lora) | {"scale": self.lora.scale, "parts": list(self.lora.parts)}


del Task.freeze, Task.compile  # the defaults, which would hide the methods


def _stays_zero(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether there are parameters, all are zero, and none of them is trained."""
    return len(parameters) > 0 and not any(one.requires_grad or one.any() for one in parameters)


class _AllGather(torch.autograd.Function):
    """Gather tensors of equal shape from all ranks; backward sums all ranks' gradients of this rank's tensor.

    Torch's own function with gradients, which Lightning uses, is deprecated in favor of a private one.
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
    """Concatenate the tensors of all ranks along the first dimension, with gradients; their lengths may differ."""
    world = dist.get_world_size()
    sizes = [torch.zeros((), dtype=torch.int64, device=local.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor(len(local), device=local.device))
    lengths = [int(size) for size in sizes]
    # all_gather needs equal shapes, so each rank pads its tensor to the longest.
    padded = F.pad(local, [0, 0] * (local.ndim - 1) + [0, max(lengths) - len(local)])
    parts = _AllGather.apply(padded)  # type: ignore[no-untyped-call]
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
