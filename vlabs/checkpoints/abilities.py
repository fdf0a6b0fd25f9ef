"""Abilities of models, by which commands and evaluations choose checkpoints, whatever task they were trained for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import nn

from vlabs.errors import UserError
from vlabs.models.absvit import AbSViTClassifier
from vlabs.models.segmentation import Segmenter
from vlabs.models.vlm import VisionLanguageModel

_VISION_ALONE = ("naming",)
"""Tasks that train only the image encoder."""


class Ability(NamedTuple):
    """Something that some models can do.

    Attributes:
        has: whether a model has the ability.
        lacking: the end of the message for a model that has not: "the model …".
    """

    has: Callable[[nn.Module], bool]
    lacking: str


def pictures_per_text(network: nn.Module) -> int:
    """Number of images per text: the head's attribute `pictures`, or 1."""
    return int(getattr(getattr(network, "head", None), "pictures", 1))


def _head_has(name: str) -> Callable[[nn.Module], bool]:
    return lambda network: hasattr(getattr(network, "head", None), name)


ABILITIES = {
    "texts": Ability(
        lambda network: isinstance(network, VisionLanguageModel),
        "does not read texts with images (task=vqa, retrieval and others train that)",
    ),
    "answers": Ability(
        _head_has("probabilities"),
        "has no head with `probabilities` of answers or labels (task=vqa, snli_ve or nlvr2 trains one)",
    ),
    "one prior": Ability(
        lambda network: isinstance(network, VisionLanguageModel) and not network.vision.reads_words,
        "is steered by all words, not by one ξ that could be replaced",
    ),
    "ranks": Ability(
        _head_has("score"),
        "has no head with a `score` of a text and an image (task=retrieval or pretrain trains one)",
    ),
    "one image": Ability(lambda network: pictures_per_text(network) == 1, "reads a text with two images, not one"),
    "two images": Ability(
        lambda network: pictures_per_text(network) == 2,
        "reads a text with one image, not two (task=nlvr2 trains that)",
    ),
    "classes": Ability(
        lambda network: isinstance(network, AbSViTClassifier),
        "does not classify images (task=classify trains that)",
    ),
    "segments": Ability(
        lambda network: isinstance(network, Segmenter), "does not segment images (task=segment or refer trains that)"
    ),
    "segments classes": Ability(
        lambda network: isinstance(network, Segmenter) and network.text is None,
        "does not segment classes (task=segment trains that)",
    ),
    "segments texts": Ability(
        lambda network: isinstance(network, Segmenter) and network.decoder.num_classes == 2,
        "does not segment what a text names (task=refer trains that)",
    ),
}
"""All abilities, by the names in `Evaluation.needs`."""


def check_able(network: nn.Module, task: str, needs: Iterable[str | Ability], path: Path) -> None:
    """Raise a UserError if a model lacks an ability.

    Args:
        network: the model.
        task: the task that it was trained for.
        needs: names in `ABILITIES`, or other abilities.
        path: path of its checkpoint.
    """
    for need in needs:
        has, lacking = ABILITIES[need] if isinstance(need, str) else need
        if task in _VISION_ALONE and need == "texts":
            lacking = "has only a trained image encoder: start from it with init="
        elif has(network):
            continue
        raise UserError(f"{path} was trained for the task '{task}': the model {lacking}")
