"""The words of texts. Checkpoints keep those of their training, to warn about words that the model does not know."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MOST = 50_000
"""The largest number of words in a checkpoint, about 400 kB."""
# One character of Chinese or Japanese, which have no spaces between words; or a run of letters and digits.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:'[^\W_]+)*")


def words_in(texts: Iterable[str]) -> set[str]:
    """The set of words of texts: in lower case, however their accents and apostrophes are written."""
    return {word for text in texts for word in _WORD.findall(_plain(text))}


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text.lower()).replace("’", "'")
