"""vlabs: vision-language fine-tuning with an image encoder that is told what to look for.

import vlabs
model = vlabs.load("outputs/vqa/RUN")
model.answer("street.jpg", ["What's left of it, the red one?"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlabs.predictor import Predictor

__all__ = ["load"]


def load(path: Any, **options: Any) -> Predictor:
    """Load a run folder, checkpoint, export or released file for prediction; see `vlabs.predictor.load`."""
    from vlabs.predictor import load as load_predictor

    return load_predictor(path, **options)
