"""Prepared rows to image tensors: decoded, augmented reproducibly, and never replaced silently."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

from vlabs.data.preprocessing import Preprocessing, decode_image
from vlabs.errors import UserError


class ImageReader:
    """Reads prepared rows with their images as tensors.

    Args:
        rows: prepared rows.
        preprocessing: images to tensors.
        rand_augment: timm's RandAugment string, e.g. `rand-m9-n2`; None for no augmentation.
        seed: of the augmentation, which is a function of (seed, epoch, image id).
        on_bad: `error`, or `skip` to leave out images that cannot be decoded.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        rand_augment: str | None = None,
        seed: int = 0,
        on_bad: str = "error",
    ) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        self.augment = rand_augment_transform(rand_augment, {"img_mean": fill}) if rand_augment else None
        self.seed = seed
        self.on_bad = on_bad

    def read(self, index: int, epoch: int) -> tuple[dict[str, Any], Tensor | None]:
        """The row and its image (3, H, W), normalised; None for an image that is left out.

        Raises:
            UserError: the image cannot be decoded, and bad ones are not to be skipped.
        """
        row = self.rows[index]
        try:
            image = decode_image(row["image"], f"image {row['image_id']}")
        except UserError as error:
            if self.on_bad != "skip":
                raise UserError(f"{error}; prepare the data again, or pass data.on_bad=skip") from None
            print(f"left out: {error}", file=sys.stderr)
            return row, None
        image = self.preprocessing.resize(image)
        if self.augment is not None:
            with _seeded(self.seed, epoch, row["image_id"]):
                image = self.augment(image)
        return row, self.preprocessing.normalize(image)


def random_generator(*key: int) -> np.random.Generator:
    """Random numbers that are a function of some whole numbers, such as (seed, epoch, sample id)."""
    return np.random.default_rng([value % 2**32 for value in key])


@contextmanager
def _seeded(*key: int) -> Iterator[None]:
    """Run timm's augmentation, which draws from the global generators of random and numpy, from a seed of its own."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    seed = int(np.random.SeedSequence([value % 2**32 for value in key]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
