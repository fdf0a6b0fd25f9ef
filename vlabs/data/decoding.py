"""The only place where images are decoded: they look as in a viewer, and their size in pixels is limited."""

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
"""The environment variable that sets how many million pixels an image may have."""
_MEGAPIXELS = 120.0  # phones take images of up to 108 megapixels; converting one of 120 takes up to a gigabyte
_SCANS = 200  # limit for progressive JPEGs; usual ones have about ten scans, and each costs as much as a whole image

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # this module has its own limit
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # about metadata, not about pixels
# Pillow's limit for a PNG's text is one megabyte. Programs that store how an image was made exceed it.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

# Formats that Pillow decodes itself or with a library. Other formats are unsafe for unknown files: they start programs
# (EPS), use plug-ins that read from the network, or contain another image whose size Pillow does not report.
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "MPO", "PCX", "PNG", "PPM", "QOI", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip

# How files of phones begin, after the first four bytes.
_HEIC = tuple(b"ftyp" + brand for brand in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"))


@functools.cache
def known_formats() -> tuple[str, ...]:
    """The accepted formats that this installation of Pillow can decode."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def known_suffixes() -> frozenset[str]:
    """File name suffixes of the accepted formats, in lower case and with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)


def open_picture(content: bytes, at_least: int | None = None) -> Image.Image:
    """Read the header of an image; pixels are decoded at the first access.

    Args:
        at_least: see `vlabs.data.preprocessing.decode_image`.

    Raises:
        UnidentifiedImageError: it is not an image of an accepted format.
        ValueError: it has too many pixels, or its header is damaged. The message is one line.
    """
    limit = _limit()
    try:
        image = Image.open(io.BytesIO(content), formats=known_formats())
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))  # only JPEGs can be decoded at a smaller scale
        pixels = max(image.width * image.height, _of_a_tile(image))
    except UnidentifiedImageError:  # Pillow's message contains a memory address
        known = "HEIC, which needs another program: save it as JPEG" if content[4:12] in _HEIC else None
        raise UnidentifiedImageError(known or "not an image, or of an unknown format") from None
    except Image.DecompressionBombError:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise ValueError(f"it has more than {most:.0f} million pixels: {_remedy(limit)}") from None
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        raise ValueError(reason_of(error)) from None
    if pixels > limit * 1e6:
        raise ValueError(f"it has {image.width} x {image.height} pixels: {_remedy(limit)}")
    if image.format in ("JPEG", "MPO") and content.count(b"\xff\xda") > _SCANS:
        raise ValueError(f"it has more than {_SCANS} scans, which take too long to decode: save it again")
    return image


def decode(content: bytes, at_least: int | None = None) -> Image.Image:
    """Decode an image to RGB as a viewer shows it (`as_shown`). An animation gives its first frame.

    Raises:
        ValueError: it cannot be decoded; the message gives the reason in one line.
    """
    try:
        with open_picture(content, at_least) as image:
            return as_shown(image)
    except UserError:  # the environment variable of the limit is wrong
        raise
    except Exception as error:  # Pillow's decoders raise many kinds of errors for damaged files
        raise ValueError(reason_of(error)) from None


def as_shown(image: Image.Image) -> Image.Image:
    """Convert an image to 8-bit RGB: rotated by its EXIF, transparent parts on white, 16 bits and floats scaled."""
    image = _upright(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        gray = np.round(255 * _unit(values)).astype(np.uint8)
        gray[values == image.info.get("transparency")] = 255  # a PNG may declare one gray value transparent
        image = Image.fromarray(gray)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` always copies


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of an image as a viewer shows it. The whole image is decoded, so damage is found.

    Raises:
        ValueError: it cannot be decoded.
    """
    with _opened(content) as image:
        # Orientations 5 to 8 swap width and height.
        return image.size[::-1] if _orientation(image) > 4 else image.size


def read_labels(content: bytes) -> np.ndarray:
    """Read a label map: the stored values (H, W); for an image with a palette, the indices.

    Raises:
        ValueError: it cannot be decoded, or its pixels are colors or partly transparent.
    """
    with _opened(content) as image:
        values = np.asarray(_upright(image))
        if values.ndim == 3 and image.mode in ("LA", "RGBA", "RGB", "PA"):
            channels = [values[..., n] for n in range(values.shape[2])]
            colors, alpha = (channels[:-1], channels[-1]) if image.mode.endswith("A") else (channels, None)
            same = all(np.array_equal(one, colors[0]) for one in colors)
            if same and (alpha is None or (alpha == 255).all()):
                values = colors[0]  # a gray image that was saved with several channels
    if values.ndim != 2:
        raise ValueError("its pixels are colors, not labels: save it as a gray image or with a palette")
    if not np.issubdtype(values.dtype, np.integer) and values.dtype != bool:
        if not np.array_equal(values, np.round(values)):
            raise ValueError("its pixels are not whole numbers")
        values = values.astype(np.int64)
    return values.astype(np.uint8) if values.dtype == bool else values


def read_gray(content: bytes) -> np.ndarray:
    """Brightness of an image, (H, W) float32 in [0, 1]; transparent pixels are black.

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
        # A mask may be drawn by transparency alone: all visible pixels then have one color, whichever it is.
        return alpha if len(np.unique(gray[alpha > 0])) < 2 and len(np.unique(alpha)) > 1 else gray * alpha


def read_palette(content: bytes) -> np.ndarray | None:
    """The indices of an image with a palette, (H, W) uint8; None of any other image."""
    with _opened(content) as image:
        return np.asarray(image) if image.mode == "P" else None


def _opened(content: bytes) -> Image.Image:
    """Open an image and decode all its pixels."""
    try:
        image = open_picture(content)
        image.load()
    except UserError:
        raise
    except Exception as error:
        raise ValueError(reason_of(error)) from None
    return image


def _upright(image: Image.Image) -> Image.Image:
    """The image, rotated as its EXIF says."""
    image.load()
    if _orientation(image) > 1:
        with contextlib.suppress(Exception):  # Pillow rewrites the EXIF, which fails if it is damaged elsewhere
            return ImageOps.exif_transpose(image)
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a decoded image, 1 to 8. A damaged EXIF counts as 1, as in viewers."""
    try:
        found = image.getexif().get(0x0112, 1)
        return found if found in range(1, 9) else 1
    except Exception:
        return 1


def _unit(values: np.ndarray) -> np.ndarray:
    """Scale 16-bit, 32-bit or float pixels to [0, 1]: by the usual range of their type, else by their own range."""
    finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(finite.min(initial=0)), float(finite.max(initial=0))
    if low < 0 or high > 65535:
        return np.asarray((finite - low) / max(high - low, 1e-12))
    if np.issubdtype(values.dtype, np.integer):
        return finite / 65535
    return finite / (1.0 if high <= 1 else 255.0 if high <= 255 else 65535.0)


def reason_of(error: Exception) -> str:
    """A decoder's error message as one line, without memory addresses."""
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    return re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "it", one_line(str(error))) or type(error).__name__


def _of_a_tile(image: Image.Image) -> int:
    """Pixels of one tile of a TIFF, 0 without tiles. A tile is decoded whole, and may be larger than the image."""
    tags = getattr(image, "tag_v2", None) or {}
    sides = [tags.get(number, 0) for number in (322, 323)]
    return math.prod(side if isinstance(side, int) else 0 for side in sides)


def _remedy(limit: float) -> str:
    return f"make it smaller than {limit:g} million, or set the environment variable {LIMIT}"


def _limit() -> float:
    """The limit in million pixels. If it is above Pillow's own limit, that one is raised too."""
    given = os.environ.get(LIMIT)
    if given is None:
        return _MEGAPIXELS
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UserError(f"{LIMIT}={given} must be a number above 0 (million pixels)")
    if Image.MAX_IMAGE_PIXELS is not None and limit * 1e6 > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = int(limit * 1e6)
    return limit
