"""Statements with a label: visual entailment (SNLI-VE) and sentences about pairs of images (NLVR2), as METER does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F

from vlabs.data.module import Wants
from vlabs.data.statements import StatementBatch, StatementDataModule
from vlabs.errors import UserError
from vlabs.models.vlm import VLMOutput
from vlabs.tasks.base import Losses
from vlabs.tasks.vision_language import VisionLanguageTask


@dataclass(eq=False, repr=False)
class StatementTask(VisionLanguageTask):
    """Cross-entropy of the label of a statement about one image or a pair; both images are seen under the same ξ.

    Arguments as in `VisionLanguageTask`. Validation logs the accuracy in percent, without statements whose label is not
    public.
    """

    reads = StatementDataModule
    pictures: ClassVar[int] = 1
    """Number of images per statement."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pictures > 1 and self.token_prior_weight:
            # The token loss would treat the two images of a pair as negatives of each other.
            raise UserError(
                f"task.token_prior_weight: the token loss cannot be used with the pairs of images of task={self.name}"
            )

    def wants(self, data: StatementDataModule) -> Wants:
        """See `VisionLanguageTask`.

        Raises:
            UserError: the data have another number of images per statement.
        """
        if data.pictures != self.pictures:
            raise UserError(
                f"task={self.name} has {self.pictures} images per statement, but {data.dir} has {data.pictures}: "
                f"choose its own data, such as data=scenes_{self.name}"
            )
        return super().wants(data)

    def forward(self, batch: StatementBatch) -> VLMOutput:
        """The model's output for a batch, without losses."""
        return self._output(batch, reconstruct=False)

    def sample_ids(self, batch: StatementBatch) -> list[Any]:
        """The statements' ids."""
        return batch.statement_ids

    def losses(self, batch: StatementBatch) -> Losses:
        """Cross-entropy of the labels, and in training the losses of ξ and of the decoders."""
        output = self._output(batch, self.training and self.reconstruction_weight > 0)
        known = batch.labels >= 0
        loss = F.cross_entropy(output.logits[known], batch.labels[known], reduction="sum") / max(1, int(known.sum()))
        others: dict[str, Any] = {}
        if self.training:
            # Both images of a statement have the same id, so that neither is a negative for its ξ.
            ids, tokens = (t.repeat_interleave(self.pictures, dim=0) for t in (batch.image_ids, batch.input_ids))
            others = output.losses | self.prior_losses(output, tokens, ids)
            others |= self.pointing_losses(output, batch.coverage, images=batch.images)
        right = output.logits.argmax(dim=1)[known] == batch.labels[known]
        return Losses({self.name: loss}, len(batch.statement_ids), others, {self.name: right})

    def _output(self, batch: StatementBatch, reconstruct: bool) -> VLMOutput:
        index = batch.image_index if self.pictures > 1 else batch.image_index[:, 0]
        output: VLMOutput = self.model(
            batch.images, batch.input_ids, batch.attention_mask, index, reconstruct=reconstruct
        )
        return output

    def predict_step(self, batch: StatementBatch, batch_idx: int) -> dict[str, Any]:
        """Keys, labels and probabilities (n, labels) of a batch."""
        if not batch.statement_ids:
            return {"keys": [], "labels": [], "probabilities": []}
        probabilities = self.model.head.probabilities(self(batch).logits)  # type: ignore[operator]
        return {"keys": batch.keys, "labels": batch.labels.tolist(), "probabilities": probabilities.tolist()}


@dataclass(eq=False, repr=False)
class SNLIVETask(StatementTask):
    """Visual entailment: does an image entail a hypothesis, contradict it, or neither?"""

    name = "snli_ve"
    monitor = "val/snli_ve_accuracy"


@dataclass(eq=False, repr=False)
class NLVR2Task(StatementTask):
    """Is a sentence true of a pair of images? Both are seen under its ξ; the second has its own token type."""

    name = "nlvr2"
    monitor = "val/nlvr2_accuracy"
    pictures = 2
