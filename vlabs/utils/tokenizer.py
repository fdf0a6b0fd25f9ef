"""Checks of an untrusted tokenizer.json, a few lines of which could make any text huge."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from typing import Any

from vlabs.errors import UserError
from vlabs.utils.plain import parse_json

_GROWTH = 10_000
"""The largest factor by which the steps before tokenization may multiply the length of a text."""
_GROWS = {"ByteLevel": 2, "BertNormalizer": 4, "Metaspace": 4, "NFC": 3, "NFKC": 4, "NFD": 4, "NFKD": 4}
_ADDED = 10_000
"""Largest number of characters of the post-processor, which adds tokens to texts; usual ones have a few hundred."""


def check_tokenizer(text: str, name: str) -> None:
    """Raise a UserError for a tokenizer that multiplies texts, or declares a wrong size of its content.

    Args:
        text: content of a tokenizer.json.
        name: name of its file, for messages.
    """
    content = parse_json(text, name, finite=False)
    if not isinstance(content, dict):
        raise UserError(f"{name} is not a tokenizer")
    growth = 1.0
    for step in (*_steps(content.get("normalizer")), *_steps(content.get("pre_tokenizer"))):
        growth *= _growth(step, name)
        if growth > _GROWTH:
            raise UserError(f"{name}: the tokenizer may make texts more than {_GROWTH:,} times as long")
    if len(str(content.get("post_processor"))) > _ADDED:
        raise UserError(f"{name}: the tokenizer adds too many tokens to a text")


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every step in nested sequences of steps."""
    if isinstance(value, dict):
        if "type" in value:
            yield value
        for inner in value.values():
            yield from _steps(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _steps(inner)


def _growth(step: dict[str, Any], name: str) -> float:
    """The factor by which a step may multiply the bytes of a text."""
    kind, added = step["type"], len(str(step.get("content") or step.get("prepend") or "").encode(errors="replace"))
    if kind == "Replace":
        pattern = step.get("pattern")
        found = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(found, str) and found:
            return max(1.0, added / len(found.encode(errors="replace")))
        return 1.0 + added
    if kind == "Prepend":
        return 1.0 + added
    if kind == "Precompiled":
        _check_table(step.get("precompiled_charsmap"), name)
        return 4.0
    return float(_GROWS.get(kind, 1)) if isinstance(kind, str) else math.inf


def _check_table(coded: Any, name: str) -> None:
    """Raise a UserError if the table of a normalizer is smaller than declared, because memory is allocated for it."""
    try:
        table = base64.b64decode(coded, validate=True)
    except (TypeError, ValueError):
        table = b""
    if len(table) < 4 or int.from_bytes(table[:4], "little") > len(table) - 4:
        raise UserError(f"{name}: the tokenizer's table of characters (precompiled_charsmap) is damaged")
