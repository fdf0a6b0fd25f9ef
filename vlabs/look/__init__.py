"""Where models of transformers look: CLIP, SigLIP, SigLIP 2, BLIP and ViLT.

from vlabs.look import load
model = load("openai/clip-vit-base-patch32")
model.answer("photo.jpg", ["a cat"])[0].map
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlabs.look.loading import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if name == "load":  # not imported with the package, because it brings torch and transformers with it
        from vlabs.look.loading import load

        return load
    raise AttributeError(f"module 'vlabs.look' has no attribute '{name}'")
