"""What every vision-language task shares: optimisation, frozen parts, the prior loss over all ranks, checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlabs.checkpoints.checkpoint import header_of
from vlabs.data.module import PreparedDataModule
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.prior import PriorLoss, RegionPriorLoss, TokenPriorLoss
from vlabs.models.vlm import VisionLanguageModel, VLMOutput
from vlabs.runs.logging import say
from vlabs.tasks.optim import PARTS, Recipe
from vlabs.utils.ranks import is_distributed


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


class VisionLanguageTask(pl.LightningModule):
    """Total loss = task loss + w_rec · reconstruction + w_prior · prior (paper, Eq. 14).

    A task says what the losses of a batch are (`losses`), which samples a batch has (`sample_ids`), the data that it
    reads and the metric that it is judged by; see `docs/add_a_task.md`.

    Args:
        model: the model to train.
        preprocessing: goes into the checkpoint, so that it can be used alone.
        data: identity of the training data, for the checkpoint.
        recipe: of optimisation.
        reconstruction_weight: w_rec.
        prior_weight: w_prior, on the second pass's [cls].
        prior_bottom_up_weight: of the same loss on the bottom-up [cls].
        prior_loss: form of the prior loss.
        region_prior_weight: of the loss that puts ξ on the patches which a text is about; without effect where the
            data say of no text what it is about.
        region_prior_temperature: its τ.
        token_prior_weight: of the loss that lets ξ's best patches tell a text's image from the others of its batch.
        token_prior_temperature: its τ.
        recompute_activations: keep less for the backward pass and compute it again: less memory, a third more time.
        compile: let `torch.compile` make the kernels, see `VisionLanguageModel.compile_parts`: a slow start.
        freeze: parameters that are not trained, by the start of their name: `vision`, `text.roberta.embeddings`, …
    """

    name: str
    monitor: str
    """The metric by which the best checkpoint is chosen; more is better."""
    reads: type[PreparedDataModule]
    """The kind of data that it trains on."""

    def __init__(
        self,
        model: VisionLanguageModel,
        preprocessing: Preprocessing,
        data: dict[str, Any],
        recipe: Recipe,
        reconstruction_weight: float = 0.3,
        prior_weight: float = 0.1,
        prior_bottom_up_weight: float = 0.0,
        prior_loss: PriorLoss | None = None,
        region_prior_weight: float = 0.0,
        region_prior_temperature: float = 0.1,
        token_prior_weight: float = 0.0,
        token_prior_temperature: float = 0.1,
        freeze: Sequence[str] = (),
        recompute_activations: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.preprocessing = preprocessing
        self.data = data
        self.recipe = recipe
        has_prior = model.prior is not None
        self.reconstruction_weight = reconstruction_weight if model.vision.reconstructs else 0.0
        # Where ξ steers nothing, there is no second pass for it to be compared with.
        self.prior_weight = prior_weight if model.vision.needs_prior else 0.0
        self.prior_bottom_up_weight = prior_bottom_up_weight if has_prior and model.vision.has_bottom_up else 0.0
        uses_prior_loss = self.prior_weight > 0 or self.prior_bottom_up_weight > 0
        self.prior_loss = (prior_loss or PriorLoss()) if uses_prior_loss else None
        self.region_prior_weight = _weight("region_prior_weight", region_prior_weight) if has_prior else 0.0
        self.token_prior_weight = _weight("token_prior_weight", token_prior_weight) if has_prior else 0.0
        self.region_prior_loss = RegionPriorLoss(_temperature("region_prior", region_prior_temperature))
        self.token_prior_loss = TokenPriorLoss(_temperature("token_prior", token_prior_temperature))
        self._freeze_idle_prior()
        self.frozen = _freeze(model, freeze)
        if recompute_activations:
            model.recompute_activations()
        if compile:
            model.compile_parts()

    def _freeze_idle_prior(self) -> None:
        """Do not train a ξ that neither steers nor is taught: DDP would wait for its gradients."""
        taught = self.prior_bottom_up_weight + self.region_prior_weight + self.token_prior_weight > 0
        if self.model.prior is not None and not self.model.vision.needs_prior and not taught:
            self.model.prior.requires_grad_(False)

    def setup(self, stage: str) -> None:
        """Ask the data what every text is about, where that is learnt and known."""
        if stage != "fit" or not self.region_prior_weight:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        known = data.regions_known
        if known:
            data.region_grid = self.model.vision.grid_size
        else:
            self.region_prior_weight = 0.0
            self._freeze_idle_prior()
        if self.trainer.is_global_zero:
            what = (
                f"of {known:,} training texts it is known what they are about" if known else "the data have no regions"
            )
            say(f"region prior loss: {what}, so its weight is {self.region_prior_weight:g}")

    def train(self, mode: bool = True) -> VisionLanguageTask:
        """Frozen parts stay in eval mode: no dropout in what does not learn."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def losses(self, batch: Any) -> Losses:
        """What a batch gives; it has at least one sample."""
        raise NotImplementedError

    def sample_ids(self, batch: Any) -> list[int]:
        """The data's own ids of a batch's samples: as many as it has, and named where something is wrong with them."""
        raise NotImplementedError

    def lr_group(self, name: str) -> str:
        """Which of the rates in `task.recipe.lr` a parameter of this task has.

        What a task adds to the model is as new as a head. Another group than METER's needs a rate of its own,
        `+task.recipe.lr.GROUP=...`.

        Args:
            name: of the parameter, as in `named_parameters()`.
        """
        part, _, rest = name.removeprefix("model.").partition(".")
        if part in ("prior", "prior_loss") or rest.startswith(("decoders.", "modulations.")):
            return "feedback"
        return part if name.startswith("model.") and part in PARTS else "head"

    def shorten_validation(self) -> None:
        """Leave out what is done once a validation, before some steps that only measure what a training will cost."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """The total loss of a batch."""
        skipped = getattr(batch, "skipped", ())  # one's own data need not leave anything out
        if skipped:
            self.log("train/skipped_images", float(len(skipped)), reduce_fx="sum", on_step=True)
        if not self.sample_ids(batch):
            self.leave_out(", ".join(map(str, skipped)))
            return None
        losses = self.losses(batch)
        total = self.total(losses)
        self.log("train/loss", total, prog_bar=True, batch_size=losses.count)
        for name, loss in (losses.task | losses.others).items():
            self.log(f"train/{name}_loss", loss, batch_size=losses.count)
        return total

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

    def prior_losses(
        self, output: VLMOutput, input_ids: Tensor, image_ids: Tensor, pairs: Tensor | slice = slice(None)
    ) -> dict[str, Tensor]:
        """The prior loss on both passes, as far as they have a weight; over the pairs of all ranks in training.

        It trains the map from text to ξ, and not the text encoder.

        Args:
            output: of the model for n pairs of image and text.
            input_ids: (n, T), the pairs' texts.
            image_ids: (n,), the pairs' images.
            pairs: which of them belong together; all if not said.
        """
        if self.prior_loss is None or self.model.prior is None:
            return {}
        prior = self.model.prior(output.text_states[pairs].detach(), input_ids[pairs])
        image_ids = image_ids[pairs]
        seen = {}
        if self.prior_weight > 0:
            seen["prior"] = output.seen.tokens[:, 0][pairs]
        if self.prior_bottom_up_weight > 0:
            cls, index = output.bottom_up.cls, output.image_index
            seen["prior_bottom_up"] = (cls if index is None else cls[index])[pairs]
        if self.training and is_distributed():
            prior, image_ids = gather(prior), gather(image_ids)
            seen = {name: gather(state) for name, state in seen.items()}
        return {name: self.prior_loss(prior.float(), state.float(), image_ids) for name, state in seen.items()}

    def pointing_losses(
        self, output: VLMOutput, coverage: Tensor | None, pairs: Tensor | slice = slice(None)
    ) -> dict[str, Tensor]:
        """The losses of ξ on patches, as far as they have a weight. They train both encoders and the map.

        The patches are those of the bottom-up pass, whose similarity to ξ is what steers the second one. Texts are
        compared with the images of their own device.

        Args:
            output: of the model for n pairs of image and text.
            coverage: (n, patches), how much of each patch a text is about; None where no loss asked for it. Of the
                pairs in `pairs` only, where those are said.
            pairs: which of them belong together; all if not said.
        """
        if output.prior is None:
            return {}
        losses = {}
        prior = output.prior[pairs]
        image_index = None if output.image_index is None else output.image_index[pairs]
        patches = output.bottom_up.tokens[:, self.model.vision.num_prefix_tokens :]
        if self.region_prior_weight and coverage is not None:
            losses["region_prior"] = self.region_prior_loss(prior, patches, image_index, coverage)
        if self.token_prior_weight:
            losses["token_prior"] = self.token_prior_loss(prior, patches, image_index)
        return losses

    def total(self, losses: Losses) -> Tensor:
        """Weighted sum of Eq. 14.

        Over several ranks, DDP takes the mean of their gradients. Means over a rank's own n texts are therefore
        weighted by n, so that every text counts the same where ranks have unequal numbers of them. The prior losses are
        over all ranks' texts on every rank already.
        """
        share = self._share(losses.count)
        weights = {
            "reconstruction": share * self.reconstruction_weight,
            "prior": self.prior_weight,
            "prior_bottom_up": self.prior_bottom_up_weight,
            "region_prior": share * self.region_prior_weight,
            "token_prior": share * self.token_prior_weight,
        }
        task_loss = torch.stack(list(losses.task.values())).sum()
        return share * task_loss + sum(weights[name] * loss for name, loss in losses.others.items())

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
        """AdamW and its schedule, stepped once an optimiser step."""
        optimizer = self.recipe.optimizer(self, self.lr_group)
        steps = int(self.trainer.estimated_stepping_batches)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.recipe.scheduler(optimizer, steps), "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the `"vlabs"` entry: architecture and preprocessing as plain data."""
        checkpoint["vlabs"] = header_of(self.model, self.preprocessing, self.name, self.data)


def _weight(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not value >= 0:
        raise UserError(f"task.{name}={value} must be a number, at least 0")
    return float(value)


def _temperature(name: str, value: Any) -> float:
    if not isinstance(value, int | float) or not value > 0:
        raise UserError(f"task.{name}_temperature={value} must be a number above 0")
    return float(value)


def _freeze(model: nn.Module, prefixes: Sequence[str]) -> list[nn.Module]:
    """Stop training parameters by the start of their name; returns the modules that are frozen whole."""
    for prefix in prefixes:
        names = [name for name, _ in model.named_parameters() if f"{name}.".startswith(f"{prefix}.")]
        if not names and prefix.split(".")[0] != "prior":  # a model without feedback has no ξ map to freeze
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"task.freeze names '{prefix}', which the model does not have: start with one of {parts}")
        for name in names:
            model.get_parameter(name).requires_grad_(False)
    return [module for name, module in model.named_modules() if name in prefixes]


class _AllGather(torch.autograd.Function):
    """The tensors of all ranks, of one shape; backward, every rank's gradient of this rank's tensor is added up.

    Torch's own with gradients, which Lightning uses too, is deprecated in favour of a private one.
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
