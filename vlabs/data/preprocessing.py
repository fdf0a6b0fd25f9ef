"""From image bytes and text to tensors. Checkpoints carry this, so that they can be used without their config."""

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

# CLIP's mean and deviation: METER uses them for CLIP's encoders, and the released AbSViT for its ViT.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

# ImageNet's mean and deviation: METER uses them for Swin.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = ("bicubic", "bilinear")
CROP_MODES = ("center", "squash")


@dataclass(frozen=True)
class Preprocessing:
    """Everything between raw inputs and tensors, as plain data.

    Attributes:
        image_size: side of the square input in pixels.
        tokenizer: JSON of the text encoder's tokenizer, of the library `tokenizers`.
        max_length: largest number of tokens, including special tokens; longer text is cut.
        pad_to_max_length: pad all texts to `max_length`, not to the longest text of the batch.
        names: names of the head's logits, in their order: answers, labels of statements, or classes; empty if it ranks.
        mean, std: mean and deviation of the image channels, for values in [0, 1].
        pad_token_id: id of the padding token.
        crop: share of the shorter side that the model sees, from 0.05 to 1.
        crop_mode: what becomes the square (timm's names): the `center`, or the whole image, `squash`ed; `crop` is then
            a share of both sides.
        interpolation: how images are resized, one of `INTERPOLATIONS`.

    Raises:
        UserError: an invalid mean, deviation, crop or interpolation; the message names its option.
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
        """Rebuild from the dictionary of `to_plain`, which may come from an unknown checkpoint.

        Raises:
            UserError: a value is missing, unknown, of another type or out of range; the message names it.
        """
        if not isinstance(plain, dict):
            raise UserError("the preprocessing is not a dictionary")
        if "answers" in plain and "names" not in plain:  # older checkpoints call all names answers
            plain = {"names" if name == "answers" else name: value for name, value in plain.items()}
        if unknown := sorted(str(name) for name in plain.keys() - _VALID.keys()):
            raise UserError(f"the preprocessing has '{unknown[0]}', which is not one of {', '.join(_VALID)}")
        if missing := [name for name in ("image_size", "tokenizer") if name not in plain]:
            raise UserError(f"the preprocessing has no '{missing[0]}'")
        for name, value in plain.items():
            is_valid, what = _VALID[name]
            if not is_valid(value):
                raise UserError(f"the preprocessing's {name} must be {what}, but is {str(value)[:40]!r}")
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in plain.items()}
        made = cls(**values)
        if made.tokenizer:
            made.check_tokenizer()
        return made

    def to_plain(self) -> dict[str, Any]:
        """The values as a dictionary that JSON can hold."""
        names = self.__dataclass_fields__
        plain = {name: getattr(self, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}

    def resize(self, image: Image.Image) -> Image.Image:
        """Resize the shorter side (with `squash`, both) to `image_size / crop` and crop the center, like torchvision.

        Only the square is computed: an image of 640×480 takes three quarters of the work, and a very long image no
        more memory than others. By rounding, a few values differ from torchvision's by one or two levels of 255.
        """
        size = self.image_size
        return image.resize((size, size), Image.Resampling[self.interpolation.upper()], self.box(image.size))

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in pixels, of the part that the model sees of an image (width, height)."""
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
        """A faster `resize` for training: torch's kernel, and a crop at whole pixels.

        The result is shifted by less than a pixel of the original, which is less than augmentation does.
        """
        size = self.image_size
        width, height = image.size if self.crop_mode == "squash" else (min(image.size),) * 2
        left, top = (image.width - width) // 2, (image.height - height) // 2
        # [None] before permute: the tensor is then channels-last, for which torch has a fast kernel.
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
        """Raise a UserError if the tokenizer is invalid or cannot encode texts."""
        try:
            self.token_ids(["a", ""])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in the Rust code of tokenizers is not an Exception
            raise UserError(f"the tokenizer is damaged: {one_line(str(error))[:200]}") from None

    @property
    def largest_token_id(self) -> int:
        """The largest token id that a text can have."""
        known = self._tokenizer.get_vocab(with_added_tokens=True).values()
        return max((*known, *self.token_ids([""])[0]), default=0)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the text encoder needs an embedding for."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def image(self, image: Image.Image) -> Tensor:
        """Resize, crop and normalize one RGB image to (3, image_size, image_size)."""
        return self.normalize(self.resize(image))

    def normalize(self, image: Image.Image, out: Tensor | None = None) -> Tensor:
        """Normalize an RGB image of the right size to a float tensor (3, H, W), written to `out` if given."""
        tensor = torch.empty(3, image.height, image.width) if out is None else out
        # A single copy reorders and converts; the arithmetic is in place and on contiguous memory, so it is fast.
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
        except TypeError:  # raised for a lone surrogate
            raise UserError("a text has a character that is not valid Unicode (a lone surrogate): retype it") from None

    def characters_read(self, text: str) -> int:
        """How many characters of a text the model reads: all, unless the text is cut to `max_length` tokens."""
        encoding = self._tokenizer.encode(text)
        return max((end for _, end in encoding.offsets), default=0) if encoding.overflowing else len(text)

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """The words of a text, as the tokenizer cuts them, each with the positions of its tokens in `token_ids`."""
        encoding = self._tokenizer.encode(text)
        places: dict[int, list[int]] = {}
        for place, word in enumerate(encoding.word_ids):
            if word is not None:
                places.setdefault(word, []).append(place)
        ends = [(encoding.offsets[of[0]][0], encoding.offsets[of[-1]][1]) for of in places.values()]
        words = [(text[start:end].strip(), of) for (start, end), of in zip(ends, places.values(), strict=True)]
        return [(word, of) for word, of in words if word]  # spaces at the end may be a token

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


# For each value of a checkpoint's preprocessing: whether it is valid, and what is valid in words.
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
"""Values of the preprocessing of images, and the options of `data` that set them."""


def check_picture_option(name: str, value: Any) -> None:
    """Raise a UserError unless the value of one of `PICTURE_OPTIONS` is valid."""
    is_valid, what = _VALID[name]
    if not is_valid(value):
        shown = list(value) if isinstance(value, tuple) else value
        raise UserError(f"data.{PICTURE_OPTIONS[name]}={shown} must be {what}")


_LONGEST_TEXT = 10_000


def check_text(what: str, text: str) -> None:
    """Raise a UserError if a user's text is empty, too long, or not Unicode.

    Args:
        what: what the text is, for the message.
        text: the text.
    """
    if not text.strip():
        raise UserError(f"{what} is empty: give it some text")
    if len(text) > _LONGEST_TEXT:
        raise UserError(f"{what} has {len(text):,} characters: at most {_LONGEST_TEXT:,} are allowed")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{what} is not UTF-8 ({text[:40]}): write it in UTF-8") from None


def decode_image(data: bytes, name: str, at_least: int | None = None) -> Image.Image:
    """Decode image bytes to an RGB image as a viewer shows it, see `vlabs.data.decoding`.

    Args:
        data: the file's bytes.
        name: name of the image, for messages.
        at_least: decode a JPEG at the smallest scale (1, 1/2, 1/4, 1/8) at which both sides have at least so many
            pixels. Decoding is then a little faster, and resizing much faster. None for full size.

    Raises:
        UserError: it is not an image, truncated, or has too many pixels; the message has `name`.
    """
    try:
        return decode(data, at_least)
    except ValueError as error:
        raise UserError(f"{name} is not a whole image that can be decoded: {error}") from None
