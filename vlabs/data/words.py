"""The words of texts, by which a model can say what its training never had."""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST = 50_000
"""Words that a checkpoint carries at most, some 400 kB."""
# A sign of Chinese or Japanese, which put no spaces between words, or letters and digits.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W_]+(?:['’][^\W_]+)*")


def words_in(texts: Iterable[str]) -> set[str]:
    """The words of texts, in lower case."""
    return {word for text in texts for word in _WORD.findall(text.lower())}
