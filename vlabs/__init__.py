"""vlabs: fine-tuning of vision-language models whose image encoder knows the question.

import vlabs
model = vlabs.load("outputs/vqa/RUN")
model.answer("street.jpg", ["What's left of it, the red one?"])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlabs.checkpoints.released import load_released
    from vlabs.models.vlm import VisionLanguageModel
    from vlabs.prediction.predictor import load

__all__ = ["VisionLanguageModel", "load", "load_released"]
_FROM = ("vlabs.models.vlm", "vlabs.prediction.predictor", "vlabs.checkpoints.released")


def __getattr__(name: str) -> Any:
    # Not imported with the package, because they bring torch and timm with them.
    for known, module in zip(__all__, _FROM, strict=True):
        if name == known:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'vlabs' has no attribute '{name}'")
