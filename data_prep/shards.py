"""One shard of a prepared split: rows of images with their questions, built in one process of several."""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sqlite3
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.images import fingerprint, read_image, read_images
from vlabs.metrics.vqa import clean_answer, match_accuracy, normalize_answer

# A record batch ends after this much, so that memory does not follow the size of the images.
_BATCH_BYTES = 16 * 2**20


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to build one shard."""

    split: str
    source: str  # of the images, a key of the table `images`
    first_image: int
    last_image: int
    data_file: Path
    record_file: Path


@dataclass(frozen=True)
class BadItem:
    """Something in the raw data that cannot be used."""

    reason: str
    split: str
    item: str


@dataclass(frozen=True)
class ShardRecord:
    """What a finished shard holds; lies beside it as JSON until the whole folder is finished."""

    sha256: str
    images_fingerprint: str  # of the raw images
    images: int
    questions: int
    answers: int
    questions_with_vocabulary_answer: int
    bad: list[BadItem]

    def write(self, path: Path) -> None:
        """Write the record, under its name only once it is whole."""
        part = path.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)), encoding="utf-8")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> ShardRecord:
        """Return a record that was written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**values, "bad": [BadItem(**item) for item in values["bad"]]})


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


class ShardBuilder:
    """Builds shards from the index of the questions and the table of the images.

    Args:
        questions_file: sqlite file with the table `questions` of `data_prep.pipeline`.
        images_file: sqlite file with the table `images` of `data_prep.images`.
        vocabulary: the answers that get a score.
        schema: Arrow schema of a row.
    """

    def __init__(self, questions_file: Path, images_file: Path, vocabulary: Sequence[str], schema: pa.Schema) -> None:
        self.questions = open_readonly(questions_file)
        self.images = open_readonly(images_file)
        self.schema = schema
        soft_scores = SoftScores.of_vocabulary(vocabulary)
        self.scores: Callable[[tuple[str, ...]], tuple[list[int], list[float]]]
        self.scores = functools.lru_cache(maxsize=4096)(soft_scores)

    def build(self, task: ShardTask) -> int:
        """Write the shard and its record, each under its name only once it is whole; return the number of images."""
        images = read_images(self.images, task.source, task.first_image, task.last_image)
        counts: Counter[str] = Counter()
        bad: list[BadItem] = []
        part = task.data_file.with_suffix(".part")
        with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_stream(sink, self.schema) as writer:
            rows: list[dict[str, Any]] = []
            waiting_bytes = 0
            for row in self._rows(task):
                counts["seen"] += 1
                name, image = row.pop("image_name"), images.get(row["image_id"])
                if image is None:
                    bad.append(BadItem("missing image", task.split, name))
                    continue
                try:
                    row["image"] = read_image(image)
                except ValueError as error:
                    bad.append(BadItem("unreadable image", task.split, f"{image.name} ({error})"))
                    continue
                counts["images"] += 1
                counts["questions"] += len(row["question_id"])
                counts["answers"] += sum(map(len, row["answers"]))
                counts["with_vocabulary_answer"] += sum(map(bool, row["answer_ids"]))
                rows.append(row)
                waiting_bytes += len(row["image"])
                if waiting_bytes >= _BATCH_BYTES:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))
                    rows, waiting_bytes = [], 0
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=self.schema))
        with part.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        part.replace(task.data_file)
        ShardRecord(
            sha256=digest,
            images_fingerprint=fingerprint(images),
            images=counts["images"],
            questions=counts["questions"],
            answers=counts["answers"],
            questions_with_vocabulary_answer=counts["with_vocabulary_answer"],
            bad=bad,
        ).write(task.record_file)
        return counts["seen"]

    def _rows(self, task: ShardTask) -> Iterator[dict[str, Any]]:
        """Yield the shard's rows by image id, without the image, its questions by question id."""
        found = self.questions.execute(
            "SELECT image_id, image_name, question_id, question, answers, answer_type, question_type, target_instances"
            " FROM questions WHERE split = ? AND image_id BETWEEN ? AND ? ORDER BY image_id, question_id",
            (task.split, task.first_image, task.last_image),
        )
        row: dict[str, Any] = {}
        for image_id, image_name, question_id, question, answers, answer_type, question_type, targets in found:
            if row and row["image_id"] != image_id:
                yield row
                row = {}
            if not row:
                row = {"image_id": image_id, "image_name": image_name}
                for column in self.schema.names:
                    if column not in ("image_id", "image"):
                        row[column] = []
            answer_list: list[str] = json.loads(answers) if answers else []
            answer_ids, answer_scores = self.scores(tuple(answer_list)) if answer_list else ([], [])
            row["question_id"].append(question_id)
            row["question"].append(question)
            row["answers"].append(answer_list)
            row["answer_ids"].append(answer_ids)
            row["answer_scores"].append(answer_scores)
            row["answer_type"].append(answer_type or "")
            row["question_type"].append(question_type or "")
            row["target_instances"].append(json.loads(targets) if targets else [])
        if row:
            yield row


def open_readonly(path: Path) -> sqlite3.Connection:
    """Open a sqlite file that nobody writes to any more; the connection may be handed to another thread."""
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)


_builder: ShardBuilder | None = None


def start_worker(questions_file: Path, images_file: Path, vocabulary: Sequence[str], schema: pa.Schema) -> None:
    """Make this process a worker: it leaves Ctrl-C to its parent, and ends when the parent is gone."""
    global _builder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _builder = ShardBuilder(questions_file, images_file, vocabulary, schema)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def build_shard(task: ShardTask) -> int:
    """Build a shard in a worker; return the number of images that it was to hold."""
    assert _builder is not None
    return _builder.build(task)
