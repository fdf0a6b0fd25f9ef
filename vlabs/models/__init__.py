"""Models: tensors in, tensors out. Importing this package fills the registry that checkpoints are rebuilt from."""

from vlabs.models import absvit, film, fusion, heads, prior, text, topdown, vlm

__all__ = ["absvit", "film", "fusion", "heads", "prior", "text", "topdown", "vlm"]
