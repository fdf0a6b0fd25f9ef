"""Where a model looks: maps, and figures of them."""

from typing import Literal

from vlabs.utils.options import Some

MapName = Literal[
    "fusion", "weights", "norm", "cls", "rollout", "gradient", "relevance", "normgrad", "contrast"
]  # fmt: skip
Maps = Some[MapName]
"""Different maps, at least one, as an option."""
MAPS: dict[str, str] = {
    "fusion": "what the text reads of the image",
    "weights": "what is similar to the prior ξ",
    "norm": "large output tokens, as in the paper",
    "cls": "what the encoder's [cls] reads in its last block",
    "rollout": "what the encoder's [cls] reads through all blocks",
    "gradient": "what the best answer depends on: gradient × attention",
    "relevance": "what the best answer depends on, followed back through attention",
    "normgrad": "tokens whose change would change the best answer most",
    "contrast": "what the text reads of the image and an empty text does not",
}
"""The maps, and what is bright in each."""

LOOK_MAPS = {name: MAPS[name] for name in ("relevance", "normgrad")} | {
    "similarity": "patches that are similar to the text",
}
"""The maps of models of transformers, see `vlabs.look`, and what is bright in each."""

VIEWS = {
    "crop": "the part of the image that the map points at, enlarged (ViCrop)",
    "masked": "the image with the mean color instead of the half where the map is lowest (AGLA)",
}
"""The views of a second look, see `vlabs.prediction.second_look`."""
