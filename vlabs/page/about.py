"""Information about the page's models: from the card that comes with a model, or from its run."""

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
    """What people should know about a model before they trust its answers.

    Attributes:
        name: the name that was given for it.
        training: what it was trained on, see `Checkpoint.training`.
        limits: the limits in its card; empty if the card has none.
        card: the model card, as Markdown.
    """

    name: str
    training: str
    limits: str
    card: str


def about(checkpoint: Checkpoint, name: str | Path) -> About:
    """Collect the information about a model.

    Args:
        checkpoint: the model.
        name: the name that was given for it: a run folder, a file, or a name in `packaged_starts`.
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
