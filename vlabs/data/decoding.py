"""Pictures are opened here and nowhere else: of known formats, and of no more pixels than memory is meant for."""

from __future__ import annotations

import functools
import io
import math
import os
import warnings

from PIL import Image, UnidentifiedImageError

from vlabs.errors import UserError, one_line

LIMIT = "VLABS_MAX_MEGAPIXELS"
"""The environment variable that says how many million pixels a picture may have."""
_MEGAPIXELS = 120.0  # up to a gigabyte where a picture is converted; a phone's largest usual picture has 108
_SCANS = 200  # of a progressive JPEG, which has some ten; each is as much work as the whole picture

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # there is a limit here

# What Pillow decodes itself or by a library. Of the others it starts programs (EPS), asks the network's plug-ins, or
# keeps another picture inside whose size it does not say.
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip


@functools.cache
def known_formats() -> tuple[str, ...]:
    """The formats that are decoded, of those that this Pillow knows."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def known_suffixes() -> frozenset[str]:
    """How the names of pictures that are decoded end, in lower case and with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)


def open_picture(content: bytes, at_least: int | None = None) -> Image.Image:
    """Read the header of a picture; its pixels are decoded when they are first read.

    Args:
        at_least: see `vlabs.data.preprocessing.decode_image`.

    Raises:
        UnidentifiedImageError: it is no picture of a known format.
        ValueError: it has too many pixels, or its header is damaged. Each says so in one line.
    """
    limit = _limit()
    try:
        image = Image.open(io.BytesIO(content), formats=known_formats())
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))  # what is no JPEG ignores it
        pixels = max(image.width * image.height, _of_a_tile(image))
    except UnidentifiedImageError:  # whose message holds an address in memory
        raise UnidentifiedImageError("not an image, or of no known format") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ValueError(f"it has more than {most:.0f} million pixels: {_remedy(limit)}") from None
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise ValueError(reason_of(error)) from None
    if pixels > limit * 1e6:
        raise ValueError(f"it has {image.width} x {image.height} pixels: {_remedy(limit)}")
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > _SCANS:
        raise ValueError(f"it is drawn in more than {_SCANS} passes, which takes too long: save it anew")
    return image


def reason_of(error: Exception) -> str:
    """What a decoder says of a damaged picture, in one line."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return one_line(str(error)) or type(error).__name__


def _of_a_tile(image: Image.Image) -> int:
    """Pixels of a tile of a TIFF, which may be larger than the picture and is decoded whole; 0 without."""
    tags = getattr(image, "tag_v2", None) or {}
    sides = [tags.get(number, 0) for number in (322, 323)]
    return math.prod(side if isinstance(side, int) else 0 for side in sides)


def _remedy(limit: float) -> str:
    return f"make it smaller than {limit:g} million, or say in the variable {LIMIT} how many are allowed"


def _limit() -> float:
    """Million pixels; where a user wants more than Pillow allows, it is told so."""
    given = os.environ.get(LIMIT)
    if given is None:
        return _MEGAPIXELS
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UserError(f"{LIMIT}={given} must be a number above 0, of million pixels")
    if Image.MAX_IMAGE_PIXELS is not None and limit * 1e6 > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = int(limit * 1e6)
    return limit
