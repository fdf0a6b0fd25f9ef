"""The rows of prepared data, by kind, as `datasets` stores them."""

from __future__ import annotations

from typing import Any

import datasets


def _text_features(item: str, more: dict[str, Any], pictures: int = 1) -> datasets.Features:
    """Rows of texts about one image, or about several: then `image_2` and `region_2` are of the second."""
    others = range(2, pictures + 1)
    binary, whole = datasets.Value("binary"), datasets.Value("int64")
    return datasets.Features(
        {
            "image_id": whole,  # of the image or the pair
            "image": binary,  # the file's bytes, unchanged
            **{f"image_{n}": binary for n in others},
            f"{item}_id": datasets.List(whole),  # texts where the dataset's own are
            item: datasets.List(datasets.Value("string")),
            **{name: datasets.List(feature) for name, feature in more.items()},
            # COCO instance annotation ids that a text is about, of all its images; empty where unknown.
            "target_instances": datasets.List(datasets.List(whole)),
            # What part of the image: a PNG of all of it, white (or bright) where; empty bytes where unknown.
            "region": datasets.List(binary),
            **{f"region_{n}": datasets.List(binary) for n in others},
        }
    )


VQA_FEATURES = _text_features(
    "question",
    {
        # Ten human answers a question as they were written; empty in splits whose answers are kept back.
        "answers": datasets.List(datasets.Value("string")),
        # The vocabulary's answers that score above 0, and the official accuracy of each, in [0, 1].
        "answer_ids": datasets.List(datasets.Value("int32")),
        "answer_scores": datasets.List(datasets.Value("float32")),
        "answer_type": datasets.Value("string"),
        "question_type": datasets.Value("string"),
    },
)

CAPTION_FEATURES = _text_features("caption", {})


def statement_features(pictures: int) -> datasets.Features:
    """Rows of statements about one image, or about a pair."""
    # `key` is what the dataset calls it: pairID of SNLI-VE, identifier of NLVR2. `label` is the position in
    # labels.json; -1 where it is kept back.
    more = {"key": datasets.Value("string"), "label": datasets.Value("int32")}
    return _text_features("statement", more, pictures)


CLASS_FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("int64"),
        # Where the image's file is: all or part of `path`; or its bytes.
        "path": datasets.Value("string"),
        "offset": datasets.Value("int64"),
        "size": datasets.Value("int64"),
        "image": datasets.Value("binary"),
        # The position of its class in classes.json.
        "label": datasets.Value("int64"),
    }
)

MASK_FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("int64"),
        "name": datasets.Value("string"),  # of the image, as the dataset calls it
        "image": datasets.Value("binary"),  # the file's bytes, unchanged
        # A PNG of the image's size with the class of every pixel, 255 where none counts (with more than 254 classes
        # of 16 bits, and 65535); empty where it is kept back.
        "mask": datasets.Value("binary"),
    }
)
