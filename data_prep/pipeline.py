"""From questions about images to the prepared form of `vlabs.data.prepared`: what every kind of raw data shares.

1. The questions and answers go into a sqlite index, one at a time, so memory does not follow their number.
2. Worker processes build shards of a fixed number of images; a finished shard has its final name and a record.
3. The finished folder gets its name, in one step, when nothing is left to do.

All that is written depends on the raw data and the options alone. Until the end it lies in `OUT.partial`, where a run
that was stopped, however roughly, goes on.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import concurrent.futures.process
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tqdm import tqdm

from data_prep.images import IMAGES_SCHEMA, ImageStore, fingerprint, read_images, write_images
from data_prep.shards import BadItem, ShardBuilder, ShardRecord, ShardTask, build_shard, open_readonly, start_worker
from vlabs.data.prepared import FORMAT_VERSION, VQA_FEATURES
from vlabs.errors import UserError

_QUESTIONS_SCHEMA = """
CREATE TABLE questions (
    split TEXT, question_id INTEGER, image_id INTEGER, image_name TEXT, question TEXT,
    annotated INTEGER DEFAULT 0, dropped INTEGER DEFAULT 0,
    answers TEXT, answer_type TEXT, question_type TEXT, target_instances TEXT,
    PRIMARY KEY (split, question_id)
) WITHOUT ROWID;
CREATE TABLE bad (reason TEXT, split TEXT, item TEXT);
"""
_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_BYTES = 256
_NAMED_BAD_ITEMS = 20


@dataclass(frozen=True)
class Options:
    """What a user chooses.

    Attributes:
        min_answer_count: how often an answer is a question's major answer in train + val to be in the vocabulary.
        vocab_size: size of the tokenizer trained on the train questions; 0 for none.
        on_bad: `error`, or `skip` to leave out what cannot be used.
        shard_size: images a file.
        num_workers: processes; has no influence on what is written.
        others: options of one kind of raw data.
    """

    min_answer_count: int
    vocab_size: int = 8192
    on_bad: str = "error"
    shard_size: int = 512
    num_workers: int = 1
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least in (("min_answer_count", 1), ("shard_size", 1), ("num_workers", 1), ("vocab_size", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        smallest = _BYTES + len(_SPECIAL_TOKENS)
        if 0 < self.vocab_size < smallest:
            raise UserError(f"--vocab-size must be 0 (no tokenizer) or at least {smallest}, not {self.vocab_size}")

    def recorded(self) -> dict[str, Any]:
        """Return the options that what is written depends on."""
        values = asdict(self)
        del values["num_workers"]
        return {**values.pop("others"), **values}


def add_options(parser: argparse.ArgumentParser, min_answer_count: int) -> None:
    """Add the options that every kind of raw data shares to a command line."""
    parser.add_argument("--out-dir", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--min-answer-count",
        type=int,
        default=min_answer_count,
        help="how often an answer must be a question's major answer to be in the vocabulary (default %(default)s)",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        default=8192,
        help="size of the tokenizer trained on the train questions; 0 for none (default %(default)s)",
    )
    parser.add_argument(
        "--on-bad",
        choices=("error", "skip"),
        default="error",
        help="what to do about images and questions that cannot be used (default %(default)s)",
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--num-workers", type=int, default=cores, help="processes (default: all cores)")
    parser.add_argument("--shard-size", type=int, default=512, help="images a file (default %(default)s)")


def read_options(arguments: argparse.Namespace, **others: Any) -> Options:
    """Return the options of `add_options`, and those of one kind of raw data, from a parsed command line."""
    return Options(
        min_answer_count=arguments.min_answer_count,
        vocab_size=arguments.vocab_size,
        on_bad=arguments.on_bad,
        shard_size=arguments.shard_size,
        num_workers=arguments.num_workers,
        others=others,
    )


class RawData(Protocol):
    """One kind of raw data.

    Attributes:
        name: goes into the manifest.
        tables: the files with questions and answers.
        images: the files and folders with images, for the manifest.
    """

    name: str
    tables: Sequence[Path]
    images: Sequence[Path]

    def fill(self, index: QuestionIndex) -> None:
        """Put all questions and answers into the index."""

    def image_store(self, split: str) -> tuple[str, ImageStore]:
        """Return where a split's images are, and a key; splits with the same key share their image ids."""


class QuestionIndex:
    """The questions and answers of all splits, on disk. Bad ones are noted, and stay out.

    Args:
        path: sqlite file to make.
    """

    def __init__(self, path: Path) -> None:
        self.connection = sqlite3.connect(path)
        self.connection.executescript(
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;"
        )
        self.connection.executescript(_QUESTIONS_SCHEMA)
        self._major_answers: Counter[str] = Counter()

    def add_question(
        self, where: str, *, split: str, image_id: int, image_name: str, question_id: int, question: str
    ) -> None:
        """Add one question; `where` names its place in the raw data.

        Raises:
            UserError: a value is of the wrong kind.
        """
        _check(where, "image_id", image_id, int)
        _check(where, "question_id", question_id, int)
        _check(where, "question", question, str)
        dropped = not question.strip()
        if dropped:
            self.add_bad("empty question", split, f"question {question_id}")
        try:
            self.connection.execute(
                "INSERT INTO questions (split, question_id, image_id, image_name, question, dropped)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (split, question_id, image_id, image_name, question, dropped),
            )
        except sqlite3.IntegrityError:
            self.add_bad("duplicate question id", split, f"question {question_id}")
        except (OverflowError, UnicodeEncodeError) as error:
            raise UserError(f"{where} cannot be stored: {error}") from None

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
    ) -> None:
        """Add the human answers to a question of the index.

        Raises:
            UserError: a value is of the wrong kind.
        """
        _check(where, "question_id", question_id, int)
        _check(where, "answer_type", answer_type, str)
        _check(where, "question_type", question_type, str)
        for answer in answers:
            _check(where, "answer", answer, str)
        for instance in target_instances:
            _check(where, "target_instances", instance, int)
        if not answers:
            self.add_bad("question without answers", split, f"question {question_id}")
        try:
            changed = self.connection.execute(
                "UPDATE questions SET annotated = 1, dropped = max(dropped, ?), answers = ?, answer_type = ?,"
                " question_type = ?, target_instances = ? WHERE split = ? AND question_id = ? AND NOT annotated",
                (
                    not answers,
                    json.dumps(list(answers), ensure_ascii=False),
                    answer_type,
                    question_type,
                    json.dumps(list(target_instances)) if target_instances else None,
                    split,
                    question_id,
                ),
            ).rowcount
        except (OverflowError, UnicodeEncodeError) as error:
            raise UserError(f"{where} cannot be stored: {error}") from None
        if not changed:
            known = self.connection.execute(
                "SELECT 1 FROM questions WHERE split = ? AND question_id = ?", (split, question_id)
            ).fetchone()
            reason = "duplicate question id" if known else "annotation without question"
            self.add_bad(reason, split, f"annotation of question {question_id}")

    def count_answer(self, normalized_major_answer: str) -> None:
        """Count a train or val question's major answer for the vocabulary, whose order is that of first appearance."""
        self._major_answers[normalized_major_answer] += 1

    def add_bad(self, reason: str, split: str, item: str) -> None:
        """Note a bad item."""
        self.connection.execute("INSERT INTO bad VALUES (?, ?, ?)", (reason, split, item))

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

    def finish(self) -> None:
        """Leave out what is bad, and close the file.

        Raises:
            UserError: no question is left.
        """
        unanswered = "NOT annotated AND NOT dropped AND split IN (SELECT DISTINCT split FROM questions WHERE annotated)"
        self.connection.executescript(
            "INSERT INTO bad SELECT 'question without annotation', split, 'question ' || question_id FROM questions"
            f" WHERE {unanswered} ORDER BY split, question_id;"
            f"UPDATE questions SET dropped = 1 WHERE {unanswered};"
            "DELETE FROM questions WHERE dropped;"
            "CREATE UNIQUE INDEX by_image ON questions (split, image_id, question_id);"
        )
        self.connection.commit()
        left = self.connection.execute("SELECT 1 FROM questions LIMIT 1").fetchone()
        first_bad = self.connection.execute("SELECT split, reason, item FROM bad LIMIT 1").fetchone()
        self.connection.close()
        if left is None:
            raise UserError(
                "there are no questions" + (f" that can be used ({': '.join(first_bad)})" if first_bad else "")
            )


def _check(where: str, name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        wanted = "a whole number" if kind is int else "text"
        raise UserError(f"{where}: '{name}' must be {wanted}, not {value!r:.80}")


def check_split_name(split: str, where: str) -> str:
    """Return a split's name.

    Raises:
        UserError: it cannot be the name of a folder beside the others.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", split) or split == "tokenizer":
        raise UserError(f"{where}: '{split}' cannot be a split's name (letters, digits, '_', '-' and '.')")
    return split


def prepare(raw: RawData, out_dir: Path, options: Options) -> None:
    """Make the prepared folder, or go on making it where an earlier run stopped.

    Raises:
        UserError: the raw data is bad, the folder exists and holds something else, or it cannot be written.
    """
    out_dir = out_dir.absolute()
    raw_files = [_describe(path, hashed=True) for path in raw.tables] + [_describe(path) for path in raw.images]
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        _check_same(out_dir, {"name": raw.name, "options": options.recorded(), "raw_files": raw_files})
        print(f"{out_dir} is there already, made from the same files with the same options")
        return
    partial = out_dir.with_name(out_dir.name + ".partial")
    try:
        with _locked(partial):
            run = _Run(raw, options, partial)
            run.start_or_go_on()
            run.read_questions()
            run.locate_images()
            run.build_shards()
            manifest = run.describe(raw_files)
            run.prepared.rename(out_dir)
            shutil.rmtree(partial)
    except (OSError, sqlite3.OperationalError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "full" in str(error)
        hint = "; free some space and run again, it goes on where it stopped" if full else ""
        raise UserError(f"cannot make {out_dir}: {error}{hint}") from error
    for split, counts in manifest["splits"].items():
        print(f"{split}: {counts['images']:,} images, {counts['questions']:,} questions, {counts['answers']:,} answers")
    print(f"{manifest['vocabulary']:,} answers in the vocabulary; {out_dir} is ready")


def _describe(path: Path, hashed: bool = False) -> dict[str, Any]:
    """Return a raw file's name, size in bytes and hash; of a folder, the number and size of its files."""
    if path.is_dir():
        sizes = [entry.stat().st_size for entry in os.scandir(path) if entry.is_file()]
        return {"name": f"{path.name}/", "files": len(sizes), "size": sum(sizes)}
    described: dict[str, Any] = {"name": path.name, "size": path.stat().st_size}
    if hashed:
        with path.open("rb") as file:
            described["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return described


def _check_same(out_dir: Path, wanted: dict[str, Any]) -> None:
    try:
        manifest = json.loads((out_dir / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{out_dir} exists and holds no prepared data: name another --out-dir") from None
    for name, value in wanted.items():
        if not isinstance(manifest, dict) or manifest.get(name) != value:
            what = "other options" if name == "options" else "other raw files"
            raise UserError(f"{out_dir} exists and was made from {what}: remove it or name another --out-dir")


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the folder under construction, so that two runs do not write to it at the same time."""
    lock = partial / "lock"
    if partial.exists() and not lock.exists() and (not partial.is_dir() or any(partial.iterdir())):
        raise UserError(f"{partial} exists and is not a folder under construction: move it away")
    partial.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {partial}: wait for it or name another --out-dir") from None
        yield


class _Run:
    """The steps of `prepare`, each of which finds what is done already."""

    def __init__(self, raw: RawData, options: Options, partial: Path) -> None:
        self.raw = raw
        self.options = options
        self.partial = partial
        self.prepared = partial / "prepared"
        self.records = partial / "records"
        self.questions_file = partial / "questions.sqlite"
        self.images_file = partial / "images.sqlite"
        self.answers_file = self.prepared / "answers.json"

    def start_or_go_on(self) -> None:
        """Keep what an earlier run left if it had the same tables and options; make the folders."""
        identity_file = self.partial / "inputs.json"
        options = self.options.recorded()
        del options["on_bad"]  # changes what happens in the end, not the shards
        tables = [
            {"name": path.name, "size": path.stat().st_size, "changed": path.stat().st_mtime_ns}
            for path in self.raw.tables
        ]
        identity = json.dumps(
            {"format": FORMAT_VERSION, "name": self.raw.name, "tables": tables, "options": options}, indent=1
        )
        if identity_file.exists() and identity_file.read_text(encoding="utf-8") == identity:
            print(f"going on in {self.partial}")
        else:
            if identity_file.exists():
                print(f"{self.partial} was made from other files or options: starting anew")
            for path in self.partial.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
            identity_file.write_text(identity, encoding="utf-8")
        self.prepared.mkdir(exist_ok=True)
        self.records.mkdir(exist_ok=True)

    def read_questions(self) -> None:
        """Make the index, the answer vocabulary and the tokenizer."""
        if self.questions_file.exists():
            return
        part = self.questions_file.with_suffix(".part")
        part.unlink(missing_ok=True)
        index = QuestionIndex(part)
        self.raw.fill(index)
        vocabulary = index.vocabulary(self.options.min_answer_count)
        index.finish()
        _write_json(self.answers_file, vocabulary)
        with closing(open_readonly(part)) as connection:
            if self.options.vocab_size and "train" in _splits(connection):
                print("training the tokenizer")
                found = connection.execute(
                    "SELECT question FROM questions WHERE split = 'train' ORDER BY image_id, question_id"
                )
                folder = self.prepared / "tokenizer"
                folder.mkdir(exist_ok=True)
                train_tokenizer((text for (text,) in found), self.options.vocab_size).save(
                    str(folder / "tokenizer.json")
                )
        part.replace(self.questions_file)

    def locate_images(self) -> None:
        """Note where every image is; anew in every run, because images can be mended between two runs."""
        self.images_file.unlink(missing_ok=True)
        with (
            closing(open_readonly(self.questions_file)) as questions,
            closing(sqlite3.connect(self.images_file)) as images,
        ):
            images.execute(IMAGES_SCHEMA)
            for split in _splits(questions):
                key, store = self.raw.image_store(split)
                # The index answers this in the order of the ids; GROUP BY keeps one name an image.
                wanted = questions.execute(
                    "SELECT image_id, min(image_name) FROM questions WHERE split = ? GROUP BY image_id", (split,)
                )
                write_images(images, key, store.locate(wanted))
            images.commit()

    def build_shards(self) -> None:
        """Build the shards that are not there yet."""
        with (
            closing(open_readonly(self.questions_file)) as questions,
            closing(open_readonly(self.images_file)) as images,
        ):
            total = questions.execute(
                "SELECT count(*) FROM (SELECT DISTINCT split, image_id FROM questions)"
            ).fetchone()
            vocabulary = json.loads(self.answers_file.read_text(encoding="utf-8"))
            arguments = (self.questions_file, self.images_file, vocabulary, VQA_FEATURES.arrow_schema)
            with tqdm(total=total[0], unit="image", desc="images", smoothing=0.05) as progress:

                def unfinished() -> Iterator[ShardTask]:
                    for task, size in self._tasks(questions):
                        if _is_done(task, images):
                            progress.update(size)
                        else:
                            yield task

                if self.options.num_workers == 1:
                    sizes: Iterable[int] = map(ShardBuilder(*arguments).build, unfinished())
                else:
                    sizes = _build_in_pool(unfinished(), self.options.num_workers, arguments)
                for size in sizes:
                    progress.update(size)

    def _tasks(self, questions: sqlite3.Connection) -> Iterator[tuple[ShardTask, int]]:
        """Yield the shards of all splits, with the number of images in each."""
        for split in _splits(questions):
            (self.prepared / split).mkdir(exist_ok=True)
            key, _ = self.raw.image_store(split)
            number_of_images: int = questions.execute(
                "SELECT count(*) FROM (SELECT DISTINCT image_id FROM questions WHERE split = ?)", (split,)
            ).fetchone()[0]
            shards = -(-number_of_images // self.options.shard_size)
            ids = questions.execute(
                "SELECT DISTINCT image_id FROM questions WHERE split = ? ORDER BY image_id", (split,)
            )
            for number in range(shards):
                image_ids = [image_id for (image_id,) in ids.fetchmany(self.options.shard_size)]
                task = ShardTask(
                    split=split,
                    source=key,
                    first_image=image_ids[0],
                    last_image=image_ids[-1],
                    data_file=self.prepared / split / f"data-{number:05d}-of-{shards:05d}.arrow",
                    record_file=self.records / f"{split}-{number:05d}.json",
                )
                yield task, len(image_ids)

    def describe(self, raw_files: list[dict[str, Any]]) -> dict[str, Any]:
        """Write the files that make the folder a prepared one, and return the manifest.

        Raises:
            UserError: there are bad items, which are not to be skipped.
        """
        splits: dict[str, dict[str, Any]] = {}
        reasons: Counter[str] = Counter()
        bad_file = self.partial / "bad_items.jsonl"
        dropped: list[dict[str, str]] = []
        with closing(open_readonly(self.questions_file)) as questions:
            for row in questions.execute("SELECT reason, split, item FROM bad"):
                dropped.append(asdict(BadItem(*row)))
            files: dict[str, list[str]] = {}
            for task, _ in self._tasks(questions):
                record = ShardRecord.read(task.record_file)
                dropped.extend(asdict(item) for item in record.bad)
                counts = splits.setdefault(
                    task.split,
                    {"images": 0, "questions": 0, "answers": 0, "questions_with_vocabulary_answer": 0, "sha256": ""},
                )
                for name in ("images", "questions", "answers", "questions_with_vocabulary_answer"):
                    counts[name] += getattr(record, name)
                counts["sha256"] = hashlib.sha256((counts["sha256"] + record.sha256).encode()).hexdigest()
                files.setdefault(task.split, []).append(task.data_file.name)
        reasons.update(item["reason"] for item in dropped)
        if dropped:
            bad_file.write_text(
                "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in dropped), encoding="utf-8"
            )
            self._report_bad(dropped, reasons, bad_file)
        for split, names in files.items():
            _write_datasets_files(self.prepared / split, names, splits[split]["sha256"])
        manifest = {
            "format": FORMAT_VERSION,
            "kind": "vqa",
            "name": self.raw.name,
            "splits": splits,
            "vocabulary": len(json.loads(self.answers_file.read_text(encoding="utf-8"))),
            "dropped": dict(sorted(reasons.items())),
            "dropped_items": dropped,
            "options": self.options.recorded(),
            "raw_files": raw_files,
        }
        _write_json(self.prepared / "manifest.json", manifest)
        return manifest

    def _report_bad(self, dropped: list[dict[str, str]], reasons: Counter[str], bad_file: Path) -> None:
        def name(item: dict[str, str]) -> str:
            return f"{item['split']}: {item['reason']}: {item['item']}"

        skip = self.options.on_bad == "skip"
        counted = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(reasons.items()))
        # A single bad item is named in the error's own line.
        for item in dropped[:_NAMED_BAD_ITEMS] if skip or len(dropped) > 1 else ():
            print(f"{'dropped' if skip else 'bad'}: {name(item)}", file=sys.stderr)
        if skip:
            print(f"dropped {len(dropped):,} items ({counted})")
            return
        raise UserError(
            f"{len(dropped):,} bad item{'s' if len(dropped) > 1 else ''} ({counted}), the first: {name(dropped[0])};"
            f" all are listed in {bad_file}: mend them and run again, or leave them out with --on-bad skip"
        )


def _build_in_pool(tasks: Iterable[ShardTask], num_workers: int, arguments: tuple[Any, ...]) -> Iterator[int]:
    """Build shards in worker processes, few of them waiting at a time; yield the number of images of each."""
    # Workers are forked from a server that has imported everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.pipeline"])
    waiting: set[concurrent.futures.Future[int]] = set()
    with concurrent.futures.ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=start_worker, initargs=arguments
    ) as pool:
        try:
            for task in tasks:
                waiting.add(pool.submit(build_shard, task))
                if len(waiting) > 2 * num_workers:
                    done, waiting = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                    yield sum(future.result() for future in done)
            for future in concurrent.futures.as_completed(waiting):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for want of memory: run again with a smaller --num-workers; it"
                " goes on where it stopped"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _splits(questions: sqlite3.Connection) -> list[str]:
    return [split for (split,) in questions.execute("SELECT DISTINCT split FROM questions ORDER BY split")]


def _is_done(task: ShardTask, images: sqlite3.Connection) -> bool:
    """Whether a shard is there, has nothing bad in it, and is made of the raw images as they are now."""
    if not task.record_file.exists() or not task.data_file.exists():
        return False
    record = ShardRecord.read(task.record_file)
    found = read_images(images, task.source, task.first_image, task.last_image)
    return not record.bad and record.images_fingerprint == fingerprint(found)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_datasets_files(folder: Path, data_files: Sequence[str], sha256: str) -> None:
    """Write what `datasets.load_from_disk` wants beside the Arrow files; with a fingerprint that is the content's."""
    _write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": name} for name in data_files],
            "_fingerprint": sha256[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,  # the folder's name says it; this field takes no name with a hyphen
        },
    )
    _write_json(
        folder / "dataset_info.json",
        {"citation": "", "description": "", "features": VQA_FEATURES.to_dict(), "homepage": "", "license": ""},
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer in RoBERTa's form: `<s> text </s>`, padding id 1; no text has unknown tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [tokenizers.AddedToken(token, special=True, lstrip=token == "<mask>") for token in _SPECIAL_TOKENS]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer
