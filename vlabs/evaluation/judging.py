"""What a model says of a text, and how right it is: its answer, its label, or the rank of the text's own image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import torch
from torch import Tensor

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.captions import CaptionDataModule
from vlabs.data.images import ImageReader
from vlabs.data.module import PreparedDataModule
from vlabs.data.statements import StatementDataModule
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.metrics.vqa import answer_accuracy
from vlabs.models.vlm import VLMOutput

OTHERS = 15
"""Number of whole images, besides its own, with which a caption is scored."""


class Asked(NamedTuple):
    """A text of prepared rows: row, position in the row, id, text, and the ids of its instances, if any."""

    row: int
    position: int
    text_id: int | str
    text: str
    targets: list[int]


class Scores:
    """Scores answers to questions of prepared rows.

    Args:
        rows: prepared rows, with the answers that people gave. A vocabulary is not needed: data to evaluate alone have
            none.
    """

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows, self.answers = rows, rows.select_columns(["answers"])

    def of(self, asked: Asked, answer: str) -> float:
        """The official accuracy of an answer, in percent; 0 if nobody answered the question."""
        answers = self.answers[asked.row]["answers"][asked.position]
        return 100 * answer_accuracy(answer, answers) if answers else 0.0


class Judge(Protocol):
    """Says how right a model is.

    Attributes:
        unit: what is judged, in the plural.
    """

    unit: str

    def right(self, items: Sequence[Asked], output: VLMOutput, ids: Tensor, mask: Tensor) -> list[float]:
        """How right the model is about n texts, which are all about the same images, in percent.

        Args:
            items: the texts.
            output: the model's output for them.
            ids, mask: (n, T), what it was given as texts.
        """


class _Answers:
    unit = "questions"

    def __init__(self, checkpoint: Checkpoint, rows: datasets.Dataset) -> None:
        self.names, self.scores = checkpoint.preprocessing.names, Scores(rows)

    def right(self, items: Sequence[Asked], output: VLMOutput, ids: Tensor, mask: Tensor) -> list[float]:
        """See `Judge`: the official accuracy of the best answer."""
        best = output.logits.argmax(dim=1).tolist()
        return [self.scores.of(item, self.names[n]) for item, n in zip(items, best, strict=True)]


class _Labels:
    unit = "statements"

    def __init__(self, rows: datasets.Dataset) -> None:
        self.labels = rows.select_columns(["label"])

    def right(self, items: Sequence[Asked], output: VLMOutput, ids: Tensor, mask: Tensor) -> list[float]:
        """See `Judge`: whether the best label is the right one."""
        best = output.logits.argmax(dim=1).tolist()
        labels = self.labels[items[0].row]["label"]
        return [100.0 * (labels[item.position] == n) for item, n in zip(items, best, strict=True)]


class _Ranks:
    unit = "captions"

    def __init__(self, checkpoint: Checkpoint, rows: datasets.Dataset) -> None:
        self.model = checkpoint.model
        self.rows = np.linspace(0, len(rows) - 1, num=min(OTHERS + 1, len(rows)), dtype=int).tolist()
        reader = ImageReader(rows, checkpoint.preprocessing)
        images = torch.cat([reader.read(row, 0)[1] for row in self.rows])
        with torch.no_grad():
            self.others = self.model.vision.encode(images.to(next(self.model.parameters())))

    def right(self, items: Sequence[Asked], output: VLMOutput, ids: Tensor, mask: Tensor) -> list[float]:
        """See `Judge`: whether it scores higher with its own image than with `OTHERS` others."""
        others = torch.tensor([n for n, row in enumerate(self.rows) if row != items[0].row][:OTHERS], device=ids.device)
        texts, which = torch.cat([ids, mask], dim=1).unique(dim=0, return_inverse=True)
        given = texts.chunk(2, dim=1)
        pairs = torch.cartesian_prod(torch.arange(len(texts), device=ids.device), others)
        beside = self.model(self.others, *given, pairs[:, 1], pairs[:, 0]).pooled_features
        score = self.model.head.score  # type: ignore[union-attr]
        best = score(beside).unflatten(0, (len(texts), -1)).max(dim=1).values  # type: ignore[operator]
        return (100.0 * (score(output.pooled_features) > best[which])).tolist()  # type: ignore[operator]


def judge_of(checkpoint: Checkpoint, data: PreparedDataModule, rows: datasets.Dataset, split: str) -> Judge:
    """The judge of what a model says of the texts of prepared rows.

    Args:
        checkpoint: the model.
        data: the data module.
        rows: the rows of the split, as they are judged.
        split: its name, for messages.

    Raises:
        UserError: the data are of another kind than the model, or what is right is kept back.
    """
    head, where = checkpoint.model.head, f"{data.dir}, split {split}"
    if isinstance(data, StatementDataModule) and hasattr(head, "probabilities"):
        names = checkpoint.preprocessing.names
        if tuple(data.labels) == tuple(names) and data.pictures == getattr(head, "pictures", 1):
            if not _any(rows, "label", lambda label: label >= 0):
                raise UserError(f"{where}: the labels are kept back, so nothing is right or wrong")
            return _Labels(rows)
    elif isinstance(data, VQADataModule) and hasattr(head, "probabilities") and not hasattr(head, "pictures"):
        if not _any(rows, "answers", bool):
            raise UserError(f"{where}: the answers are kept back, so nothing is right or wrong")
        return _Answers(checkpoint, rows)
    elif isinstance(data, CaptionDataModule) and hasattr(head, "score"):
        if len(rows) < 2:
            raise UserError(f"{where}: a caption is scored with its own image and others, but there is one image")
        return _Ranks(checkpoint, rows)
    raise UserError(f"{data.dir} holds {data.holds}, but {checkpoint.path} is a model of task={checkpoint.task}: pass "
                    "data.dir=FOLDER of its own kind")  # fmt: skip


def known_judge(checkpoint: Checkpoint, data: PreparedDataModule, rows: datasets.Dataset) -> Judge | None:
    """As `judge_of`, for answers and labels; None where it is not known what is right, or nothing is answered."""
    if isinstance(data, CaptionDataModule):
        return None
    try:
        return judge_of(checkpoint, data, rows, "")
    except UserError:
        return None


def _any(rows: datasets.Dataset, column: str, known: Callable[[Any], bool]) -> bool:
    return any(known(value) for row in rows.select_columns([column]) for value in row[column])
