"""Visual question answering: METER's soft-score classification over an answer vocabulary."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric

from vlabs.data.vqa import VQABatch, VQADataModule
from vlabs.errors import UserError
from vlabs.models.vlm import VLMOutput
from vlabs.tasks.base import Losses
from vlabs.tasks.vision_language import VisionLanguageTask
from vlabs.utils.options import ShareBelowOne


class Prediction(NamedTuple):
    """One answered question: its id, the answer in words, and its probability."""

    question_id: int | str
    answer: str
    probability: float


def vqa_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """METER's loss: binary cross-entropy on soft scores, mean over questions, sum over answers.

    Args:
        logits, targets: (n, answers); targets in [0, 1].

    Raises:
        UserError: model and data have different numbers of answers.
    """
    _check_answers(logits, targets)
    return F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]


def single_answer_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the one right answer, mean over the questions that have one in the vocabulary.

    Args:
        logits, targets: (n, answers); targets in [0, 1]; if several are above 0, each counts by its share.
        label_smoothing: share of the target that is spread over all answers.

    Raises:
        UserError: as `vqa_loss`.
    """
    _check_answers(logits, targets)
    known = targets.sum(dim=1, keepdim=True)
    losses = F.cross_entropy(logits, targets / known.clamp(min=1e-6), reduction="none", label_smoothing=label_smoothing)
    is_known = (known[:, 0] > 0).to(losses.dtype)
    return (losses * is_known).sum() / is_known.sum().clamp(min=1)


def _check_answers(logits: Tensor, targets: Tensor) -> None:
    if logits.shape != targets.shape:
        raise UserError(
            f"model.head.num_answers={logits.shape[1]}: the data have {targets.shape[1]}; pass null for theirs"
        )


class VQATask(VisionLanguageTask):
    """VQA fine-tuning. Logs `val/vqa_accuracy`, also per answer type.

    This is the official accuracy in percent, because an answer's target is its official accuracy.

    Args:
        args, kwargs: of `VisionLanguageTask`.
        label_smoothing: share of the target that is spread over all answers, for a head with one right answer
            (`model.head.softmax=true`).
    """

    name = "vqa"
    monitor = "val/vqa_accuracy"
    reads = VQADataModule

    def __init__(self, *args: Any, label_smoothing: ShareBelowOne = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if label_smoothing and not self.model.head.softmax:
            raise UserError(
                "task.label_smoothing needs a head with one right answer: pass model.head.softmax=true, or leave it out"
            )
        self.label_smoothing = label_smoothing
        self.accuracy = MeanMetric()
        # A list, because answer types may have names that a ModuleDict does not allow.
        self.answer_types: list[str] = []
        self.accuracies = torch.nn.ModuleList()

    def setup(self, stage: str) -> None:
        """See `VisionLanguageTask`; also make an accuracy for each answer type of the validation split."""
        super().setup(stage)
        if stage in ("fit", "validate"):
            data: VQADataModule = self.trainer.datamodule  # type: ignore[attr-defined]
            for answer_type in data.answer_types(data.val_split):
                if answer_type not in self.answer_types:
                    self.answer_types.append(answer_type)
                    self.accuracies.append(MeanMetric())

    def forward(self, batch: VQABatch, read_image: bool = False) -> VLMOutput:
        """The model's output for a batch, without losses."""
        output: VLMOutput = self.model(
            batch.images, batch.input_ids, batch.attention_mask, batch.image_index, read_image=read_image
        )
        return output

    def sample_ids(self, batch: VQABatch) -> list[Any]:
        """The questions' ids."""
        return batch.question_ids

    def losses(self, batch: VQABatch) -> Losses:
        """The loss of the answers, and the losses of ξ and of the decoders."""
        output = self.model(
            batch.images,
            batch.input_ids,
            batch.attention_mask,
            batch.image_index,
            reconstruct=self.reconstruction_weight > 0,
        )
        others = output.losses | self.prior_losses(output, batch.input_ids, batch.image_ids)
        others |= self.pointing_losses(output, batch.coverage, images=batch.images)
        return Losses({"vqa": self.answer_loss(output.logits, batch.targets)}, len(batch.question_ids), others)

    def answer_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of answer logits (n, answers) for soft scores (n, answers)."""
        if self.model.head.softmax:
            return single_answer_loss(logits, targets, self.label_smoothing if self.training else 0.0)
        return vqa_loss(logits, targets)

    def validation_step(self, batch: VQABatch, batch_idx: int) -> None:
        """Add a batch to the accuracies."""
        if not batch.question_ids:
            return
        output = self(batch)
        self.log_dead(output)
        scores = batch.targets.gather(1, output.logits.argmax(dim=1, keepdim=True))[:, 0] * 100
        self.accuracy.update(scores)
        for answer_type, metric in zip(self.answer_types, self.accuracies, strict=True):
            chosen = torch.tensor([t == answer_type for t in batch.answer_types], device=scores.device)
            if chosen.any():
                metric.update(scores[chosen])  # type: ignore[operator]
        loss = self.answer_loss(output.logits.float(), batch.targets)
        self.log("val/vqa_loss", loss, batch_size=len(scores), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the accuracies of the epoch."""
        self.log("val/vqa_accuracy", self.accuracy.compute(), prog_bar=True)
        self.accuracy.reset()
        for answer_type, metric in zip(self.answer_types, self.accuracies, strict=True):
            self.log(f"val/vqa_accuracy/{answer_type}", metric.compute())  # type: ignore[operator]
            metric.reset()  # type: ignore[operator]

    def predict_step(self, batch: VQABatch, batch_idx: int) -> list[Prediction]:
        """The best answer to every question of a batch."""
        if not batch.question_ids:
            return []
        answers = self.preprocessing.names
        if not answers:
            raise UserError("the model has no answer vocabulary")
        best, ids = self.model.head.probabilities(self(batch).logits).max(dim=1)  # type: ignore[operator]
        return [
            Prediction(question_id, answers[answer_id], probability)
            for question_id, answer_id, probability in zip(batch.question_ids, ids.tolist(), best.tolist(), strict=True)
        ]
