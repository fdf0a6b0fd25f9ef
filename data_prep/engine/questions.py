"""Questions and their answers on the way to the prepared form."""

from __future__ import annotations

import argparse
import functools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.engine.index import Index, as_json, check_value
from data_prep.engine.pipeline import Kind, write_json
from vlabs.data.prepared import VQA_FEATURES, read_answers
from vlabs.errors import UserError
from vlabs.metrics.vqa import clean_answer, match_accuracy, normalize_answer

_COLUMNS = "annotated INTEGER DEFAULT 0, answers TEXT, answer_type TEXT, question_type TEXT,"


class QuestionIndex(Index):
    """The questions and answers of all splits, on disk. Bad ones are noted, and stay out.

    Args:
        path: sqlite file to make.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "question", _COLUMNS)
        self._major_answers: Counter[str] = Counter()

    def add_question(
        self,
        where: str,
        *,
        split: str,
        image_id: int,
        image_name: str,
        question_id: int,
        question: str,
        regions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Add one question; `where` names its place in the raw data, `regions` are as in `data_prep.engine.regions`.

        Raises:
            UserError: a value is of the wrong kind.
        """
        self._add(
            where,
            split=split,
            image_id=image_id,
            image_name=image_name,
            item_id=question_id,
            text=question,
            regions=regions,
        )

    def replace_regions(self, regions: Mapping[int, Sequence[Mapping[str, Any]]]) -> int:
        """Give questions these regions, by their ids in any split, in place of others; return how many were found."""
        splits = [split for (split,) in self.connection.execute("SELECT DISTINCT split FROM items")]
        update = "UPDATE items SET regions = ? WHERE split = ? AND item_id = ?"
        found = 0
        for question_id, values in regions.items():
            if question_id < 2**63:  # sqlite takes no larger ones
                rows = [(json.dumps(list(values)), split, question_id) for split in splits]
                found += sum(self.connection.execute(update, row).rowcount for row in rows) > 0
        return found

    def add_annotation(
        self,
        where: str,
        *,
        split: str,
        question_id: int,
        answers: Sequence[str],
        answer_type: str,
        question_type: str,
        target_instances: Sequence[int] = (),
        regions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Add the human answers to a question of the index.

        `regions`, as in `engine.regions`, replace those that the question was added with, where there are any.

        Raises:
            UserError: a value is of the wrong kind.
        """
        check_value(where, "question_id", question_id, int)
        check_value(where, "answer_type", answer_type, str)
        check_value(where, "question_type", question_type, str)
        for answer in answers:
            check_value(where, "answer", answer, str)
        targets = as_json(where, target_instances)
        if not answers:
            self.add_bad("question without answers", split, f"question {question_id}")
        try:
            changed = self.connection.execute(
                "UPDATE items SET annotated = 1, dropped = max(dropped, ?), answers = ?, answer_type = ?,"
                " question_type = ?, target_instances = ?, regions = coalesce(?, regions)"
                " WHERE split = ? AND item_id = ? AND NOT annotated",
                (
                    not answers,
                    json.dumps(list(answers), ensure_ascii=False),
                    answer_type,
                    question_type,
                    targets,
                    json.dumps(list(regions)) if regions else None,
                    split,
                    question_id,
                ),
            ).rowcount
        except (OverflowError, UnicodeEncodeError) as error:
            raise UserError(f"{where} cannot be stored: {error}") from None
        if not changed:
            known = self.connection.execute(
                "SELECT 1 FROM items WHERE split = ? AND item_id = ?", (split, question_id)
            ).fetchone()
            reason = "duplicate question id" if known else "annotation without question"
            self.add_bad(reason, split, f"annotation of question {question_id}")

    def count_answer(self, normalized_major_answer: str) -> None:
        """Count a train or val question's major answer for the vocabulary, whose order is that of first appearance."""
        self._major_answers[normalized_major_answer] += 1

    def vocabulary(self, min_count: int) -> list[str]:
        """Return the answers that were counted at least `min_count` times; none where none were counted at all.

        Raises:
            UserError: answers were counted, but none so often.
        """
        kept = [answer for answer, count in self._major_answers.items() if count >= min_count]
        if self._major_answers and not kept:
            answer, count = self._major_answers.most_common(1)[0]
            raise UserError(
                f"no answer is the major answer of {min_count} questions (the most frequent, '{answer}', is of {count}"
                "): lower --min-answer-count"
            )
        return kept

    def write_files(self, prepared: Path, min_answer_count: int) -> None:
        """Write the answer vocabulary.

        Raises:
            UserError: no answer is frequent enough.
        """
        vocabulary = self.vocabulary(min_answer_count)
        write_json(prepared / "answers.json", vocabulary)
        print(f"{len(vocabulary):,} answers in the vocabulary")

    def finish(self) -> None:
        """Leave out what is bad, unanswered questions among answered ones included, and close the file.

        Raises:
            UserError: no question is left.
        """
        unanswered = "NOT annotated AND NOT dropped AND split IN (SELECT DISTINCT split FROM items WHERE annotated)"
        self.connection.executescript(
            "INSERT INTO bad SELECT 'question without annotation', split, 'question ' || item_id FROM items"
            f" WHERE {unanswered} ORDER BY split, item_id;"
            f"UPDATE items SET dropped = 1 WHERE {unanswered};"
        )
        super().finish()


@dataclass(frozen=True)
class SoftScores:
    """The official accuracy of every vocabulary answer against the human answers of a question.

    `answer_accuracy` of every vocabulary answer gives the same; here only the answers that can score are looked at.
    """

    ids: dict[str, list[int]]
    normalized_ids: dict[str, list[int]]

    @classmethod
    def of_vocabulary(cls, vocabulary: Sequence[str]) -> SoftScores:
        """Return the scores of a vocabulary; an answer's index is its id."""
        ids: defaultdict[str, list[int]] = defaultdict(list)
        normalized_ids: defaultdict[str, list[int]] = defaultdict(list)
        for index, answer in enumerate(vocabulary):
            ids[clean_answer(answer)].append(index)
            normalized_ids[normalize_answer(answer)].append(index)
        return cls(dict(ids), dict(normalized_ids))

    def __call__(self, answers: Sequence[str]) -> tuple[list[int], list[float]]:
        """Return the ids, ascending, of the vocabulary answers that score above 0, and their scores in (0, 1]."""
        cleaned = [clean_answer(answer) for answer in answers]
        # Without a second opinion the official evaluation compares strings as they are.
        differ = len(set(cleaned)) > 1
        counts = Counter(map(normalize_answer, cleaned) if differ else cleaned)
        ids = self.normalized_ids if differ else self.ids
        scores = {
            index: match_accuracy(count, len(cleaned))
            for answer, count in counts.items()
            for index in ids.get(answer, ())
        }
        kept = sorted((index, score) for index, score in scores.items() if score > 0)
        return [index for index, _ in kept], [score for _, score in kept]


class QuestionRows:
    """Makes rows of an image and its questions, with the soft scores of the vocabulary's answers.

    Args:
        prepared: folder with the vocabulary.
    """

    features = VQA_FEATURES
    columns: tuple[str, ...] = (
        "item_id",
        "text",
        "answers",
        "answer_type",
        "question_type",
        "target_instances",
        "regions",
    )

    def __init__(self, prepared: Path) -> None:
        self.vocabulary = read_answers(prepared)
        self.scores: Callable[[tuple[str, ...]], tuple[list[int], list[float]]]
        self.scores = functools.lru_cache(maxsize=4096)(SoftScores.of_vocabulary(self.vocabulary))

    def entry(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return a question's entry in every list of its image's row."""
        question_id, question, answers, answer_type, question_type, targets, regions = values
        answer_list: list[str] = json.loads(answers) if answers else []
        answer_ids, answer_scores = self.scores(tuple(answer_list)) if answer_list else ([], [])
        return {
            "question_id": question_id,
            "question": question,
            "answers": answer_list,
            "answer_ids": answer_ids,
            "answer_scores": answer_scores,
            "answer_type": answer_type or "",
            "question_type": question_type or "",
            "target_instances": json.loads(targets) if targets else [],
            "region": json.loads(regions) if regions else [],
        }

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Return what a row adds to the counts of its split."""
        return {
            "questions": len(row["question_id"]),
            "answers": sum(map(len, row["answers"])),
            "questions_with_vocabulary_answer": sum(map(bool, row["answer_ids"])),
            "questions_with_region": sum(map(bool, row["region"])),
        }

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of the whole folder."""
        return {"vocabulary": len(self.vocabulary)}


QUESTIONS = Kind("vqa", QuestionIndex, QuestionRows)


def add_answer_options(parser: argparse.ArgumentParser, min_answer_count: int) -> None:
    """Add the options that only questions have to a command line."""
    parser.add_argument(
        "--min-answer-count",
        type=int,
        default=min_answer_count,
        help="questions: how often an answer must be a question's major answer to be in the vocabulary"
        " (default %(default)s)",
    )
