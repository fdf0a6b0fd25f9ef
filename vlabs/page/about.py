"""What the models of the page know, in words: from the card that comes with one, or from what its run says."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlabs.checkpoints.checkpoint import Checkpoint, packaged_starts
from vlabs.errors import printable

_LOCAL = re.compile(r"\[([^]]*)\]\((?!https?://)[^)]*\)")  # a link to a file beside the card
_LIMITS = re.compile(r"^## Limits\n+(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class About:
    """What is to be known of a model before its answers are believed.

    Attributes:
        name: what it was asked for by.
        training: what it was trained on, as of `Checkpoint.training`.
        limits: what its card says that it does not know; empty where there is none.
        card: of the model, Markdown.
    """

    name: str
    training: str
    limits: str
    card: str


def about(checkpoint: Checkpoint, name: str | Path) -> About:
    """What is to be known of a model.

    Args:
        checkpoint: the model.
        name: that was given for it: a run folder, a file, or a name of `packaged_starts`.
    """
    if checkpoint.path in packaged_starts().values():
        card = checkpoint.path.with_suffix(".md").read_text(encoding="utf-8")
    else:
        from vlabs.checkpoints.card import model_card
        from vlabs.checkpoints.share import run_of

        card = model_card(checkpoint, run_of(checkpoint.path), str(name)).text
    card = _LOCAL.sub(r"\1", card)
    limits = _LIMITS.search(card)
    said = " ".join(limits[1].split()) if limits else ""
    return About(printable(str(name)), checkpoint.training, said, card.strip())
