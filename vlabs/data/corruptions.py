"""The corruptions of ImageNet-C for any images, applied on the fly by the library `imagecorruptions`."""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import datasets
import numpy as np
from PIL import Image
from torch import Tensor

from vlabs.data.classes import ClassDataset
from vlabs.data.images import seed_generators
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec
from vlabs.errors import UserError

SMALLEST = 32  # pixels; the library refuses smaller images


def library() -> Any:
    """Import the library `imagecorruptions`.

    Raises:
        UserError: it is not installed.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        raise UserError(
            f"corruptions need a library that is not installed ({error}): pip install 'vlabs[robustness]'"
        ) from None
    return imagecorruptions


class CorruptedDataset(ClassDataset):
    """Images of a classification dataset, resized and cropped for the model and then corrupted.

    Args:
        rows, preprocessing, on_bad: as in `ClassDataset`.
        corruption: name of one of ImageNet-C's fifteen corruptions.
        severity: 1 to 5.
        seed: random parts are a function of (seed, corruption, severity, image).

    Raises:
        UserError: the model's input is too small, or the library is missing.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        corruption: str,
        severity: int,
        seed: int = 0,
        on_bad: str = "error",
    ) -> None:
        super().__init__(rows, preprocessing, None, seed, on_bad)
        if preprocessing.image_size < SMALLEST:
            raise UserError(
                f"images of {preprocessing.image_size} px are too small for corruptions, which need {SMALLEST} px"
            )
        library()
        self.corruption = corruption
        self.severity = severity

    def prepare(self, image: Image.Image, row: dict[str, Any], spec: BatchSpec, place: int) -> Tensor:
        """See `ClassDataset`."""
        pixels = np.asarray(self.preprocessing.resize(image))
        name = zlib.crc32(self.corruption.encode())
        seed = seed_generators(self.seed, name, self.severity, row["image_id"])
        # Some corruptions have a generator of their own, and take its seed.
        takes = inspect.signature(library().corruption_dict[self.corruption]).parameters
        own = {"seed": seed} if "seed" in takes else {}
        found = library().corrupt(pixels, severity=self.severity, corruption_name=self.corruption, **own)
        return self.preprocessing.normalize(Image.fromarray(np.asarray(found, dtype=np.uint8)))
