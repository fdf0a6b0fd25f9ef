"""The official VQA accuracy (Antol et al., ICCV 2015; `vqaEval.py` of the VQA API), with all its quirks.

An answer's accuracy is the mean, over the ten sets that leave one human answer out, of min(1, matches / 3). Strings are
compared as they are where the ten humans wrote the same string, and in normalized form everywhere else.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from vlabs.errors import UserError

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
# The official pattern was meant to spare decimal points on both sides; `(?!<=` makes the first half say nothing.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# The official call hands `re.UNICODE`, which is 32, to `sub` where it expects the number of replacements.
_MOST_PERIODS = 32
_HUMANS = 10
_ARTICLES = {"a", "an", "the"}
_NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
# The official table. Words are looked up in lower case, so its capitalized keys never match.
_CONTRACTIONS = {
    "aint": "ain't",
    "arent": "aren't",
    "cant": "can't",
    "couldve": "could've",
    "couldnt": "couldn't",
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "didnt": "didn't",
    "doesnt": "doesn't",
    "dont": "don't",
    "hadnt": "hadn't",
    "hadnt've": "hadn't've",
    "hadn'tve": "hadn't've",
    "hasnt": "hasn't",
    "havent": "haven't",
    "hed": "he'd",
    "hed've": "he'd've",
    "he'dve": "he'd've",
    "hes": "he's",
    "howd": "how'd",
    "howll": "how'll",
    "hows": "how's",
    "Id've": "I'd've",
    "I'dve": "I'd've",
    "Im": "I'm",
    "Ive": "I've",
    "isnt": "isn't",
    "itd": "it'd",
    "itd've": "it'd've",
    "it'dve": "it'd've",
    "itll": "it'll",
    "let's": "let's",
    "maam": "ma'am",
    "mightnt": "mightn't",
    "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've",
    "mightve": "might've",
    "mustnt": "mustn't",
    "mustve": "must've",
    "neednt": "needn't",
    "notve": "not've",
    "oclock": "o'clock",
    "oughtnt": "oughtn't",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "shant": "shan't",
    "shed've": "she'd've",
    "she'dve": "she'd've",
    "she's": "she's",
    "shouldve": "should've",
    "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've",
    "shouldn'tve": "shouldn't've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
    "somebodyll": "somebody'll",
    "somebodys": "somebody's",
    "someoned": "someone'd",
    "someoned've": "someone'd've",
    "someone'dve": "someone'd've",
    "someonell": "someone'll",
    "someones": "someone's",
    "somethingd": "something'd",
    "somethingd've": "something'd've",
    "something'dve": "something'd've",
    "somethingll": "something'll",
    "thats": "that's",
    "thered": "there'd",
    "thered've": "there'd've",
    "there'dve": "there'd've",
    "therere": "there're",
    "theres": "there's",
    "theyd": "they'd",
    "theyd've": "they'd've",
    "they'dve": "they'd've",
    "theyll": "they'll",
    "theyre": "they're",
    "theyve": "they've",
    "twas": "'twas",
    "wasnt": "wasn't",
    "wed've": "we'd've",
    "we'dve": "we'd've",
    "weve": "we've",
    "werent": "weren't",
    "whatll": "what'll",
    "whatre": "what're",
    "whats": "what's",
    "whatve": "what've",
    "whens": "when's",
    "whered": "where'd",
    "wheres": "where's",
    "whereve": "where've",
    "whod": "who'd",
    "whod've": "who'd've",
    "who'dve": "who'd've",
    "wholl": "who'll",
    "whos": "who's",
    "whove": "who've",
    "whyll": "why'll",
    "whyre": "why're",
    "whys": "why's",
    "wont": "won't",
    "wouldve": "would've",
    "wouldnt": "wouldn't",
    "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "youd": "you'd",
    "youd've": "you'd've",
    "you'dve": "you'd've",
    "youll": "you'll",
    "youre": "you're",
    "youve": "you've",
}


class VqaAccuracy(TypedDict):
    """Accuracies in percent, unrounded; the types are in order of first appearance in the annotations."""

    overall: float
    per_question_type: dict[str, float]
    per_answer_type: dict[str, float]
    per_question: dict[int | str, float]


def clean_answer(answer: str) -> str:
    """Return the answer with newlines and tabs as spaces and bare ends: what the evaluation does to every string."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str) -> str:
    """Return the official normal form: punctuation, lower case, number words, articles, contractions (in this order).

    The result can be empty ("a", "..."), and holds single spaces only.
    """
    answer = clean_answer(answer)
    comma_between_digits = _COMMA_BETWEEN_DIGITS.search(answer) is not None
    text = answer
    for mark in _PUNCTUATION:
        # As the official code does: tested in the whole answer, not at each mark.
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or comma_between_digits else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def match_accuracy(matches: int, total: int) -> float:
    """Return the official accuracy, in [0, 1], of an answer that `matches` of `total` human answers agree with."""
    # The mean over leaving each person out of min(1, how many of the rest agree / 3).
    left_out_agrees = min(1.0, (matches - 1) / 3)
    left_out_differs = min(1.0, matches / 3)
    return (matches * left_out_agrees + (total - matches) * left_out_differs) / total


def ten_answers(answers: Sequence[str]) -> list[str]:
    """Return at least ten answers, repeating the given ones in turn, because the official accuracy assumes ten.

    Otherwise a single answer to a question would score 0, and two people who agree 33%.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("an answer's accuracy needs at least one human answer")
    return list(itertools.islice(itertools.cycle(answers), max(_HUMANS, len(answers))))


def answer_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the official accuracy, in [0, 1], of one prediction against the human answers: ten, see `ten_answers`.

    Raises:
        ValueError: there are no answers.
    """
    answers = [clean_answer(answer) for answer in ten_answers(answers)]
    prediction = clean_answer(prediction)
    if len(set(answers)) > 1:
        answers = [normalize_answer(answer) for answer in answers]
        prediction = normalize_answer(prediction)
    return match_accuracy(answers.count(prediction), len(answers))


def vqa_accuracy(annotations: str | Path | Mapping[str, Any], results: str | Path | Sequence[Any]) -> VqaAccuracy:
    """Evaluate answers as the official evaluation does.

    Args:
        annotations: a file in the format of `v2_mscoco_val2014_annotations.json`, or what is in it.
        results: a file with a list of `{"question_id": int or str, "answer": str}`, or that list.

    Raises:
        UserError: a file cannot be read or has another format, or the results do not answer every question of the
            annotations exactly once.
    """
    answered = _read_results(results)
    annotated = _read_annotations(annotations)
    _check_same_questions(annotated, answered)
    per_question: dict[int | str, float] = {}
    by_question_type: defaultdict[str, list[float]] = defaultdict(list)
    by_answer_type: defaultdict[str, list[float]] = defaultdict(list)
    for question_id, annotation in annotated.items():
        humans = [answer["answer"] for answer in annotation["answers"]]
        accuracy = 100 * answer_accuracy(answered[question_id], humans)
        per_question[question_id] = accuracy
        by_question_type[annotation["question_type"]].append(accuracy)
        by_answer_type[annotation["answer_type"]].append(accuracy)
    return VqaAccuracy(
        overall=_mean(list(per_question.values())),
        per_question_type={name: _mean(values) for name, values in by_question_type.items()},
        per_answer_type={name: _mean(values) for name, values in by_answer_type.items()},
        per_question=per_question,
    )


def yes_no(answers: Sequence[str], truths: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 of the answer yes, and the share of yes, in percent, as POPE reports them.

    Args:
        answers: any but yes counts as no.
        truths: yes or no.
    """
    said = [answer == "yes" for answer in answers]
    true = [truth == "yes" for truth in truths]
    both = sum(one and other for one, other in zip(said, true, strict=True))
    return {
        "precision": 100 * both / max(sum(said), 1),
        "recall": 100 * both / max(sum(true), 1),
        "f1": 200 * both / max(sum(said) + sum(true), 1),
        "yes": 100 * sum(said) / max(len(said), 1),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _read_json(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None


def _read_annotations(source: str | Path | Mapping[str, Any]) -> dict[int | str, Mapping[str, Any]]:
    loaded = _read_json(source) if isinstance(source, str | Path) else source
    name = str(source) if isinstance(source, str | Path) else "the annotations"
    if not isinstance(loaded, Mapping) or not isinstance(loaded.get("annotations"), list):
        raise UserError(f"{name}: not VQA annotations (an object with a list 'annotations')")
    annotated: dict[int | str, Mapping[str, Any]] = {}
    for number, entry in enumerate(loaded["annotations"]):
        try:
            question_id, answers = entry["question_id"], entry["answers"]
            complete = (
                isinstance(question_id, int | str)
                and isinstance(answers, list)
                and answers
                and all(isinstance(answer["answer"], str) for answer in answers)
                and isinstance(entry["question_type"], str)
                and isinstance(entry["answer_type"], str)
            )
        except (KeyError, TypeError):
            complete = False
        if not complete:
            raise UserError(
                f"{name}: annotation {number} needs 'question_id', 'question_type', 'answer_type' and 'answers'"
            )
        if question_id in annotated:
            raise UserError(f"{name}: question {question_id} is annotated twice")
        annotated[question_id] = entry
    if not annotated:
        raise UserError(f"{name}: there are no annotations")
    return annotated


def _read_results(source: str | Path | Sequence[Any]) -> dict[int | str, str]:
    loaded: Any = _read_json(source) if isinstance(source, str | Path) else source
    name = str(source) if isinstance(source, str | Path) else "the results"
    if isinstance(loaded, str | bytes) or not isinstance(loaded, Sequence):
        raise UserError(f"{name}: not VQA results (a list of objects with 'question_id' and 'answer')")
    for number, entry in enumerate(loaded):
        if (
            not isinstance(entry, Mapping)
            or not isinstance(entry.get("question_id"), int | str)
            or not isinstance(entry.get("answer"), str)
        ):
            raise UserError(
                f"{name}: result {number} needs a 'question_id', a whole number or text, and a text 'answer'"
            )
    counts = Counter(entry["question_id"] for entry in loaded)
    twice = [question_id for question_id, count in counts.items() if count > 1]
    if twice:
        raise UserError(f"{name}: answered more than once: {_listed(twice)}")
    return {entry["question_id"]: entry["answer"] for entry in loaded}


def _check_same_questions(annotated: Mapping[int | str, Any], answered: Mapping[int | str, Any]) -> None:
    missing = [question_id for question_id in annotated if question_id not in answered]
    unknown = [question_id for question_id in answered if question_id not in annotated]
    problems = []
    if missing:
        problems.append(f"no answer to {_listed(missing)}")
    if unknown:
        problems.append(f"answers to questions that the annotations do not have: {_listed(unknown)}")
    if problems:
        raise UserError(f"the results do not fit the annotations: {'; '.join(problems)}")


def _listed(question_ids: Iterable[Hashable], most: int = 10) -> str:
    names = [str(question_id) for question_id in question_ids]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (
        f"question {', '.join(names[:most])}{more}" if len(names) == 1 else f"questions {', '.join(names[:most])}{more}"
    )


def types_table(accuracy: VqaAccuracy) -> list[list[str]]:
    """Rows of a table: the accuracies by answer type and by question type, best first."""
    kinds = {"answer type": accuracy["per_answer_type"], "question type": accuracy["per_question_type"]}
    return [
        [f"{kind}: {name}", f"{value:.2f}"]
        for kind, values in kinds.items()
        for name, value in sorted(values.items(), key=lambda item: (-item[1], item[0]))
    ]
