"""From image bytes and text to tensors: what a checkpoint carries to be used without its training config."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from vlabs.data.decoding import decode
from vlabs.errors import UserError, one_line

# CLIP's, which METER uses for CLIP's encoders, and the released AbSViT for its ViT.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# ImageNet's, which METER uses for its Swins.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = ("bicubic", "bilinear")
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class Preprocessing:
    """Everything between raw input and tensors, as plain data.

    Attributes:
        image_size: side of the square input in pixels.
        tokenizer: the `tokenizers` JSON of the text encoder's tokenizer.
        max_length: tokens at most, special tokens included; longer text is cut.
        pad_to_max_length: pad every text to `max_length` and not to the longest of its batch.
        names: of what the head tells apart, in the order of its logits: answers, labels of statements, or classes;
            empty where it ranks.
        mean, std: of the image channels, for values in [0, 1].
        crop: share of the shorter side that is seen, from 0.05 to 1.
        crop_mode: what becomes the square (timm's names): the `center`, or all of an image, `squash`ed; `crop` is then
            a share of both sides.
        interpolation: by which images are resized, one of `INTERPOLATIONS`.

    Raises:
        UserError: a mean, deviation, crop or interpolation that there is not; the message names its option.
    """

    image_size: int
    tokenizer: str
    max_length: int = 50
    pad_to_max_length: bool = False
    names: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGE_MEAN
    std: tuple[float, ...] = IMAGE_STD
    pad_token_id: int = field(default=1)
    crop: float = 1.0
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        for name in PICTURE_OPTIONS:
            check_picture_option(name, getattr(self, name))

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Preprocessing:
        """Rebuild from `to_plain`'s dictionary, which may be somebody else's.

        Raises:
            UserError: a value is missing, unknown, of another type or out of range; the message names it.
        """
        if not isinstance(plain, dict):
            raise UserError("the preprocessing is no dictionary")
        if "answers" in plain and "names" not in plain:  # as checkpoints said until 2026, of classes and labels too
            plain = {"names" if name == "answers" else name: value for name, value in plain.items()}
        if unknown := sorted(str(name) for name in plain.keys() - _VALID.keys()):
            raise UserError(f"the preprocessing has '{unknown[0]}', which is none of {', '.join(_VALID)}")
        if missing := [name for name in ("image_size", "tokenizer") if name not in plain]:
            raise UserError(f"the preprocessing has no '{missing[0]}'")
        for name, value in plain.items():
            is_valid, what = _VALID[name]
            if not is_valid(value):
                raise UserError(f"the preprocessing's {name} must be {what}, and is {str(value)[:40]!r}")
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in plain.items()}
        made = cls(**values)
        if made.tokenizer:
            made.check_tokenizer()
        return made

    def to_plain(self) -> dict[str, Any]:
        """As a JSON-able dictionary."""
        names = self.__dataclass_fields__
        plain = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def resize(self, image: Image.Image) -> Image.Image:
        """Shorter side to `image_size / crop`, then the center square, as torchvision does; both sides, where squashed.

        Only the square is computed, so an image of 640×480 takes three quarters of the work, and a very long one no
        more memory than any other. Rounding makes a few values differ from theirs by a level or two of 255.
        """
        size = self.image_size
        return image.resize((size, size), Image.Resampling[self.interpolation.upper()], self.box(image.size))

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of what is seen of an image of a size (width, height), in its pixels."""
        width, height = size
        shorter_resized = int(self.image_size / self.crop)
        resized = shorter_resized, shorter_resized
        if self.crop_mode == "center":
            shorter = min(width, height)
            resized = int(shorter_resized * width / shorter), int(shorter_resized * height / shorter)
        left, top = (round((side - self.image_size) / 2) for side in resized)
        x, y = width / resized[0], height / resized[1]
        right, bottom = (left + self.image_size) * x, (top + self.image_size) * y
        return left * x, top * y, min(right, width), min(bottom, height)

    def resize_for_training(self, image: Image.Image) -> Image.Image:
        """`resize` with torch's kernel, about twice as fast, of a square that begins at a whole pixel.

        The image is moved by less than a pixel of the one that is given; augmentation moves it by more.
        """
        size = self.image_size
        width, height = image.size if self.crop_mode == "squash" else (min(image.size),) * 2
        left, top = (image.width - width) // 2, (image.height - height) // 2
        # The batch of one comes first, so that torch sees channels that lie side by side, for which it has its kernel.
        pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)
        square = pixels[..., top : top + height, left : left + width]
        resized = F.interpolate(square, (size, size), mode=self.interpolation, antialias=True)
        return Image.fromarray(resized[0].permute(1, 2, 0).numpy())

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer.from_str(self.tokenizer)
        tokenizer.enable_truncation(self.max_length)
        tokenizer.no_padding()
        return tokenizer

    def check_tokenizer(self) -> None:
        """Raise a UserError if the tokenizer is none, or texts cannot be read with it."""
        try:
            self.token_ids(["a", ""])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of tokenizers is no Exception
            raise UserError(f"the tokenizer is damaged: {one_line(str(error))[:200]}") from None

    @property
    def largest_token_id(self) -> int:
        """Of all ids that texts can become, the largest."""
        known = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max((*known, *self.token_ids([""])[0]), default=0)

    @property
    def vocab_size(self) -> int:
        """Tokens that the text encoder needs an embedding for."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def image(self, image: Image.Image) -> Tensor:
        """Resize, crop and normalize one RGB image to (3, image_size, image_size)."""
        return self.normalize(self.resize(image))

    def normalize(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
        """An RGB image of the right size to a normalized float tensor (3, H, W), which is `out` where given."""
        tensor = torch.empty(3, image.height, image.width) if out is None else out
        # One copy that reorders and converts; the arithmetic is then in place, on values that lie in order.
        tensor.copy_(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        scale, shift = self._scale_and_shift
        return tensor.mul_(scale).add_(shift)

    @cached_property
    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """`(x / 255 - mean) / std` as `x · scale + shift`, each (3, 1, 1)."""
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return 1 / (255 * std), -mean / std

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut to `max_length`, not padded.

        Raises:
            UserError: a text is not Unicode.
        """
        try:
            return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        except TypeError:  # the tokenizer's word for half of a character that has two
            raise UserError("a text has a character that cannot be written (a lone surrogate): type it anew") from None

    def pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pad token ids to one length: `input_ids` and `attention_mask`, both int64 (n, T)."""
        length = self.max_length if self.pad_to_max_length else max((len(row) for row in ids), default=0)
        input_ids = torch.full((len(ids), length), self.pad_token_id)
        attention_mask = torch.zeros((len(ids), length), dtype=torch.int64)
        for row, tokens in enumerate(ids):
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
            attention_mask[row, : len(tokens)] = 1
        return input_ids, attention_mask


def _whole(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    return lambda value: type(value) is int and low <= value <= high, f"a whole number from {low} to {high}"


def _three(low: float, what: str) -> tuple[Callable[[Any], bool], str]:
    def is_valid(value: Any) -> bool:
        numbers = (
            isinstance(value, list | tuple) and len(value) == 3 and all(type(one) in (int, float) for one in value)
        )
        return numbers and all(low < one < 1000 for one in value)

    return is_valid, what


def _texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) and len(one) <= 1000 for one in value)


# What a checkpoint may say of each value, and how that is called.
_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_size": _whole(1, 4096),
    "tokenizer": (lambda value: isinstance(value, str), "the text of a tokenizer.json"),
    "max_length": _whole(1, 2**16),
    "pad_to_max_length": (lambda value: isinstance(value, bool), "true or false"),
    "names": (_texts, "a list of texts"),
    "mean": _three(-1000, "three numbers, one for each channel"),
    "std": _three(0, "three numbers above 0, one for each channel"),
    "pad_token_id": _whole(0, 2**24),
    "crop": (
        lambda value: type(value) in (int, float) and 0.05 <= value <= 1,
        "a number from 0.05 to 1, a share of the shorter side",
    ),
    "interpolation": (lambda value: value in INTERPOLATIONS, f"one of {', '.join(INTERPOLATIONS)}"),
    "crop_mode": (lambda value: value in CROP_MODES, f"one of {', '.join(CROP_MODES)}"),
}
PICTURE_OPTIONS = {"mean": "image_mean", "std": "image_std"} | {
    name: name for name in ("interpolation", "crop", "crop_mode")
}
"""How images are read, and the options of `data` that say so."""


def check_picture_option(name: str, value: Any) -> None:
    """Raise a UserError unless one of `PICTURE_OPTIONS` has a value that it can have."""
    is_valid, what = _VALID[name]
    if not is_valid(value):
        shown = list(value) if isinstance(value, tuple) else value
        raise UserError(f"data.{PICTURE_OPTIONS[name]}={shown} must be {what}")


_LONGEST_TEXT = 10_000


def check_text(what: str, text: str) -> None:
    """Raise a UserError if there is nothing in a text that a user asks, or more than anybody asks, or no characters.

    Args:
        what: it is, for the message.
    """
    if not text.strip():
        raise UserError(f"{what} is empty: give it some text")
    if len(text) > _LONGEST_TEXT:
        raise UserError(f"{what} has {len(text):,} characters: give it {_LONGEST_TEXT:,} at most")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 ({text[:40]}): write it in UTF-8") from None


def decode_image(data: bytes, name: str, at_least: int | None = None) -> Image.Image:
    """Decode image bytes to an RGB image as a viewer shows it, see `vlabs.data.decoding`.

    Args:
        name: of the image, for messages.
        at_least: decode a JPEG at the smallest of its scales (1, 1/2, 1/4, 1/8) at which no side is below so many
            pixels. Decoding becomes a little faster, and resizing much. None for the whole image.

    Raises:
        UserError: not an image, a truncated one, or one of too many pixels; the message says `name`.
    """
    try:
        return decode(data, at_least)
    except ValueError as error:
        raise UserError(f"{name} is not a whole image that can be decoded: {error}") from None
