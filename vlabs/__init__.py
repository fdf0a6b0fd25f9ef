"""vlabs: fine-tuning of vision-language models whose image encoder knows the question.

import vlabs
model = vlabs.load("outputs/vqa/RUN")
model.answer("street.jpg", ["What's left of it, the red one?"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlabs.checkpoints.released import ReleasedClassifier, ReleasedVLM
    from vlabs.models.vlm import VisionLanguageModel
    from vlabs.prediction.predictor import Predictor

__all__ = ["VisionLanguageModel", "load", "load_released"]


def __getattr__(name: str) -> Any:
    # Not imported with the package, because it brings torch and timm with it.
    if name == "VisionLanguageModel":
        from vlabs.models.vlm import VisionLanguageModel

        return VisionLanguageModel
    raise AttributeError(f"module 'vlabs' has no attribute '{name}'")


def load(path: Any, **options: Any) -> Predictor:
    """Load a run, export, released file or `user/name` for prediction; see `vlabs.prediction.predictor.load`."""
    from vlabs.prediction.predictor import load as load_predictor

    return load_predictor(path, **options)


def load_released(source: Any, **options: Any) -> ReleasedClassifier | ReleasedVLM:
    """Load a checkpoint of the released AbSViT code; see `vlabs.checkpoints.released.load_released`."""
    from vlabs.checkpoints.released import load_released as load_file

    return load_file(source, **options)
