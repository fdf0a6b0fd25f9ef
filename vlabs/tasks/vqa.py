"""Visual question answering: METER's soft-score classification over an answer vocabulary."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchmetrics import MeanMetric

from vlabs.data.module import Wants
from vlabs.data.vqa import VQABatch, VQADataModule
from vlabs.errors import UserError
from vlabs.metrics.grounding import list_hat, read_human_maps
from vlabs.models.harmonizer import harmonizer_loss
from vlabs.models.vlm import VLMOutput
from vlabs.tasks.base import Losses
from vlabs.tasks.vision_language import VisionLanguageTask
from vlabs.utils.options import NonNegative, ShareBelowOne
from vlabs.utils.ranks import say


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


@dataclass(frozen=True)
class People:
    """Where people looked, by question id: the mean of the maps of a question.

    Raises:
        UserError: that mean is the same everywhere, or a file cannot be read.
    """

    files: dict[int | str, list[Path]]

    def __call__(self, question_id: int | str) -> np.ndarray | None:
        """The map of a question, (H, W); None if nobody was asked."""
        found = self.files.get(question_id)
        if not found:
            return None
        looked = read_human_maps(question_id, found).mean
        if looked.min() == looked.max():
            names = ", ".join(str(path) for path in found)
            raise UserError(
                f"{names}: the map of question {question_id} is the same everywhere, as if nobody had looked: "
                "download it again, or delete it to train without a map of this question"
            )
        return looked


def _training_ids(data: VQADataModule) -> set[Any]:
    return {one for row in data.rows(data.train_split).select_columns(["question_id"])["question_id"] for one in row}


@dataclass(eq=False, repr=False)
class VQATask(VisionLanguageTask):
    """VQA fine-tuning. Logs `val/vqa_accuracy`, also per answer type.

    This is the official accuracy in percent, because an answer's target is its official accuracy.

    Args:
        label_smoothing: share of the target that is spread over all answers, for a head with one right answer
            (`model.head.softmax=true`).
        human_maps: folder of VQA-HAT's maps of training questions: the harmonizer loss draws the gradient of the right
            answers' scores by the pixels to where people looked. A step then has a second backward pass.
        harmonizer_weight: weight of the harmonizer loss.
    """

    name = "vqa"
    monitor = "val/vqa_accuracy"
    reads = VQADataModule

    _: KW_ONLY
    label_smoothing: ShareBelowOne = 0.0
    human_maps: str | None = None
    harmonizer_weight: NonNegative = 1.0

    def __post_init__(self) -> None:
        if (
            self.human_maps is not None
            and self.harmonizer_weight
            and (self.recompute_activations or self.compile or self.store)
        ):
            raise UserError(
                "task.human_maps needs gradients of gradients by the pixels, which task.recompute_activations, "
                "task.compile and task.store do not have: leave them out"
            )
        super().__post_init__()
        if self.label_smoothing and not self.model.head.softmax:
            raise UserError(
                "task.label_smoothing needs a head with one right answer: pass model.head.softmax=true, or leave it out"
            )
        if self.human_maps is None and self.harmonizer_weight not in (0, VQATask.harmonizer_weight):
            self.without_effect.append(
                f"task.harmonizer_weight={self.harmonizer_weight:g} has no effect: there are no maps (task.human_maps)"
            )
        if not self.harmonizer_weight:
            self.human_maps = None
        self.accuracy = MeanMetric()
        # A list, because answer types may have names that a ModuleDict does not allow.
        self.answer_types: list[str] = []
        self.accuracies = torch.nn.ModuleList()

    def wants(self, data: VQADataModule) -> Wants:
        """See `VisionLanguageTask`; also where people looked, for the harmonizer loss.

        Raises:
            UserError: the images and the maps do not go together, or no training question has a map.
        """
        wants = super().wants(data)
        if self.human_maps is None:
            return wants
        try:
            files = list_hat(self.human_maps)
        except UserError as error:
            raise UserError(f"task.human_maps={self.human_maps}: {error}") from None
        if data.rand_augment is not None or data.questions_per_image > 1 or data.blind:
            raise UserError(
                f"task.human_maps={self.human_maps} needs images as they are, one for each question: pass "
                "data.rand_augment=null data.questions_per_image=1 data.blind=false"
            )
        if not _training_ids(data) & files.keys():
            raise UserError(
                f"task.human_maps={self.human_maps} has no map of a training question of {data.dir}: VQA-HAT numbers "
                "questions as VQA v1 does; vlabs prepare vqav2 reads the files of VQA v1 too"
            )
        return replace(wants, human_map=People(files))

    def setup(self, stage: str) -> None:
        """See `VisionLanguageTask`; also make an accuracy for each answer type of the validation split."""
        super().setup(stage)
        if stage == "fit" and self.human_maps is not None:
            ids = _training_ids(self.trainer.datamodule)  # type: ignore[attr-defined]
            known = len(ids & list_hat(self.human_maps).keys())
            say(f"harmonizer loss: people looked for {known:,} of {len(ids):,} training questions")
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
        harmonizes = self.training and batch.human is not None
        # Fused kernels have no gradient of their gradient.
        with sdpa_kernel(SDPBackend.MATH) if harmonizes else nullcontext():
            output = self.model(
                batch.images.requires_grad_() if harmonizes else batch.images,
                batch.input_ids,
                batch.attention_mask,
                batch.image_index,
                reconstruct=self.reconstruction_weight > 0,
            )
        others = output.losses | self.prior_losses(output, batch.input_ids, batch.image_ids)
        others |= self.pointing_losses(output, batch.coverage, images=batch.images)
        if harmonizes:
            assert batch.human is not None
            right = (output.logits.float() * batch.targets).sum()
            (by_pixels,) = torch.autograd.grad(right, batch.images, create_graph=True)
            own = by_pixels if batch.image_index is None else by_pixels[batch.image_index]
            others["harmonizer"] = harmonizer_loss(own.mean(dim=1).float(), batch.human)
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
