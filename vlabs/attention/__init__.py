"""Where a model looks: maps, and figures of them."""

MAPS = {
    "fusion": "what the text reads of the image",
    "weights": "what is like the prior ξ",
    "norm": "large output tokens, as in the paper",
    "cls": "what the encoder's [cls] reads in its last block",
    "rollout": "what the encoder's [cls] reads through all blocks",
    "gradient": "what the best answer hangs on: gradient × attention",
}
"""Maps, and what is bright in each."""
