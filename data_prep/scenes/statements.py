"""Statements about scenes, each with a label: hypotheses about one image, and sentences about a pair of them.

The label never follows from the words. A hypothesis ("The star is red.") is in a split as often entailed as
contradicted as neutral: it is neutral where the image shows nothing of what it speaks of. A sentence about pairs
("Both pictures show a star.") is true of two of the four pairs that it is asked about, and false of the others, as in
NLVR2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from random import Random
from typing import NamedTuple

from data_prep.scenes.questions import MARGIN, RELATIONS, Description, matching, with_article
from data_prep.scenes.render import FILLS, SceneObject, SceneSize
from vlabs.data.prepared import LABELS as ALL_LABELS

Objects = Sequence[SceneObject]
LABELS = CONTRADICTION, NEUTRAL, ENTAILMENT = ALL_LABELS["snli_ve"]

_DRAWN = 4  # hypotheses of each label that are drawn of a scene, before they are balanced
_TRIES = 60  # sentences that are tried on four pairs
_NUMBERS = ("no", "one", "two", "three", "four")


class Hypothesis(NamedTuple):
    """A hypothesis about a scene, its label, and the objects that it is about: none where it is neutral."""

    text: str
    label: str
    targets: tuple[int, ...]


class _Claim(NamedTuple):
    """A hypothesis about no scene yet: what it speaks of, and what it says of it."""

    text: str
    subject: Description
    says: Callable[[SceneObject], bool] | None = None
    relation: str = ""
    anchor: Description | None = None


@cache
def _claims(size: SceneSize) -> tuple[_Claim, ...]:
    """All hypotheses of scenes of a size; none mentions a pair of color and shape that training never shows."""
    pairs = [(color, shape) for color in size.colors for shape in size.shapes if (color, shape) not in size.held_out]
    claims = []
    for color, shape in pairs:
        claims.append(_claim(Description(shape=shape), f"is {color}", "color", color))
        claims.append(_claim(Description(color=color), f"is {with_article(shape)}", "shape", shape))
        subject = Description(color=color, shape=shape)
        claims += [_claim(subject, f"is {fill}", "fill", fill) for fill in FILLS]
        claims += [_claim(subject, f"is {extent}", "size", extent) for extent in ("small", "large")]
    for shape in size.shapes:
        for other in size.shapes:
            if shape != other:
                subject, anchor = Description(shape=shape), Description(shape=other)
                for relation in RELATIONS:
                    text = f"The {shape} is {relation} the {other}."
                    claims.append(_Claim(text, subject, relation=relation, anchor=anchor))
    return tuple(claims)


def _claim(subject: Description, says: str, attribute: str, value: str) -> _Claim:
    return _Claim(f"The {subject.noun} {says}.", subject, lambda item: getattr(item, attribute) == value)


def _judge(claim: _Claim, objects: Objects) -> Hypothesis | None:
    """The hypothesis with its label; None where some of what it speaks of is as it says, and some is not."""
    found = matching(claim.subject, objects)
    if claim.anchor is None:
        assert claim.says is not None
        said = {claim.says(objects[index]) for index in found}
        if len(said) == 2:
            return None
        return Hypothesis(claim.text, (ENTAILMENT if said.pop() else CONTRADICTION) if said else NEUTRAL, found)
    anchors = matching(claim.anchor, objects)
    if not found or not anchors:
        return Hypothesis(claim.text, NEUTRAL, ())
    if len(found) > 1 or len(anchors) > 1:
        return None
    offset = RELATIONS[claim.relation](objects[found[0]], objects[anchors[0]])
    if abs(offset) < MARGIN:
        return None
    return Hypothesis(claim.text, ENTAILMENT if offset > 0 else CONTRADICTION, (*found, *anchors))


def draw_hypotheses(objects: Objects, size: SceneSize, rng: Random) -> list[Hypothesis]:
    """Some hypotheses of each label about a scene, from which `balance` takes some."""
    by_label: dict[str, list[Hypothesis]] = defaultdict(list)
    for claim in _claims(size):
        if (judged := _judge(claim, objects)) is not None:
            by_label[judged.label].append(judged)
    return [one for label in LABELS for one in rng.sample(by_label[label], min(_DRAWN, len(by_label[label])))]


def balance(drawn: Iterable[Sequence[Hypothesis]], rng: Random) -> list[list[Hypothesis]]:
    """Of what was drawn for each scene of a split, as much as leaves every text with every label equally often."""
    texts: dict[str, dict[str, list[tuple[int, Hypothesis]]]] = defaultdict(lambda: {label: [] for label in LABELS})
    scenes = 0
    for scene, hypotheses in enumerate(drawn):
        scenes += 1
        for hypothesis in hypotheses:
            texts[hypothesis.text][hypothesis.label].append((scene, hypothesis))
    kept: list[list[Hypothesis]] = [[] for _ in range(scenes)]
    for by_label in texts.values():
        fewest = min(map(len, by_label.values()))
        for found in by_label.values():
            for scene, hypothesis in rng.sample(found, fewest):
                kept[scene].append(hypothesis)
    return [rng.sample(hypotheses, len(hypotheses)) for hypotheses in kept]


class Sentence(NamedTuple):
    """A sentence about pairs of images: of which it is true, and which objects of each it is about."""

    text: str
    truth: tuple[bool, ...]
    targets: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


def draw_sentences(pairs: Sequence[tuple[Objects, Objects]], rng: Random) -> list[Sentence] | None:
    """Two sentences of different kinds, each true of half of the pairs; None where too few are found."""
    found: dict[str, Sentence] = {}
    for kind, text, described, holds in _sentences(pairs, rng):
        counts = [tuple(len(matching(described, objects)) for objects in pair) for pair in pairs]
        truth = tuple(holds(left, right) for left, right in counts)
        if sum(truth) * 2 == len(pairs) and kind not in found:
            targets = tuple((matching(described, left), matching(described, right)) for left, right in pairs)
            found[kind] = Sentence(text, truth, targets)
            if len(found) == 2:
                return list(found.values())
    return None


def _sentences(
    pairs: Sequence[tuple[Objects, Objects]], rng: Random
) -> Iterator[tuple[str, str, Description, Callable[[int, int], bool]]]:
    """Kind, text, what it is about, and whether it holds of so many of them left and right; at random."""
    seen = [item for pair in pairs for objects in pair for item in objects]
    for _ in range(_TRIES):
        item = rng.choice(seen)
        described = rng.choice(
            (
                Description(shape=item.shape),
                Description(color=item.color),
                Description(color=item.color, shape=item.shape),
            )
        )
        a, many, n = with_article(described.noun), described.plural, rng.randint(1, len(_NUMBERS) - 1)
        in_all = f"{_NUMBERS[n]} {described.noun if n == 1 else many}"
        kind, text, holds = rng.choice(_kinds(a, many, n, in_all))
        yield kind, text, described, holds


def _kinds(a: str, many: str, n: int, in_all: str) -> list[tuple[str, str, Callable[[int, int], bool]]]:
    return [
        ("left", f"There is {a} in the left picture.", lambda left, right: left > 0),
        ("right", f"There is {a} in the right picture.", lambda left, right: right > 0),
        ("both", f"Both pictures show {a}.", lambda left, right: left > 0 and right > 0),
        ("one", f"Exactly one of the pictures shows {a}.", lambda left, right: (left > 0) != (right > 0)),
        ("neither", f"Neither picture shows {a}.", lambda left, right: left + right == 0),
        ("in all", f"The pictures show {in_all} in all.", lambda left, right: left + right == n),
        ("more left", f"The left picture shows more {many} than the right one.", lambda left, right: left > right),
        ("more right", f"The right picture shows more {many} than the left one.", lambda left, right: right > left),
    ]


def statement_only(train: Iterable[tuple[str, str]], test: Iterable[tuple[str, str]]) -> float:
    """Accuracy in percent on (text, label) of what knows no image: it guesses the text's most frequent label."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for text, label in train:
        for key in (text, ""):
            counts[key][label] += 1
    guesses = {text: max(known, key=known.__getitem__) for text, known in counts.items()}
    right = [guesses.get(text, guesses.get("")) == label for text, label in test]
    return 100 * sum(right) / max(1, len(right))
