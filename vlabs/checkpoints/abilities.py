"""What a model can do, whatever task it was trained for: what commands and evaluations ask of a checkpoint."""

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
"""Tasks that leave everything but the image encoder untrained."""


class Ability(NamedTuple):
    """Something that some models can do.

    Attributes:
        has: whether a model can.
        lacking: what is said of one that cannot: "the model …".
    """

    has: Callable[[nn.Module], bool]
    lacking: str


def pictures_per_text(network: nn.Module) -> int:
    """How many images a text is about together: what a head says by `pictures`, and 1 where it says nothing."""
    return int(getattr(getattr(network, "head", None), "pictures", 1))


def _head_has(name: str) -> Callable[[nn.Module], bool]:
    return lambda network: hasattr(getattr(network, "head", None), name)


ABILITIES = {
    "texts": Ability(
        lambda network: isinstance(network, VisionLanguageModel),
        "joins no texts with images (task=vqa, retrieval and others train that)",
    ),
    "answers": Ability(
        _head_has("probabilities"),
        "has no head with `probabilities` of answers or labels (task=vqa, snli_ve or nlvr2 trains one)",
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
        "classifies no images (task=classify trains that)",
    ),
    "segments": Ability(
        lambda network: isinstance(network, Segmenter), "segments no images (task=segment or refer trains that)"
    ),
    "segments classes": Ability(
        lambda network: isinstance(network, Segmenter) and network.text is None,
        "segments no classes of images (task=segment trains that)",
    ),
    "segments texts": Ability(
        lambda network: isinstance(network, Segmenter) and network.decoder.num_classes == 2,
        "segments nothing that a text names (task=refer trains that)",
    ),
}
"""By the names that evaluations ask for them."""


def check_able(network: nn.Module, task: str, needs: Iterable[str | Ability], path: Path) -> None:
    """Raise a UserError if a model lacks an ability.

    Args:
        task: what it was trained for.
        needs: of `ABILITIES`, or others.
        path: of its checkpoint.
    """
    for need in needs:
        has, lacking = ABILITIES[need] if isinstance(need, str) else need
        if task in _VISION_ALONE and need == "texts":
            lacking = "has a trained image encoder and no more: start from it with init="
        elif has(network):
            continue
        raise UserError(f"{path} was trained for the task '{task}': the model {lacking}")
