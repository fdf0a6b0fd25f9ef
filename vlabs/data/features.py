"""The columns of prepared rows, by kind of data, as `datasets` stores them."""

from __future__ import annotations

from typing import Any

import datasets


def _text_features(item: str, more: dict[str, Any], pictures: int = 1) -> datasets.Features:
    """Columns of texts about one image, or about several; `image_2` and `region_2` belong to the second."""
    others = range(2, pictures + 1)
    binary, whole = datasets.Value("binary"), datasets.Value("int64")
    return datasets.Features(
        {
            "image_id": whole,  # id of the image or the pair
            "image": binary,  # the file's bytes, unchanged
            **{f"image_{n}": binary for n in others},
            f"{item}_id": datasets.List(whole),  # texts where the dataset's own are
            item: datasets.List(datasets.Value("string")),
            **{name: datasets.List(feature) for name, feature in more.items()},
            # COCO annotation ids of the instances that a text is about, in all its images; empty where unknown.
            "target_instances": datasets.List(datasets.List(whole)),
            # The part of the image that a text is about: a PNG over the whole image, bright inside; empty if unknown.
            "region": datasets.List(binary),
            **{f"region_{n}": datasets.List(binary) for n in others},
        }
    )


VQA_FEATURES = _text_features(
    "question",
    {
        # Ten human answers per question, unchanged; empty in splits whose answers are not public.
        "answers": datasets.List(datasets.Value("string")),
        # The answers of the vocabulary with an official accuracy above 0, and that accuracy, in [0, 1].
        "answer_ids": datasets.List(datasets.Value("int32")),
        "answer_scores": datasets.List(datasets.Value("float32")),
        "answer_type": datasets.Value("string"),
        "question_type": datasets.Value("string"),
    },
)

CAPTION_FEATURES = _text_features("caption", {})


def statement_features(pictures: int) -> datasets.Features:
    """Columns of statements about one image, or about a pair."""
    # `key` is the dataset's own id: pairID of SNLI-VE, identifier of NLVR2. `label` is the position in labels.json, or
    # -1 if it is not public.
    more = {"key": datasets.Value("string"), "label": datasets.Value("int32")}
    return _text_features("statement", more, pictures)


CLASS_FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("int64"),
        # The image is `size` bytes at `offset` of the file `path`, or in `image`.
        "path": datasets.Value("string"),
        "offset": datasets.Value("int64"),
        "size": datasets.Value("int64"),
        "image": datasets.Value("binary"),
        # Position of the class in classes.json.
        "label": datasets.Value("int64"),
    }
)

MASK_FEATURES = datasets.Features(
    {
        "image_id": datasets.Value("int64"),
        "name": datasets.Value("string"),  # the dataset's name of the image
        "image": datasets.Value("binary"),  # the file's bytes, unchanged
        # A PNG of the image's size with the class of each pixel, 255 where none counts (with more than 254 classes, 16
        # bits and 65535); empty if it is not public.
        "mask": datasets.Value("binary"),
    }
)
