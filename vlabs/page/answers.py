"""The page's answers as HTML: answers with their maps, found images, or an error in one line."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlabs.attention import VIEWS
from vlabs.attention.figures import Cell, View, as_view, pixels_of
from vlabs.attention.maps import MAPS, legend_of
from vlabs.errors import UserError, one_line, printable
from vlabs.page.decoder import Decoder
from vlabs.page.uploads import Uploads
from vlabs.prediction.predictor import Answer, Predictor
from vlabs.prediction.search import MEANING, Search
from vlabs.utils.plain import read_text

if TYPE_CHECKING:
    from vlabs.look.looker import Looker

TOP = 5
NO_VIEW = "none"
"""The choice of no second look."""
LEAST_KEPT = 0.05


class Page:
    """Answers requests with a model, one at a time. Requests are not trusted: their values may be any JSON.

    Args:
        predictor: the model that answers.
        searches: searches by the name of their folder.
        uploads: the uploaded images, and the limits of a request.
        decoder: decodes the images.
        caution: warning that is shown with answers about uploaded images.
        looker: a model of transformers, if any, whose maps are shown too.

    Attributes:
        maps: the available maps.
        most_alpha: the largest allowed α.
        least_kept: the smallest allowed share of the patches.
    """

    def __init__(
        self,
        predictor: Predictor,
        searches: dict[str, Search],
        uploads: Uploads,
        decoder: Decoder,
        caution: str = "",
        looker: Looker | None = None,
    ) -> None:
        self.predictor = predictor
        self.searches = searches
        self.uploads = uploads
        self.decoder = decoder
        self.caution = caution
        self.looker = looker
        self.limits = uploads.limits
        self.maps = [name for name in MAPS if name != "weights" or predictor.model.prior is not None]
        most = getattr(predictor.model.vision.topdown, "most_alpha", math.inf)
        self.most_alpha = min(2 * (predictor.alpha or 1), most)
        self.least_kept = min(LEAST_KEPT, predictor.model.vision.keep)
        self._lock = threading.Lock()

    def ask(
        self,
        picture: Any,
        questions: Any,
        map_name: Any,
        alpha: Any,
        other: Any,
        keep: Any = None,
        second_look: Any = None,
    ) -> str:
        """Answer questions about an image, which share its first pass.

        Args:
            picture: name of the image among the uploads; None if there is none yet.
            questions: one per line.
            map_name: a name in `maps`.
            alpha: strength of the top-down signal, up to `most_alpha`; None for the model's own.
            other: a text whose ξ is used too, for comparison; empty or None for none.
            keep: share of the patches in the second pass; None for the model's own.
            second_look: answer again from this view, see `vlabs.prediction.second_look`; None or `NO_VIEW` for none.

        Returns:
            HTML of the answers, or of an error in one sentence.
        """
        return self._or_error(self._ask, picture, questions, map_name, alpha, other, keep, second_look)

    def _ask(
        self, picture: Any, questions: Any, map_name: Any, alpha: Any, other: Any, keep: Any, second_look: Any
    ) -> str:
        asked, other = self._lines(picture, questions, "question"), _text(other, "the text of the other ξ")
        if map_name not in self.maps:
            raise UserError(f"there is no such map: choose one of {', '.join(self.maps)}")
        if alpha is not None:
            alpha = _number(alpha, "α", 0, self.most_alpha)
        if keep is not None:
            keep = _number(keep, "the share of the patches", self.least_kept, 1)
        second = None if second_look in (None, NO_VIEW) else second_look
        if second is not None and (not isinstance(second, str) or second not in VIEWS):
            raise UserError(f"a second look is one of {', '.join((NO_VIEW, *VIEWS))}")
        self._check_length(other)
        image = self._decoded(picture)
        view = as_view(image, self.predictor.preprocessing.box(image.size))
        said = _warnings([self.caution] if self.caution and not self.uploads.is_kept(picture) else [])
        with self.predictor.model.vision.keeping(keep):  # one request at a time, see `_or_error`
            answers = self.predictor.answer(image, asked, TOP, map_name, alpha, second_look=second)
            said += _row(view, answers)
            if other.strip():
                under = self.predictor.answer(image, asked, TOP, map_name, alpha, other, second)
                said += _row(view, under, other)
                answers += under
        return said + _legend([answer.map_name for answer in answers], self.predictor.meaning)

    def _lines(self, picture: Any, texts: Any, what: str) -> list[str]:
        """The texts about an image, one per line."""
        if picture is None:
            raise UserError("there is no image yet: choose or drop one")
        lines = [line.strip() for line in _text(texts, f"the {what}s").splitlines() if line.strip()]
        if not lines:
            raise UserError(f"there is no {what} yet: type one per line")
        if len(lines) > self.limits.questions:
            raise UserError(f"there are {len(lines)} {what}s, but only {self.limits.questions} at a time are allowed")
        for line in lines:
            self._check_length(line)
        return lines

    def _decoded(self, picture: Any) -> Image.Image:
        content = self.uploads.read(picture)
        try:
            return self.decoder.decode(content)
        except UserError:
            self.uploads.remove(picture)  # decoding it again would take as long
            raise

    def find(self, folder: Any, query: Any, count: Any) -> str:
        """Find the images of a folder that fit a text best; HTML as in `ask`."""
        return self._or_error(self._find, folder, query, count)

    def _find(self, folder: Any, query: Any, count: Any) -> str:
        if not isinstance(folder, str) or folder not in self.searches:
            raise UserError(f"there is no such folder: choose one of {', '.join(self.searches)}")
        query, count = _text(query, "the text"), int(_number(count, "the number of images", 1, self.limits.pictures))
        if not query.strip():
            raise UserError("there is no text to search for yet: type one")
        self._check_length(query)
        search = self.searches[folder]
        compared = search.find(query.strip())
        found = compared[:count]
        cells = search.show(found)
        cards = ""
        for place, (item, cell) in enumerate(zip(found, cells, strict=True), start=1):
            bar = _bars([(f"{place}: {printable(item.path.name)}", item.share)])
            cards += _card(cell, bar, item.path.stem, _under(cell.view))
        new = search.checkpoint.new_words(query)
        said = f"<p>The best {len(found)} of {len(search.pictures):,} images for <b>{html.escape(query.strip())}</b>"
        if len(compared) < len(search.pictures):
            said += f"; the {len(compared)} most similar to its ξ were compared"
        said += "</p>" + _warnings([f"its training never had: {', '.join(new)}"] if new else [])
        return f"{said}<div class='cards'>{cards}</div>" + _legend([one.name for one in cells], MEANING)

    def look(self, picture: Any, texts: Any, map_name: Any) -> str:
        """Show where the model of transformers looks for texts, one per line; HTML as in `ask`."""
        return self._or_error(self._look, picture, texts, map_name)

    def _look(self, picture: Any, texts: Any, map_name: Any) -> str:
        looker = self.looker
        if looker is None:
            raise UserError("there is no model to look into: start the page with --look MODEL")
        lines = self._lines(picture, texts, "text")
        if map_name not in looker.maps:
            raise UserError(f"there is no such map: choose one of {', '.join(looker.maps)}")
        image = self._decoded(picture)
        answers = looker.answer(image, lines, map_name)
        return _row(as_view(image, looker.box(image.size)), answers) + _legend([map_name], looker.meaning)

    def _check_length(self, text: str) -> None:
        if len(text) > self.limits.characters:
            raise UserError(
                f"a text has {len(text)} characters, but only {self.limits.characters} are allowed: shorten it"
            )

    def _or_error(self, function: Callable[..., str], *arguments: Any) -> str:
        try:
            with self._lock:
                return function(*arguments)
        except UserError as error:
            said = one_line(str(error))
        except Exception:  # a bug in vlabs must not end the page
            traceback.print_exc()
            said = "this could not be answered because of an error in the page; its terminal shows the error"
        return f"<p class='error' role='alert'>{html.escape(said)}</p>"


def _text(given: Any, what: str) -> str:
    """Check that a value is a valid text; None becomes an empty one."""
    if given is None:
        return ""
    if not isinstance(given, str):
        raise UserError(f"{what} must be a text")
    if any("\ud800" <= character <= "\udfff" for character in given):
        raise UserError(f"{what} has a character that is not valid Unicode: retype it")
    return given


def _number(given: Any, what: str, least: float, most: float) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not least <= given <= most:
        raise UserError(f"{what} must be a number from {least:g} to {most:g}")
    return float(given)


def _row(view: View, answers: Sequence[Answer], other: str = "") -> str:
    """One card per question, side by side, all over the same image."""
    cards = []
    for answer in answers:
        note = f"<p class='other'>under the ξ of “{html.escape(other.strip())}”</p>" if other else ""
        bars = _bars(answer.answers)
        if answer.before is not None:
            looks = (("at first", _bars(answer.before)), ("after a second look", bars))
            bars = f"<div class='looks'>{''.join(f'<div><i>{when}</i>{one}</div>' for when, one in looks)}</div>"
        said = f"<b>{_question(answer)}</b>{note}{bars}{_warnings(answer.warnings)}"
        cards.append(_card(Cell(view, answer.map, answer.map_name), said, answer.question))
    return f"<div class='cards' {_under(view)}>{''.join(cards)}</div>"


def _question(answer: Answer) -> str:
    """The question, with words as dark as they counted, where that is known; a word's share shows under the pointer."""
    if answer.words is None:
        return html.escape(answer.question)
    most = max((share for _, share in answer.words), default=0) or 1
    return " ".join(
        f"<span class='word' style='--share:{share / most:.2f}' title='{share:.0%}'>{html.escape(word)}</span>"
        for word, share in answer.words
    )


def _bars(shares: Sequence[tuple[str, float]]) -> str:
    rows = "".join(
        f"<li><span class='bar' style='width:{100 * max(share, 0):.1f}%'></span><span class='text'>{html.escape(text)}"
        f"</span><span class='score'>{share:.1%}</span></li>"
        for text, share in shares
    )
    return f"<ol>{rows}</ol>"


def _warnings(warnings: Sequence[str]) -> str:
    return "".join(f"<p class='warning'>{html.escape(warning)}</p>" for warning in warnings)


def _card(cell: Cell, said: str, name: str, under: str = "") -> str:
    """A map over its image (`_under`), with a slider to show the image. The page's script reads the inputs."""
    file = re.sub(r"\W+", "-", name).strip("-")[:60] or "map"
    return (
        f"<figure class='card' {under}><div class='look'>"
        f"<img alt='the image, and where the model looked' src='{_data(pixels_of(cell))}'>"
        "<input type='range' name='at' min='0' max='100' value='0' aria-label='from the map to the image'></div>"
        f"<figcaption>{said}<a class='save' href='#' download='{file}.jpg'>download</a></figcaption></figure>"
    )


def _under(view: View) -> str:
    """The style that puts an image under the maps of an element."""
    return f"style='--picture: url({_data(pixels_of(Cell(view)))})'"


def _legend(names: Sequence[str], percentage: str) -> str:
    said = f"{html.escape(legend_of(names, own_range=True))}<br>a percentage is {html.escape(percentage)}"
    opacity = "<input type='range' name='opacity' min='0' max='1' step='0.01' value='1'>"
    return (
        f"<p class='legend'>Drag across a map to see the image under it. <label>Opacity {opacity}</label><br>"
        f"low <span class='scale'></span> high; {said}</p>"
    )


def _data(pixels: np.ndarray) -> str:
    """An image as a data URL, so that nothing is written to disk."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def example_pictures(folder: Path | None = None) -> list[Path]:
    """Example images: at most 24 of a folder; None for scenes that vlabs' own model was not trained on."""
    folder = folder or Path(__file__).parent / "pictures"
    suffixes = (".jpg", ".jpeg", ".png", ".webp")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in suffixes and path.is_file())[:24]


def questions_beside(picture: Path) -> str:
    """The questions of an example image, one per line: those in `NAME.txt` beside it; empty if there is none."""
    file = picture.with_suffix(".txt")
    return read_text(file).strip() if file.exists() else ""
