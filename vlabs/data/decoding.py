"""Images are decoded here and nowhere else: as a viewer shows them, of no more pixels than memory is meant for."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import os
import re
import warnings

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from vlabs.errors import UserError, one_line

LIMIT = "VLABS_MAX_MEGAPIXELS"
"""The environment variable that says how many million pixels an image may have."""
_MEGAPIXELS = 120.0  # up to a gigabyte where an image is converted; a phone's largest usual image has 108
_SCANS = 200  # of a progressive JPEG, which has some ten; each is as much work as the whole image

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # there is a limit here
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of what stands beside an image's pixels
# Pillow's limit of a text beside an image is a megabyte, which programs that note how it was made go beyond.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# What Pillow decodes itself or by a library. Of the others it starts programs (EPS), asks the network's plug-ins, or
# keeps another image inside whose size it does not say.
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
    """How the names of images that are decoded end, in lower case and with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)


def open_picture(content: bytes, at_least: int | None = None) -> Image.Image:
    """Read the header of an image; its pixels are decoded when they are first read.

    Args:
        at_least: see `vlabs.data.preprocessing.decode_image`.

    Raises:
        UnidentifiedImageError: it is no image of a known format.
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


def decode(content: bytes, at_least: int | None = None) -> Image.Image:
    """Decode an image to RGB as a viewer shows it, see `as_shown`; of an animation the first frame.

    Raises:
        ValueError: why it cannot be decoded, in one line.
    """
    try:
        with open_picture(content, at_least) as image:
            return as_shown(image)
    except UserError:  # of the limit's variable
        raise
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        raise ValueError(reason_of(error)) from None


def as_shown(image: Image.Image) -> Image.Image:
    """An image in RGB: turned as its camera says, on white where it is transparent, 16 bits and floats scaled to 8."""
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        gray = np.round(255 * _unit(values)).astype(np.uint8)
        gray[values == image.info.get("transparency")] = 255  # the one value that a PNG says is transparent
        image = Image.fromarray(gray)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy the image


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of an image as a viewer shows it, all of which is decoded.

    Raises:
        ValueError: it cannot be decoded.
    """
    with _opened(content) as image:
        return image.size[::-1] if _orientation(image) > 4 else image.size


def read_labels(content: bytes) -> np.ndarray:
    """The values of an image whose pixels are labels, (H, W), as they are stored: of a palette the indices.

    Raises:
        ValueError: it cannot be decoded, or has colors or a transparency of its own.
    """
    with _opened(content) as image:
        values = np.asarray(_upright(image))
        if values.ndim == 3 and image.mode in ("LA", "RGBA", "RGB", "PA"):
            channels = [values[..., n] for n in range(values.shape[2])]
            colors, alpha = (channels[:-1], channels[-1]) if image.mode.endswith("A") else (channels, None)
            same = all(np.array_equal(one, colors[0]) for one in colors)
            if same and (alpha is None or (alpha == 255).all()):
                values = colors[0]  # gray, saved with more channels than it needs
    if values.ndim != 2:
        raise ValueError("its pixels are colors, not labels: save it as a gray image or with a palette")
    if not np.issubdtype(values.dtype, np.integer) and values.dtype != bool:
        if not np.array_equal(values, np.round(values)):
            raise ValueError("its pixels are no whole numbers")
        values = values.astype(np.int64)
    return values.astype(np.uint8) if values.dtype == bool else values


def read_gray(content: bytes) -> np.ndarray:
    """An image's brightness, (H, W) float32 in [0, 1]; what is transparent is black.

    Raises:
        ValueError: it cannot be decoded.
    """
    with _opened(content) as image:
        image = _upright(image)
        if image.mode.startswith(("I", "F")):
            return _unit(np.asarray(image)).astype(np.float32)
        if not image.has_transparency_data:
            return np.asarray(image.convert("L"), dtype=np.float32) / 255
        gray = np.asarray(image.convert("RGBA").convert("L"), dtype=np.float32) / 255
        alpha = np.asarray(image.convert("RGBA").getchannel("A"), dtype=np.float32) / 255
        # A mask may be drawn in its transparency alone, in whatever one color.
        return alpha if len(np.unique(gray[alpha > 0])) < 2 and len(np.unique(alpha)) > 1 else gray * alpha


def _opened(content: bytes) -> Image.Image:
    """An image all of whose pixels are decoded."""
    try:
        image = open_picture(content)
        image.load()
    except UserError:
        raise
    except Exception as error:
        raise ValueError(reason_of(error)) from None
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says."""
    image.load()
    if _orientation(image) > 1:
        with contextlib.suppress(Exception):  # what writes the rest of a damaged EXIF anew
            return ImageOps.exif_transpose(image)
    return image


def _orientation(image: Image.Image) -> int:
    """How a decoded image is to be turned, 1 to 8; 1 where its EXIF is damaged, as to viewers."""
    try:
        found = image.getexif().get(0x0112, 1)
        return found if found in range(1, 9) else 1
    except Exception:
        return 1


def _unit(values: np.ndarray) -> np.ndarray:
    """Brightness in [0, 1] of 16 or 32 bit pixels or floats: by the range of their kind, or by their own beyond it."""
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    if low < 0 or high > 65535:
        return np.asarray((finite - low) / max(high - low, 1e-12))
    if np.issubdtype(values.dtype, np.integer):
        return finite / 65535
    return finite / (1.0 if high <= 1 else 255.0 if high <= 255 else 65535.0)


def reason_of(error: Exception) -> str:
    """What a decoder says of a damaged image, in one line and without addresses in memory."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for it"
    return re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "it", one_line(str(error))) or type(error).__name__


def _of_a_tile(image: Image.Image) -> int:
    """Pixels of a tile of a TIFF, which may be larger than the image and is decoded whole; 0 without."""
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
