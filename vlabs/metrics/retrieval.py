"""Recall of retrieval as METER counts it, from a matrix of scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlabs.errors import UserError

RECALLS = (1, 5, 10)


@dataclass
class Ranks:
    """The ranks of the right answers, counted from 1.

    Attributes:
        image: (M,), for every caption the rank of its image among all images.
        text: (N,), for every image the rank of the first of its captions among all captions.
    """

    image: np.ndarray
    text: np.ndarray

    def metrics(self) -> dict[str, float]:
        """`ir@1`, `ir@5`, `ir@10` and the same as `tr@…` in percent, and the median ranks."""
        values = {}
        for name, ranks in (("ir", self.image), ("tr", self.text)):
            for k in RECALLS:
                values[f"{name}@{k}"] = 100 * float((ranks <= k).mean())
            values[f"{name}_median_rank"] = float(np.median(ranks))
        return values


class Rows(Protocol):
    """A matrix (N, M) that is read by rows: an array, memory-mapped or not, or something that computes its rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N and M."""

    def __getitem__(self, row: int, /) -> np.ndarray:
        """One row, (M,)."""


def retrieval_ranks(scores: Rows, image_of_caption: np.ndarray) -> Ranks:
    """Ranks of the right answers in both directions.

    A caption is a query for images, and only its image is right. An image is a query for captions, and any of its own
    is right: the best of them counts, as in METER. A tie counts against the right answer, so that equal scores are no
    better than chance.

    Args:
        scores: (N, M), images by captions; read row by row, twice.
        image_of_caption: (M,), the row of each caption's image.

    Raises:
        UserError: an image without caption, or scores that are not finite.
    """
    images, captions = scores.shape
    # The captions of every image: sorted by image, and cut where the next one begins.
    own_of_image = np.split(
        np.argsort(image_of_caption, kind="stable"), np.bincount(image_of_caption, minlength=images).cumsum()[:-1]
    )
    own_scores = np.empty(captions)
    for image, own in enumerate(own_of_image):
        if not len(own):
            raise UserError(f"image {image} has no caption, so its rank means nothing")
        row = scores[image]
        if not np.isfinite(row).all():
            raise UserError(f"the scores of image {image} are not all finite numbers: rank again")
        own_scores[own] = row[own]
    better = np.zeros(captions, dtype=np.int64)  # images that score at least as high as the right one, itself included
    text = np.empty(images, dtype=np.int64)
    for image, own in enumerate(own_of_image):
        row = scores[image]
        better += row >= own_scores
        best = row[own].max()
        # Only captions of other images count against it, those of the same score too.
        text[image] = 1 + (row >= best).sum() - (row[own] >= best).sum()
    return Ranks(better, text)


def check_enough_images(images: int, split: str) -> None:
    """Refuse to report a recall that is always 100%.

    Raises:
        UserError: there are fewer images than the largest K of R@K.
    """
    if images < max(RECALLS):
        raise UserError(f"split {split} has {images} images, and R@{max(RECALLS)} needs at least {max(RECALLS)}")
