"""Pictures that somebody else gives: bounded before they are decoded, of known formats only."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from vlabs.errors import UserError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        megabytes: of a picture's file.
        megapixels: of a picture, whatever its file takes.
        questions: at a time.
        characters: of a text.

    Raises:
        UserError: one of them is not above 0.
    """

    megabytes: float = 10
    megapixels: float = 30
    questions: int = 8
    characters: int = 500

    def __post_init__(self) -> None:
        for name in ("megabytes", "megapixels"):
            if not getattr(self, name) > 0:
                raise UserError(f"--max-{name} must be above 0, not {getattr(self, name)}")


def read_upload(path: str | Path, limits: Limits) -> Image.Image:
    """Decode a picture to RGB, turned as its camera says; of an animation the first frame.

    Raises:
        UserError: it is too large, is gone, or is no whole picture of a known format.
    """
    try:
        size = os.path.getsize(path)
    except OSError:
        raise UserError("the picture is no longer here: load it again") from None
    if size > limits.megabytes * 2**20:
        raise UserError(f"the file has {size / 2**20:.1f} MB, and {limits.megabytes:g} are allowed: make it smaller")
    known = ", ".join(FORMATS)
    try:
        with warnings.catch_warnings(), Image.open(path, formats=FORMATS) as image:
            # Only the header is read until here, so a small file of very many pixels costs nothing.
            warnings.simplefilter("ignore")
            pixels = image.width * image.height
            if pixels > limits.megapixels * 1e6:
                raise UserError(
                    f"the picture has {image.width} x {image.height} pixels, and {limits.megapixels:g} million are"
                    " allowed: make it smaller"
                )
            return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise UserError(f"the picture has more than {limits.megapixels:g} million pixels: make it smaller") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"the file is no picture that is known here: give one of {known}") from None
    except UserError:
        raise
    except Exception:  # Pillow's decoders raise whatever a damaged file leads them to
        raise UserError(f"the file is no whole picture: give one of {known}") from None
