"""Image classification, which also pre-trains image encoders."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vlabs.data.classes import ClassBatch, ClassDataModule
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViTClassifier
from vlabs.models.diversity import attention_diversity, is_of_pool
from vlabs.tasks.base import Losses, Task
from vlabs.utils.options import NonNegative


@dataclass(eq=False, repr=False)
class ClassifyTask(Task):
    """Cross-entropy with soft targets, and the variational loss that trains the feedback decoders.

    The released code takes the mean of both passes' losses (`passes=both`), the paper's text the loss of the second
    pass (`passes=second`). Both add 0.1 times the variational loss; without a prior on the output it is the
    reconstruction loss. Logs `val/accuracy` of the second pass, and `val/accuracy_bottom_up`, in percent.

    Args:
        passes: which passes are trained: `both` (mean of their losses, as in the released code) or `second` (as in the
            paper). Without feedback there is only one pass.
        reconstruction_weight: weight of the variational loss of the feedback decoders.
        diversity_weight: weight of the attention diversification loss, of the attention of the last pass; 1 in its
            paper. The attention is then computed explicitly, which takes more time and memory.

    Raises:
        UserError: the model is no classifier, or two options exclude each other.
    """

    name = "classify"
    monitor = "val/accuracy"
    reads = ClassDataModule

    model: AbSViTClassifier
    _: KW_ONLY
    passes: Literal["both", "second"] = "both"
    reconstruction_weight: NonNegative = 0.1
    diversity_weight: NonNegative = 0.0

    def __post_init__(self) -> None:
        model = self.model
        if not isinstance(model, AbSViTClassifier):
            raise UserError("task=classify trains a classifier: leave model out, or pass model=classifier")
        if self.diversity_weight and (self.recompute_activations or self.compile):
            raise UserError(
                "task.diversity_weight reads the attention of every block, which task.recompute_activations and "
                "task.compile do not keep: leave them out"
            )
        if self.diversity_weight and not model.encoder.backbone.last_is_recorded:
            raise UserError(
                f"task.diversity_weight={self.diversity_weight:g} reads attention over the whole image, which no block "
                "of this encoder has: pass 0, or another model/vision"
            )
        super().__post_init__()
        if not model.encoder.reconstructs:
            self.reconstruction_weight = 0.0
        self.criterion = SoftTargetCrossEntropy()
        self.accuracies = nn.ModuleDict({"accuracy": MeanMetric(), "accuracy_bottom_up": MeanMetric()})
        if not model.encoder.needs_prior:
            model.prompt.requires_grad_(False)  # it is not used, and DDP would wait for its gradient
        if self.diversity_weight and not any(map(self._moves_attention, dict(self.named_parameters()))):
            raise UserError(
                f"task.diversity_weight={self.diversity_weight:g} trains attention, which task.freeze freezes: pass 0"
            )

    def _moves_attention(self, name: str) -> bool:
        """Whether a parameter is trained, and attention depends on it."""
        new = ".lora_" in name or is_of_pool(name)
        return self.get_parameter(name).requires_grad and (new or self.lr_group(name) != "head")

    def encoders(self) -> dict[str, nn.Module]:
        """See `Task`; the classifier reads no text."""
        return {"vision": self.model.encoder.vit}

    def lr_group(self, name: str) -> str:
        """The encoder's blocks are `vision`, its linear classifier `head`, ξ and the decoders `feedback`."""
        if name == "model.prompt" or name.startswith(("model.encoder.decoders.", "model.encoder.topdown.")):
            return "feedback"
        head = tuple(f"model.encoder.vit.{part}." for part in ("head", "head_drop", "fc_norm", "attn_pool"))
        return "head" if name.startswith(head) or is_of_pool(name) else "vision"

    def sample_ids(self, batch: ClassBatch) -> list[Any]:
        """The images' ids."""
        return batch.image_ids

    def losses(self, batch: ClassBatch) -> Losses:
        """The loss of one pass or both."""
        record: list[Tensor] | None = [] if self.diversity_weight and self.training else None
        logits, bottom_up, seen = self.model(batch.images, reconstruct=self.reconstruction_weight > 0, record=record)
        loss = self.criterion(logits.float(), batch.targets)
        if self.passes == "both" and bottom_up is not logits:
            loss = (loss + self.criterion(bottom_up.float(), batch.targets)) / 2
        others = {} if seen.reconstruction is None else {"reconstruction": seen.reconstruction}
        if record:
            others["diversity"] = attention_diversity(record)
        return Losses({"class": loss}, len(batch.image_ids), others)

    def validation_step(self, batch: ClassBatch, batch_idx: int) -> None:
        """Add a batch to the accuracies."""
        if not batch.image_ids:
            return
        logits, bottom_up, _ = self.model(batch.images, reconstruct=False)
        loss = self.criterion(logits.float(), batch.targets)
        self.log("val/class_loss", loss, batch_size=len(batch.labels), sync_dist=True)
        for name, scores in (("accuracy", logits), ("accuracy_bottom_up", bottom_up)):
            self.accuracies[name].update(100 * _right(scores, batch.labels))  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies of the epoch."""
        for name, metric in self.accuracies.items():
            self.log(f"val/{name}", metric.compute(), prog_bar=name == "accuracy")  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(dim=1) == labels).float()
