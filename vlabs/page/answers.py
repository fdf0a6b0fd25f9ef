"""What the page says, as HTML: answers with their maps, found pictures, or one line about what is wrong."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlabs.attention.figures import enlarged, overlay
from vlabs.attention.pictures import LEGENDS
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError, one_line
from vlabs.page.uploads import Limits, read_upload
from vlabs.prediction.predictor import Answer, Predictor
from vlabs.prediction.search import Search

SIDE = 448
TOP = 5


class Page:
    """Answers requests of the page with a model, one at a time.

    Args:
        predictor: the model that answers.
        searches: by the name of a folder, what finds pictures in it.
        limits: of a request.
    """

    def __init__(self, predictor: Predictor, searches: dict[str, Search], limits: Limits) -> None:
        self.predictor = predictor
        self.searches = searches
        self.limits = limits

    def ask(self, picture: str | None, questions: str, map_name: str, alpha: float | None, other: str) -> str:
        """Answer questions about a picture, which share its first pass.

        Args:
            picture: file; None where there is none yet.
            questions: one a line.
            map_name: of `vlabs.attention.maps.MAPS`.
            alpha: strength of the top-down signal; None for the model's own.
            other: a text whose ξ is shown beside the questions' own; empty for none.
        """
        return _or_error(self._ask, picture, questions, map_name, alpha, other)

    def _ask(self, picture: str | None, questions: str, map_name: str, alpha: float | None, other: str) -> str:
        if picture is None:
            raise UserError("there is no picture yet: choose or drop one")
        asked = [line.strip() for line in questions.splitlines() if line.strip()]
        if not asked:
            raise UserError("there is no question yet: type one a line")
        if len(asked) > self.limits.questions:
            raise UserError(f"there are {len(asked)} questions, and {self.limits.questions} at a time are allowed")
        for text in (*asked, other):
            self._check_length(text)
        image = read_upload(picture, self.limits)
        shown = _shown(image, self.predictor.preprocessing)
        said = _row(shown, self.predictor.answer(image, asked, TOP, map_name, alpha))
        if other.strip():
            said += _row(shown, self.predictor.answer(image, asked, TOP, map_name, alpha, other), other)
        return f"{said}<p class='legend'>{html.escape(LEGENDS[map_name])}</p>"

    def find(self, folder: str, query: str, count: float) -> str:
        """The pictures of a folder that fit a text best."""
        return _or_error(self._find, folder, query, int(count))

    def _find(self, folder: str, query: str, count: int) -> str:
        if folder not in self.searches:
            raise UserError(f"there is no folder {folder}: choose one of {', '.join(self.searches)}")
        if not query.strip():
            raise UserError("there is no text to search for yet: type one")
        self._check_length(query)
        search = self.searches[folder]
        found = search.find(query.strip())[:count]
        cards = []
        for place, (item, shown) in enumerate(zip(found, search.show(query.strip(), found), strict=True), start=1):
            picture = _image(overlay(enlarged(shown.image), shown.map))
            caption = f"<b>{place}</b> {html.escape(item.path.name)} <span class='score'>{item.score:.2f}</span>"
            cards.append(f"<figure class='card'>{picture}<figcaption>{caption}</figcaption></figure>")
        return f"<div class='cards'>{''.join(cards)}</div>"

    def _check_length(self, text: str) -> None:
        if len(text) > self.limits.characters:
            raise UserError(f"a text has {len(text)} characters, and {self.limits.characters} are allowed: shorten it")


def _or_error(function: Callable[..., str], *arguments: Any) -> str:
    try:
        return function(*arguments)
    except UserError as error:
        return f"<p class='error' role='alert'>{html.escape(one_line(str(error)))}</p>"


def _shown(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """What the model sees of a picture, at a size for people."""
    side = max(preprocessing.image_size, min(SIDE, *image.size))
    return enlarged(dataclasses.replace(preprocessing, image_size=side).resize(image), SIDE)


def _row(shown: Image.Image, answers: Sequence[Answer], other: str = "") -> str:
    """A card a question, side by side."""
    return f"<div class='cards'>{''.join(_card(shown, answer, other) for answer in answers)}</div>"


def _card(shown: Image.Image, answer: Answer, other: str) -> str:
    note = f"<p class='other'>under the ξ of “{html.escape(other.strip())}”</p>" if other else ""
    bars = "".join(
        f"<li><span class='bar' style='width:{100 * share:.1f}%'></span><span class='text'>{html.escape(text)}</span>"
        f"<span class='score'>{share:.1%}</span></li>"
        for text, share in answer.answers
    )
    picture = _image(overlay(shown, answer.map))
    return (
        f"<figure class='card'>{picture}<figcaption><b>{html.escape(answer.question)}</b>{note}"
        f"<ol>{bars}</ol></figcaption></figure>"
    )


def _image(pixels: np.ndarray) -> str:
    """An `img` that carries its bytes, so that nothing is written to a disk."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    coded = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='where the model looked' src='data:image/jpeg;base64,{coded}'>"


def example_pictures(folder: Path | None = None) -> list[Path]:
    """Pictures to begin with: those of a folder, at most 24, or scenes that the model which comes with vlabs has not
    seen."""
    folder = folder or Path(__file__).parent / "pictures"
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:24]
