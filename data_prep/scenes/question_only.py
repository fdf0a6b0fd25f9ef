"""The question-only baseline: the accuracy of the best answer to each question string, without any image.

    vlabs prepare question_only --raw-dir data/vqa_v2 --train train --val val

A model that does not beat these numbers has not used the images.

Download: what `vlabs prepare vqav2` takes.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.readers.vqav2 import VQAv2
from vlabs.errors import UserError, run_cli
from vlabs.metrics.vqa import match_accuracy

Record = Mapping[str, Any]


def answer_scores(annotation: Record) -> dict[str, float]:
    """The official accuracy, in [0, 1], of every answer to one question; answers are compared as they are written."""
    counts = Counter(given["answer"] for given in annotation["answers"])
    return {answer: match_accuracy(same, counts.total()) for answer, same in counts.items()}


def question_only_accuracy(
    train_annotations: Sequence[Record],
    train_questions: Sequence[Record],
    val_annotations: Sequence[Record],
    val_questions: Sequence[Record],
) -> dict[str, float]:
    """Accuracy on val, in percent, of giving each question string the one answer that scores best on train.

    A string that train lacks gets the best answer of its question type, and failing that the best answer of all.

    Args:
        train_annotations, val_annotations: the `annotations` lists of VQA v2 annotation files.
        train_questions, val_questions: the `questions` lists of the matching question files.

    Returns:
        One entry per question type, then "overall" and "not yes/no" (all answer types but yes/no); only groups that
        have questions in val.

    Raises:
        UserError: if an annotation's question is missing or train or val is empty.
    """
    if not train_annotations or not val_annotations:
        raise UserError("question-only accuracy needs annotations in both train and val, and one of them has none")
    totals: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for annotation, text in _with_text(train_annotations, train_questions):
        for answer, score in answer_scores(annotation).items():
            for key in _keys(annotation, text):
                totals[key][answer] += score
    best = {key: max(scores.items(), key=lambda item: item[1])[0] for key, scores in totals.items()}

    groups: dict[str, list[float]] = defaultdict(list)
    for annotation, text in _with_text(val_annotations, val_questions):
        answer = next(best[key] for key in _keys(annotation, text) if key in best)
        score = 100 * answer_scores(annotation).get(answer, 0.0)
        groups[annotation["question_type"]].append(score)
        groups["overall"].append(score)
        if annotation["answer_type"] != "yes/no":
            groups["not yes/no"].append(score)
    order = sorted(groups, key=lambda name: (name in ("overall", "not yes/no"), name != "overall", name))
    return {name: sum(groups[name]) / len(groups[name]) for name in order}


def _keys(annotation: Record, text: str) -> tuple[tuple[str, str], ...]:
    """What an answer is looked up by, in turn."""
    return ("question", text), ("type", annotation["question_type"]), ("all", "")


def _with_text(annotations: Sequence[Record], questions: Sequence[Record]) -> Iterable[tuple[Record, str]]:
    texts = {question["question_id"]: question["question"] for question in questions}
    for annotation in annotations:
        if annotation["question_id"] not in texts:
            raise UserError(f"question {annotation['question_id']} has an annotation but is in no question list")
        yield annotation, texts[annotation["question_id"]]


def format_table(accuracy: Mapping[str, float]) -> str:
    """The accuracies as lines of text, in percent."""
    width = max(map(len, accuracy))
    lines = [f"{name:<{width}}  {value:6.2f}" for name, value in accuracy.items()]
    return "\n".join([f"{'question alone':<{width}}       %", *lines])


def read_split(raw_dir: Path, name: str) -> tuple[list[Record], list[Record]]:
    """The (annotations, questions) lists of one split of a folder that `VQAv2` reads."""
    raw = VQAv2(raw_dir)
    split = raw.splits.get(name)
    if split is None or split.annotations is None:
        raise UserError(f"there is no split '{name}' with annotations: choose of {', '.join(raw.splits)}")
    return list(split.annotations.entries("annotations")), list(split.questions.entries("questions"))


def main() -> None:
    """Print the table of a raw folder."""
    parser = argparse.ArgumentParser(prog="vlabs prepare question_only", description=__doc__)
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder of VQA v2 question and annotation zips")
    parser.add_argument("--train", default="train", help="split that the answers are chosen on (default: train)")
    parser.add_argument("--val", default="val", help="split that they are scored on (default: val)")
    args = parser.parse_args()
    train, val = read_split(args.raw_dir, args.train), read_split(args.raw_dir, args.val)
    print(format_table(question_only_accuracy(*train, *val)))


if __name__ == "__main__":
    run_cli(main)
