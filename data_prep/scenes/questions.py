"""Questions, answers and captions about a scene, balanced so that the question alone does not give the answer."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import NamedTuple

from data_prep.scenes.render import FILLS, SceneObject, SceneSize

MARGIN = 0.15  # of the image side: how far apart two centers are before one is "left of" the other
NEAR = 0.2  # in `relations`, how far apart they are at most: of two far apart, the place of either one tells the answer
MAX_TRAIN_WORDS = 10  # longer questions are the productive split's
QUOTA = {"yes/no": 2, "number": 1, "color": 2, "shape": 1, "relation": 2}  # questions of each type an image
RELATIONS: dict[str, Callable[[SceneObject, SceneObject], float]] = {  # how far the first is in that direction
    "left of": lambda item, anchor: anchor.x - item.x,
    "right of": lambda item, anchor: item.x - anchor.x,
    "above": lambda item, anchor: anchor.y - item.y,
    "below": lambda item, anchor: item.y - anchor.y,
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MISTAKES = {  # what an annotator who looked badly says instead: the first that the corpus knows
    "red": ("orange", "purple"),
    "green": ("cyan",),
    "blue": ("purple",),
    "yellow": ("orange", "green"),
    "purple": ("blue",),
    "cyan": ("blue",),
    "orange": ("red",),
    "pink": ("purple",),
    "circle": ("moon", "square"),
    "square": ("diamond", "circle"),
    "triangle": ("star",),
    "star": ("cross",),
    "cross": ("star",),
    "heart": ("circle",),
    "diamond": ("square",),
    "moon": ("circle",),
    "yes": ("no",),
    "no": ("yes",),
}
_TEMPLATES = {
    "exists": ("Is there {a}?", "Are there any {many}?", "Does the picture show {a}?"),
    "count": ("How many {many} are there?", "How many {many} can you see?"),
    "color": ("What color is {the}?", "What is the color of {the}?", "Which color is {the}?"),
    "shape": ("What shape is {the}?", "What is the shape of {the}?", "Which shape is {the}?"),
    "relation color": ("What color is the object {place}?", "Which color is the object {place}?"),
    "relation shape": ("What shape is {place}?", "What shape is the object {place}?", "Which shape is {place}?"),
    "compare": ("Is {the} {place}?",),
}
_CAPTIONS = (
    "{a} {places}",
    "there is {a} {places}",
    "{a} is {places}",
    "the picture shows {a} {places}",
    "{a} lies {places}",
)


class Description(NamedTuple):
    """A description of objects; what is None is left open."""

    size: str | None = None
    fill: str | None = None
    color: str | None = None
    shape: str | None = None

    def matches(self, item: SceneObject) -> bool:
        """Whether the object is as described."""
        size, fill, color, shape = self
        return (
            (shape is None or shape == item.shape)
            and (color is None or color == item.color)
            and (size is None or size == item.size)
            and (fill is None or fill == item.fill)
        )

    @property
    def noun(self) -> str:
        """For example "large red star"."""
        return " ".join([*filter(None, self[:3]), self.shape or "object"])

    @property
    def plural(self) -> str:
        """For example "red crosses"."""
        return self.noun + ("es" if self.shape == "cross" else "s")


class Question(NamedTuple):
    """A possible question about a scene. Objects are given by their index in the scene."""

    kind: str  # the question_type of the annotation
    family: str  # of templates; answers are balanced in each
    text: str
    answer: str
    asked: tuple[int, ...]  # the objects the answer speaks of
    anchors: tuple[int, ...] = ()  # objects that only say which are meant
    mentions: tuple[Description, ...] = ()

    @property
    def targets(self) -> tuple[int, ...]:
        """Everything the question is about, the asked-about objects first."""
        return self.asked + tuple(index for index in self.anchors if index not in self.asked)

    @property
    def phrases(self) -> list[tuple[int, ...]]:
        """The targets of each phrase: one each if the question is how they lie, else all in one."""
        apart = self.anchors or self.family == "compare"
        return [(target,) for target in self.targets] if apart else [self.targets] if self.targets else []

    @property
    def balanced(self) -> list[str]:
        """What its answer must not follow from: its wording, family, words about an object beside it."""
        beside = self.mentions if self.anchors or len(self.mentions) > 1 else ()
        words = {value for description in beside for value in description if value}
        return [self.text, self.family, *(f"{self.family}/{word}" for word in sorted(words))]


class Caption(NamedTuple):
    """A sentence and the indices of the objects it names."""

    text: str
    targets: tuple[int, ...]


def with_article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


# --- questions one could ask ---------------------------------------------------------------------------------------


def possible_questions(objects: Sequence[SceneObject], size: SceneSize, split: str, rng: Random) -> list[Question]:
    """Questions with unambiguous answers, at most one wording of each, from which `Balance.choose` takes some.

    A held-out pair is mentioned in `systematic` only, and there every question asks about one.
    """
    if split == "productive":
        questions = list(_chains(objects, rng))
    elif split == "relations":
        questions = list(_compares(objects, rng, tuple(RELATIONS), NEAR))
    else:
        questions = [*_exists(objects, size, split, rng), *_counts(objects, size, split, rng)]
        questions += [*_attributes(objects, rng), *_relations(objects, rng), *_compares(objects, rng)]

    def held_out(pair: SceneObject | Description) -> bool:
        return (pair.color, pair.shape) in size.held_out

    def fits(question: Question) -> bool:
        if (len(question.text.split()) > MAX_TRAIN_WORDS) != (split == "productive"):
            return False
        mentioned = any(map(held_out, question.mentions))
        if split != "systematic":
            return not mentioned
        return mentioned if not question.asked else all(held_out(objects[index]) for index in question.asked)

    distinct = {question.text: question for question in questions if fits(question)}
    return list(distinct.values())


def _say(family: str, rng: Random, description: Description | None = None, place: str = "") -> str:
    words = {"place": place}
    if description is not None:
        words |= {"a": with_article(description.noun), "many": description.plural, "the": f"the {description.noun}"}
    return rng.choice(_TEMPLATES[family]).format(**words)


def matching(description: Description, objects: Sequence[SceneObject]) -> tuple[int, ...]:
    """The indices of the objects that are as described."""
    return tuple([index for index, item in enumerate(objects) if description.matches(item)])


def _random_description(size: SceneSize, split: str, rng: Random) -> Description:
    """One or two attributes at random, a pair of color and shape in half the cases."""
    if rng.random() < 0.5:
        held_out = split == "systematic" and rng.random() < 0.5
        color, shape = (
            rng.choice(sorted(size.held_out)) if held_out else (rng.choice(size.colors), rng.choice(size.shapes))
        )
        return Description(color=color, shape=shape)
    return rng.choice(
        (
            Description(shape=rng.choice(size.shapes)),
            Description(color=rng.choice(size.colors)),
            Description(size=rng.choice(("small", "large")), shape=rng.choice(size.shapes)),
            Description(fill=rng.choice(FILLS[1:]), shape=rng.choice(size.shapes)),
        )
    )


def _descriptions_of(item: SceneObject) -> list[Description]:
    """The ways in which the object is spoken of in training: a noun with one adjective, or either."""
    color, shape = item.color, item.shape
    found = [Description(shape=shape), Description(color=color), Description(color=color, shape=shape)]
    found += [Description(size=item.size, shape=shape), Description(size=item.size)]
    if item.fill != "solid":
        found += [Description(fill=item.fill, shape=shape), Description(fill=item.fill)]
    return found


def _exists(objects: Sequence[SceneObject], size: SceneSize, split: str, rng: Random) -> Iterator[Question]:
    described = [rng.choice(_descriptions_of(item)) for item in objects]
    described += [_random_description(size, split, rng) for _ in range(8)]
    for description in dict.fromkeys(described):
        found = matching(description, objects)
        answer = "yes" if found else "no"
        yield Question("yes/no", "exists", _say("exists", rng, description), answer, found, (), (description,))


def _counts(objects: Sequence[SceneObject], size: SceneSize, split: str, rng: Random) -> Iterator[Question]:
    described = [Description(shape=shape) for shape in size.shapes] + [
        Description(color=color) for color in size.colors
    ]
    described += [Description(color=item.color, shape=item.shape) for item in objects]
    described += [_random_description(size, split, rng) for _ in range(4)]
    for description in dict.fromkeys(described):
        found = matching(description, objects)
        if len(found) <= size.max_count:
            text = _say("count", rng, description)
            yield Question("number", "count", text, str(len(found)), found, (), (description,))


def _attributes(objects: Sequence[SceneObject], rng: Random) -> Iterator[Question]:
    """The color or the shape of an object that is described, and described uniquely, by something else."""
    for index, item in enumerate(objects):
        for description in _descriptions_of(item):
            if len(matching(description, objects)) > 1:
                continue
            mentions = (description,)
            if description.color is None:
                yield Question("color", "color", _say("color", rng, description), item.color, (index,), (), mentions)
            if description.shape is None:
                yield Question("shape", "shape", _say("shape", rng, description), item.shape, (index,), (), mentions)


def _names(index: int, objects: Sequence[SceneObject]) -> list[Description]:
    """Descriptions that fit this object only."""
    return [d for d in _descriptions_of(objects[index]) if d.shape is not None and len(matching(d, objects)) == 1]


def only_object(relation: str, anchor: SceneObject, objects: Sequence[SceneObject]) -> int | None:
    """The index of the object that is clearly in that direction from the anchor, if no other is so at all.

    Clearly is a distance of at least `MARGIN` between the centers along the relation's axis.
    """
    offsets = [RELATIONS[relation](item, anchor) for item in objects]
    towards = [index for index, offset in enumerate(offsets) if offset > 0]
    return towards[0] if len(towards) == 1 and offsets[towards[0]] >= MARGIN else None


def _relations(objects: Sequence[SceneObject], rng: Random) -> Iterator[Question]:
    for anchor, item in enumerate(objects):
        names = _names(anchor, objects)
        for relation in RELATIONS if names else ():
            asked = only_object(relation, item, objects)
            if asked is not None:
                yield from _relation_questions(objects[asked], asked, (anchor,), relation, rng.choice(names), "", rng)


def _relation_questions(
    item: SceneObject, asked: int, anchors: tuple[int, ...], relation: str, name: Description, via: str, rng: Random
) -> Iterator[Question]:
    place = f"{relation} {via}the {name.noun}"
    for family, answer in (("relation color", item.color), ("relation shape", item.shape)):
        yield Question("relation", family, _say(family, rng, None, place), answer, (asked,), anchors, (name,))


def _compares(
    objects: Sequence[SceneObject], rng: Random, relations: Sequence[str] = (), most: float = math.inf
) -> Iterator[Question]:
    """How any two objects lie that are less than `most` apart: in one of the directions, or in all `relations`."""
    all_names = [_names(index, objects) for index in range(len(objects))]
    for first, second in _pairs(len(objects)):
        names, others = all_names[first], all_names[second]
        for relation in relations or (rng.choice(list(RELATIONS)),):
            offset = RELATIONS[relation](objects[first], objects[second])
            if names and others and MARGIN <= abs(offset) < most:
                name, other = rng.choice(names), rng.choice(others)
                text = _say("compare", rng, name, f"{relation} the {other.noun}")
                answer = "yes" if offset > 0 else "no"
                yield Question("yes/no", "compare", text, answer, (first, second), (), (name, other))


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(first, second) for first in range(count) for second in range(count) if first != second]


def _chains(objects: Sequence[SceneObject], rng: Random) -> Iterator[Question]:
    """Two relations in a row, from an anchor with several adjectives: "left of the object above the large red star"."""
    for start, item in enumerate(objects):
        full = Description(item.size, None if item.fill == "solid" else item.fill, item.color, item.shape)
        names = [full._replace(fill=None), full._replace(size=None), full, full._replace(size=None, fill=None)]
        names = [name for name in names if len(matching(name, objects)) == 1]
        for relation in RELATIONS if names else ():
            middle = only_object(relation, item, objects)
            if middle is None:
                continue
            name = rng.choice(names)
            via = f"the object {relation} "
            for onward in RELATIONS:
                end = only_object(onward, objects[middle], objects)
                if onward != OPPOSITE[relation] and end is not None and end != start:
                    yield from _relation_questions(objects[end], end, (middle, start), onward, name, via, rng)
            onward, first = rng.choice(list(RELATIONS)), rng.choice([i for i in range(len(objects)) if i != middle])
            offset = RELATIONS[onward](objects[first], objects[middle])
            subjects = _names(first, objects)
            if subjects and first != start and abs(offset) >= MARGIN:
                subject = rng.choice(subjects)
                text = _say("compare", rng, subject, f"{onward} {via}the {name.noun}")
                answer = "yes" if offset > 0 else "no"
                yield Question("yes/no", "compare", text, answer, (first, middle), (start,), (subject, name))


# --- questions that are asked --------------------------------------------------------------------------------------


class Balance:
    """Chooses questions so that, over a split, no answer follows from the question.

    Among all questions that share one entry of `Question.balanced`, no answer may be more than a few ahead of the mean
    of the answers.
    """

    def __init__(self, text_slack: float = 1.0, family_slack: float = 3.0) -> None:
        self.text_slack, self.family_slack = text_slack, family_slack
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def choose(self, questions: Sequence[Question], rng: Random) -> list[Question]:
        """The questions of one image: its quota of each type, then whatever is left, as far as the balance allows.

        At least one is chosen: where none is within the slack, the one that is needed most.
        """
        shuffled = rng.sample(questions, len(questions))
        pool = sorted(shuffled, key=lambda question: sum(self._excesses(question)))
        chosen: list[Question] = []
        for kind, quota in QUOTA.items():
            self._take([question for question in pool if question.kind == kind], quota, chosen)
        self._take([question for question in pool if question not in chosen], sum(QUOTA.values()) - len(chosen), chosen)
        if not chosen:
            self._add(pool[0], chosen)
        rng.shuffle(chosen)
        return chosen

    def _take(self, pool: Sequence[Question], number: int, chosen: list[Question]) -> None:
        """Add up to `number` questions of the pool, in its order, to the chosen."""
        for question in pool if number else ():
            text, *others = self._excesses(question)
            if text <= self.text_slack and max(others) <= self.family_slack:
                self._add(question, chosen)
                number -= 1
                if number == 0:
                    return

    def _add(self, question: Question, chosen: list[Question]) -> None:
        chosen.append(question)
        for key in question.balanced:
            self.counts[key][question.answer] += 1

    def _excesses(self, question: Question) -> list[float]:
        """How much oftener than the mean of the answers seen so far its answer was given, wherever it is balanced."""
        excesses = []
        for key in question.balanced:
            counts = self.counts[key]
            seen = len(counts) + (question.answer not in counts)
            excesses.append(counts[question.answer] - sum(counts.values()) / max(2, seen))
        return excesses


def ten_answers(answer: str, size: SceneSize, rng: Random) -> list[str]:
    """Ten annotators' answers: the truth, and for 15% of questions one to four times the same plausible mistake."""
    mistakes = rng.randint(1, 4) if rng.random() < 0.15 else 0
    if answer.isdigit():
        wrong = rng.choice([str(near) for near in (int(answer) - 1, int(answer) + 1) if 0 <= near <= size.max_count])
    else:
        known = {*size.colors, *size.shapes, "yes", "no"}
        wrong = next(mistake for mistake in MISTAKES[answer] if mistake in known)
    answers = [wrong] * mistakes + [answer] * (10 - mistakes)
    rng.shuffle(answers)
    return answers


# --- captions ------------------------------------------------------------------------------------------------------


def captions(objects: Sequence[SceneObject], rng: Random, number: int = 5) -> list[Caption] | None:
    """Distinct captions, each naming two or three objects and how they lie; None if the scene has too few to say."""
    facts = [
        (first, second, relation)
        for first, second in _pairs(len(objects))
        for relation, offset in RELATIONS.items()
        if offset(objects[first], objects[second]) >= MARGIN
    ]
    rng.shuffle(facts)
    found: dict[str, Caption] = {}
    for turn in range(4 * number if facts else 0):
        first, second, relation = facts[turn % len(facts)]
        places = f"{relation} {_full_name(objects[second])}"
        targets: tuple[int, ...] = (first, second)
        more = [fact for fact in facts if fact[0] == first and fact[1] != second]
        if more and turn % 2 == 0:
            _, third, relation = rng.choice(more)
            places += f" and {relation} {_full_name(objects[third])}"
            targets = (first, second, third)
        text = rng.choice(_CAPTIONS).format(a=_full_name(objects[first]), places=places)
        found.setdefault(text, Caption(text[0].upper() + text[1:] + ".", targets))
    return list(found.values())[:number] if len(found) >= number else None


def _full_name(item: SceneObject) -> str:
    fill = None if item.fill == "solid" else item.fill
    return with_article(Description(item.size, fill, item.color, item.shape).noun)
