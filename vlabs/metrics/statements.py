"""Measures of labelled statements."""

from __future__ import annotations

from collections.abc import Sequence


def consistency(identifiers: Sequence[str], right: Sequence[bool]) -> float:
    """NLVR2's consistency: the share of sentences that are labelled right for every pair that they are asked about.

    An identifier is `split-set-pair-sentence`: those that differ in the pair alone are of one sentence (Suhr et al.,
    2019, section 6; so does the data set's own `metrics.py`).

    Args:
        identifiers, right: of each example; at least one.

    Returns:
        In percent.
    """
    sentences: dict[tuple[str, ...], bool] = {}
    for identifier, is_right in zip(identifiers, right, strict=True):
        parts = identifier.split("-")
        sentence = (*parts[:2], *parts[3:])
        sentences[sentence] = sentences.get(sentence, True) and bool(is_right)
    return 100 * sum(sentences.values()) / len(sentences)
