"""Models: tensors in, tensors out. Importing this package fills the registry that checkpoints are rebuilt from."""

from vlabs.models import (
    absvit,
    backbones,
    cross_attention,
    film,
    fusion,
    heads,
    prior,
    segmentation,
    text,
    topdown,
    vlm,
)

__all__ = [
    "absvit",
    "backbones",
    "cross_attention",
    "film",
    "fusion",
    "heads",
    "prior",
    "segmentation",
    "text",
    "topdown",
    "vlm",
]
