"""Task heads over the fusion's pooled output."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from vlabs.models.registry import register
from vlabs.utils.options import Size


@register
class VQAHead(nn.Module):
    """METER's answer classifier: Linear(d, d), LayerNorm, GELU, Linear(d, answers), with d the pooled width.

    The last bias starts so that every answer has the probability 1 / answers. Training then does not begin with
    learning that most answers are wrong.

    Args:
        in_features: width of the pooled output (twice the fusion width).
        num_answers: size of the answer vocabulary.
        softmax: train one right answer per question with a softmax; else several may be right.
    """

    last_layer = ("head.classifier.3.weight", "head.classifier.3.bias")
    """Of a model with this head, the parameters with a row for each answer."""

    def __init__(self, in_features: int, num_answers: Size, softmax: bool = False) -> None:
        super().__init__()
        self.softmax = softmax
        last = nn.Linear(in_features, num_answers)
        self.classifier = nn.Sequential(
            nn.Linear(in_features, in_features),
            nn.LayerNorm(in_features),
            nn.GELU(),
            last,
        )
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.constant_(layer.bias, -math.log(max(1, num_answers - 1)) if layer is last else 0.0)

    @property
    def num_answers(self) -> int:
        """Size of the answer vocabulary."""
        last = self.classifier[-1]
        assert isinstance(last, nn.Linear)
        return last.out_features

    def forward(self, pooled: Tensor) -> Tensor:
        """Answer logits (n, answers) of pooled features (n, d)."""
        logits: Tensor = self.classifier(pooled)
        return logits

    @property
    def meaning(self) -> str:
        """The meaning of its probabilities."""
        if self.softmax:
            return "the probability that it is this answer and none of the others (softmax): all answers sum to 100%"
        return "each answer's own probability of being right (sigmoid): several may be, so they need not sum to 100%"

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities from logits: of each answer (sigmoid), or over all answers (softmax)."""
        return logits.float().softmax(dim=-1) if self.softmax else logits.float().sigmoid()


@register
class LabelHead(nn.Module):
    """METER's classifier of statements (SNLI-VE, NLVR2): Linear(p · d, d), LayerNorm, GELU, Linear(d, labels).

    Args:
        in_features: d, width of the pooled output of one image (twice the fusion width).
        num_labels: how many there are.
        pictures: p, the images per statement; their pooled outputs are concatenated.
    """

    meaning = "the probability that it is this label and none of the others (softmax): all labels sum to 100%"

    def __init__(self, in_features: int, num_labels: Size, pictures: Size = 1) -> None:
        super().__init__()
        self.pictures = pictures
        self.classifier = nn.Sequential(
            nn.Linear(pictures * in_features, in_features),
            nn.LayerNorm(in_features),
            nn.GELU(),
            nn.Linear(in_features, num_labels),
        )
        for layer in self.classifier:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits of the labels (n, labels) of pooled features (n, p · d)."""
        logits: Tensor = self.classifier(pooled)
        return logits

    @staticmethod
    def probabilities(logits: Tensor) -> Tensor:
        """Probabilities of the labels from logits (softmax)."""
        return logits.float().softmax(dim=-1)


@register
class RankingHead(nn.Module):
    """METER's retrieval heads: the ranking score of a pair, and the image-text matching logits from which it starts.

    Args:
        in_features: width of the pooled output (twice the fusion width).
    """

    def __init__(self, in_features: int) -> None:
        super().__init__()
        self.rank = nn.Linear(in_features, 1)
        self.match = nn.Linear(in_features, 2)
        for layer in (self.rank, self.match):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """The ranking score (n,) of pooled features (n, d)."""
        score: Tensor = self.rank(pooled)[:, 0]
        return score

    def score(self, pooled: Tensor) -> Tensor:
        """The score by which pairs are ranked, (n,), in float32 at any precision."""
        return _in_float32(self.rank, 0, pooled)

    @torch.no_grad()
    def start_from_matching(self) -> None:
        """Set the ranking score to the logit of "they match", as METER does before fine-tuning."""
        self.rank.weight.copy_(self.match.weight[1:])
        self.rank.bias.copy_(self.match.bias[1:])


@register
class PretrainHead(nn.Module):
    """METER's pre-training heads: image-text matching, and masked language modeling.

    Args:
        in_features: width of the pooled output (twice the fusion width).
        vocab_size: tokens of the text encoder.
    """

    def __init__(self, in_features: int, vocab_size: Size) -> None:
        super().__init__()
        width = in_features // 2
        self.match = nn.Linear(in_features, 2)
        self.mlm = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-12), nn.Linear(width, vocab_size)
        )
        for layer in (self.match, *self.mlm):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        """Matching logits (n, 2) of pooled features (n, d): index 1 means that image and text belong together."""
        logits: Tensor = self.match(pooled)
        return logits

    def score(self, pooled: Tensor) -> Tensor:
        """The score by which pairs are ranked without fine-tuning, (n,): the logit of "they match" (METER's zero-shot).

        In float32 at any precision.
        """
        return _in_float32(self.match, 1, pooled)

    def token_logits(self, text_features: Tensor) -> Tensor:
        """Logits of the vocabulary (m, vocabulary) of the fused states (m, D) of masked tokens."""
        logits: Tensor = self.mlm(text_features)
        return logits


def _in_float32(layer: nn.Linear, row: int, pooled: Tensor) -> Tensor:
    """One output of a linear layer, in float32: in bfloat16, thousands of pairs would have the same score."""
    with torch.autocast(pooled.device.type, enabled=False):
        return pooled.float() @ layer.weight[row].float() + layer.bias[row].float()
