"""Models: tensors in, tensors out. Importing this package fills the registry that checkpoints are rebuilt from."""

from vlabs.models import absvit, backbones, fusion, heads, prior, segmentation, text, topdown, variants, vlm

__all__ = ["absvit", "backbones", "fusion", "heads", "prior", "segmentation", "text", "topdown", "variants", "vlm"]
