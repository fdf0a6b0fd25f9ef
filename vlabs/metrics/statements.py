"""Metrics for labeled statements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def consistency(identifiers: Sequence[str], right: Sequence[bool]) -> float:
    """NLVR2's consistency: the share of sentences that are labeled right for every pair that they are asked about.

    An identifier is `split-set-pair-sentence`. Identifiers that differ only in the pair belong to one sentence (Suhr et
    al., 2019, section 6, and the dataset's own `metrics.py`).

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


def told_apart(scores: Mapping[tuple[int, int], float]) -> dict[str, bool]:
    """Whether what belongs together has the higher score, as Winoground measures it (Thrush et al., 2022, section 4).

    Args:
        scores: of (image, caption); image n belongs to caption n. One image and two captions, or two of each.

    Returns:
        `text`: each image's own caption scores higher than the other. With two images also `image`: each caption's
        own image scores higher, and `group`: both. Equal scores count as wrong.
    """
    pictures = {picture for picture, _ in scores}
    text = all(scores[n, n] > scores[n, 1 - n] for n in pictures)
    if len(pictures) == 1:
        return {"text": text}
    image = all(scores[n, n] > scores[1 - n, n] for n in pictures)
    return {"text": text, "image": image, "group": text and image}
