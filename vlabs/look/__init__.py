"""Where models of transformers look: CLIP, SigLIP, SigLIP 2, BLIP and ViLT.

from vlabs.look import load
model = load("openai/clip-vit-base-patch32")
model.answer("photo.jpg", ["a cat"])[0].map
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlabs.look.looker import Looker

__all__ = ["load"]


def load(name_or_path: str, **options: Any) -> Looker:
    """Load a model of transformers by hub name or from a local folder; see `vlabs.look.loading.load`."""
    from vlabs.look.loading import load as load_model  # here, because it brings torch and transformers with it

    return load_model(name_or_path, **options)
