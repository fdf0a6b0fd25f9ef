"""How far the question alone gets: the accuracy of the best answer to each question string, without any image.

    python -m data_prep.question_only --raw-dir data/vqa_v2 --train train --val val

reads the zips of a folder in the VQA v2 layout. A model that does not beat these numbers has not looked.
"""

from __future__ import annotations

import argparse
import json
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlabs.errors import UserError, run_cli

Record = Mapping[str, Any]


def answer_scores(annotation: Record) -> dict[str, float]:
    """The official VQA accuracy of every answer to one question, in 0..1.

    An answer that n of the ten annotators gave scores min(1, n / 3), averaged over the ten ways to leave one annotator
    out: 0.3, 0.6, 0.9 and 1 for n = 1, 2, 3 and more. Answers are compared as they are written.
    """
    answers = [given["answer"] for given in annotation["answers"]]
    scores = {}
    for answer in dict.fromkeys(answers):
        same = answers.count(answer)
        left_out = [same - (given == answer) for given in answers]
        scores[answer] = sum(min(1.0, others / 3) for others in left_out) / len(answers)
    return scores


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
        One entry a question type, then "overall" and "not yes/no" (all answer types but yes/no); only groups that
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


def read_split(raw_dir: Path, split: str) -> tuple[list[Record], list[Record]]:
    """The (annotations, questions) lists of one split ("train", "val", ...) of a folder in the VQA v2 layout."""
    label = split.capitalize()
    annotations = _read_member(raw_dir / f"v2_Annotations_{label}_mscoco.zip", f"v2_mscoco_{split}")
    questions = _read_member(raw_dir / f"v2_Questions_{label}_mscoco.zip", f"v2_OpenEnded_mscoco_{split}")
    return annotations["annotations"], questions["questions"]


def _read_member(path: Path, prefix: str) -> dict[str, Any]:
    """The JSON member `<prefix><year>_*.json` of a zip; test-dev's, beside test's, has no digit there."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; --raw-dir takes a folder of VQA v2 zips")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            stem = name.rsplit("/", 1)[-1]
            if stem.startswith(prefix) and stem[len(prefix) :][:1].isdigit() and stem.endswith(".json"):
                content: dict[str, Any] = json.loads(archive.read(name))
                return content
    raise UserError(f"{path} has no member {prefix}*.json")


def main() -> None:
    """Print the table of a raw folder."""
    parser = argparse.ArgumentParser(description="accuracy of the best question-only answers")
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder of VQA v2 question and annotation zips")
    parser.add_argument("--train", default="train", help="split that the answers are chosen on (default: train)")
    parser.add_argument("--val", default="val", help="split that they are scored on (default: val)")
    args = parser.parse_args()
    train, val = read_split(args.raw_dir, args.train), read_split(args.raw_dir, args.val)
    print(format_table(question_only_accuracy(*train, *val)))


if __name__ == "__main__":
    run_cli(main)
