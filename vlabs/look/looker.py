"""A model of transformers that says where it looks, by the same answers and figures as vlabs' own models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vlabs.attention import LOOK_MAPS
from vlabs.data.decoding import as_shown
from vlabs.data.preprocessing import check_text
from vlabs.errors import UserError, one_line
from vlabs.look.models import Inputs, Lookable
from vlabs.prediction.predictor import Answer, AnyImage, as_shares, open_image

DEFAULT = "relevance"
"""The map that is shown if none is asked for."""


class Looker:
    """Answers questions about images, or scores texts, with a model of transformers, and shows where it looked.

    Args:
        looks: the model.
        images: its image processor.
        tokenizer: its tokenizer.
        name: its name, for messages.
        device: where it runs.

    Attributes:
        path: its name, for results.
        maps: the maps that there are.
        meaning: what a percentage is.
    """

    def __init__(self, looks: Lookable, images: Any, tokenizer: Any, name: str, device: str) -> None:
        self.looks, self.images, self.tokenizer, self.name, self.device = looks, images, tokenizer, name, device
        self.path = Path(name)
        self.maps = looks.maps
        self.meaning = looks.meaning

    def answer(self, image: AnyImage, texts: Sequence[str], map_name: str | None = None) -> list[Answer]:
        """Answer questions about an image, or score texts.

        Args:
            image: a file, or a Pillow image.
            texts: questions for a model that answers, else captions.
            map_name: a name in `maps`; None for `DEFAULT`.

        Returns:
            One answer per text. Where the model only scores, its `answers` are the name of the score and its value.

        Raises:
            UserError: the file is missing or not an image, a text is empty or longer than the model can read, or the
                model has no such map.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a list of texts")
        map_name = self.check_map(map_name or DEFAULT)
        read = [self.text(text) for text in texts]
        pixels = self.pixels(as_shown(image) if isinstance(image, Image.Image) else open_image(image))
        answers = []
        for text, inputs in zip(texts, read, strict=True):
            seen = self.looks.look(pixels, inputs, [map_name])
            words = None
            if map_name == "relevance":
                left, without = leave_one_out(text)
                words = as_shares(left, self.looks.missed(pixels, inputs, [self._tokens(one) for one in without]))
            answers.append(Answer(text, seen.said.answers[0], [seen.maps[map_name].numpy()], map_name, words=words))
        return answers

    def check_map(self, name: str) -> str:
        """Return the name of a map, or raise a UserError if the model does not have it."""
        if name not in LOOK_MAPS:
            raise UserError(f"there is no map {name!r}: choose one of {', '.join(LOOK_MAPS)}")
        if name not in self.maps:
            raise UserError(f"{self.name} has no map {name}, which CLIP and SigLIP have: choose one of "
                            f"{', '.join(self.maps)}")  # fmt: skip
        return name

    def pixels(self, image: Image.Image) -> Inputs:
        """The model's input for one RGB image.

        Raises:
            UserError: the image processor gives another size than the model has.
        """
        try:
            read = self.images(images=[image], return_tensors="pt")
        except (ValueError, ZeroDivisionError, RuntimeError) as error:  # an image of a few pixels' height, for example
            size = f"{image.width} x {image.height} pixels"
            said = one_line(str(error))[:120]
            raise UserError(f"{self.name} cannot read an image of {size}: crop it to another shape ({said})") from None
        given = {name: value.to(self.device) for name, value in read.items()}
        if "spatial_shapes" in given:  # leave out the padding
            count = int(given["spatial_shapes"][0].prod())
            given = {name: value if name == "spatial_shapes" else value[:, :count] for name, value in given.items()}
        elif self.looks.image_size not in (None, *given["pixel_values"].shape[2:]) or (
            self.looks.image_size and len(set(given["pixel_values"].shape[2:])) > 1
        ):
            height, width = given["pixel_values"].shape[2:]
            raise UserError(
                f"{self.name} reads images of {self.looks.image_size} pixels, but its preprocessor_config.json makes "
                f"{width} x {height}: correct the file"
            )
        return given

    def text(self, text: str) -> Inputs:
        """The model's input for one text.

        Raises:
            UserError: it is empty, not Unicode, or longer than the model can read.
        """
        check_text("a text", text)
        most = self.looks.positions
        if (count := self.length(text)) > most:
            shown = text if len(text) <= 40 else f"{text[:40]}…"
            raise UserError(f"the text {shown!r} has {count} tokens, but {self.name} reads at most {most}: shorten it")
        return self._tokens(text)

    def _tokens(self, text: str) -> Inputs:
        options: dict[str, Any] = {"truncation": False}
        if self.looks.pads:
            options |= {"padding": "max_length", "max_length": self.looks.positions}
        read = self.tokenizer([text], return_tensors="pt", **options)
        return {name: read[name].to(self.device) for name in self.looks.text_inputs if name in read}

    def length(self, text: str) -> int:
        """The number of tokens of a text."""
        return len(self.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def box(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, right and bottom, in pixels, of the part that the model sees of an image (width, height)."""
        width, height = size
        images = self.images
        if not getattr(images, "do_center_crop", None):
            left, top, right, bottom = 0.0, 0.0, float(width), float(height)
        else:
            new_width, new_height = float(width), float(height)
            if images.do_resize and images.size.shortest_edge:
                scale = images.size.shortest_edge / min(size)
                new_width, new_height = width * scale, height * scale
            elif images.do_resize:
                new_width, new_height = images.size.width, images.size.height
            x, y = width / new_width, height / new_height
            left, top = (new_width - images.crop_size.width) / 2 * x, (new_height - images.crop_size.height) / 2 * y
            right, bottom = left + images.crop_size.width * x, top + images.crop_size.height * y
        if self.looks.image_size:  # what lies beyond the last whole patch is not seen
            part = self.looks.image_size // self.looks.patch * self.looks.patch / self.looks.image_size
            right, bottom = left + (right - left) * part, top + (bottom - top) * part
        return max(left, 0.0), max(top, 0.0), min(right, width), min(bottom, height)


def leave_one_out(text: str) -> tuple[list[str], list[str]]:
    """The words and signs of a text, and the text without each of them."""
    words = list(re.finditer(r"\w+|[^\w\s]", text))
    without = [" ".join(f"{text[: word.start()]} {text[word.end() :]}".split()) for word in words]
    return [word[0] for word in words], without
