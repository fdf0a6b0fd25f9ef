"""A training step of VQA by the released arithmetic: every question with both of its passes, text padded to 50.

It shares no code with vlabs. The losses are those that vlabs trains with, so that both sides learn the same: the
answers' binary cross-entropy, the reconstruction loss, and the prior loss in CLIP's form.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from released_ranking import ReleasedRanking
from torch import Tensor

from vlabs.models.vlm import VisionLanguageModel

QUESTION_LENGTH = 50
TEMPERATURE = 0.07


class ReleasedTraining(ReleasedRanking):
    """The loss of n questions by the released arithmetic, with weights of its own that start as the model's.

    Args:
        model: with a VQA head and without dropout.
        alpha, topdown, prior_token: as in `ReleasedRanking`.
        reconstruction_weight, prior_weight: of the losses.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        alpha: float,
        topdown: str,
        prior_token: str,
        reconstruction_weight: float = 0.3,
        prior_weight: float = 0.1,
    ) -> None:
        super().__init__(model, alpha, topdown, prior_token, QUESTION_LENGTH)
        self.weights = {
            name: value.clone().requires_grad_(value.is_floating_point()) for name, value in self.weights.items()
        }
        device = self.weights["vision.vit.cls_token"].device
        self.log_scale = torch.tensor(math.log(1 / TEMPERATURE), requires_grad=True, device=device)
        self.reconstruction_weight = reconstruction_weight
        self.prior_weight = prior_weight

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [*(value for value in self.weights.values() if value.requires_grad), self.log_scale]

    def loss(self, images: Tensor, ids: Tensor, mask: Tensor, image_ids: Tensor, targets: Tensor) -> Tensor:
        """The loss of n questions.

        Args:
            images: (n, 3, H, W), one for every question.
            ids, mask: (n, T).
            image_ids: (n,), the same number for the same image.
            targets: (n, answers), in [0, 1].
        """
        text = self.encode_text(ids, mask)
        signals = self.feedback(self.bottom_up(images), self.prior(text, ids))
        tokens = self.second_pass(images, signals)
        hidden = self.linear(self.fuse(text, mask, tokens), "head.classifier.0")
        hidden = F.gelu(self.norm(hidden, "head.classifier.1", 1e-5))
        logits = self.linear(hidden, "head.classifier.3")
        answers = F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
        aligned = self.prior_loss(self.prior(text.detach(), ids), tokens[:, 0], image_ids)
        return answers + self.reconstruction_weight * self.reconstruction + self.prior_weight * aligned

    def prior_loss(self, prior: Tensor, seen: Tensor, image_ids: Tensor) -> Tensor:
        """Each ξ against all outputs and each output against all ξ; outputs of the same image are left out."""
        prior, seen = F.normalize(prior.float(), dim=1), F.normalize(seen.float(), dim=1)
        logits = self.log_scale.exp().clamp(max=100) * prior @ seen.T
        total = torch.zeros((), device=logits.device)
        for row in range(len(logits)):
            keep = [n for n in range(len(logits)) if n == row or image_ids[n] != image_ids[row]]
            for scores in (logits[row, keep], logits[keep, row]):
                total = total - scores.log_softmax(dim=0)[keep.index(row)] / (2 * len(logits))
        return total
