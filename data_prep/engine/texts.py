"""Texts about images on their way to the prepared form: questions, captions, and statements with a label.

The index of all texts is on disk, so memory does not follow their number. An id is what the source says, a whole number
or a text; an image's is a number, the source's own or counted in the order in which images appear.
"""

from __future__ import annotations

import functools
import json
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from data_prep.engine.regions import tells_phrases
from vlabs.data.features import CAPTION_FEATURES, VQA_FEATURES, statement_features
from vlabs.data.instances import list_annotations
from vlabs.data.prepared import read_answers
from vlabs.errors import UserError
from vlabs.metrics.vqa import clean_answer, match_accuracy, normalize_answer, ten_answers
from vlabs.utils.files import write_json
from vlabs.utils.json_file import check_value

KEPT_BACK = -1  # the label of a statement whose label nobody tells
_NUMBER = re.compile(r"[-+]?\d+([.,:]\d+)*")

Regions = Sequence[Mapping[str, Any]]  # as in `engine.regions`


class Text(NamedTuple):
    """A text about an image, or about several together.

    Attributes:
        where: its place in the raw data, for messages.
        split: the name of its split.
        images: the names of its images.
        id: its own, once in its split.
        text: what is asked or said.
        image_id: of its image or images; None to count them by their names.
        answers: to a question, as people wrote them; none where they are kept back.
        major: the answer that counts for the vocabulary, in normal form; the most frequent one if not given.
        answer_type, question_type: the first is told from the answer, the second is the first two words, if not given.
        key: what the dataset calls a statement.
        label: of a statement: a name; None where it is kept back.
        targets: of each image, the COCO instances that the text is about; or a list of them for each of its phrases.
        regions: of its image, what part the text is about.
    """

    where: str
    split: str
    images: tuple[str, ...]
    id: int | str
    text: str
    image_id: int | None = None
    answers: Sequence[str] = ()
    major: str | None = None
    answer_type: str | None = None
    question_type: str | None = None
    key: str = ""
    label: str | None = None
    targets: Sequence[Sequence[int | Sequence[int]]] = ()
    regions: Regions = ()


@dataclass(frozen=True)
class Kind:
    """One kind of texts.

    Attributes:
        name: the manifest's `kind`.
        item: what a text is called, and its column.
        features: of a prepared row.
        pictures: that a text is about.
        labels: the names of the labels of statements; a label is the position of its name.
    """

    name: str
    item: str
    features: datasets.Features
    pictures: int = 1
    labels: tuple[str, ...] = ()

    @property
    def more_images(self) -> list[str]:
        """The columns of a row's images beside `image`: `image_2` and so on."""
        return [f"image_{n}" for n in range(2, self.pictures + 1)]


QUESTIONS = Kind("vqa", "question", VQA_FEATURES)
CAPTIONS = Kind("captions", "caption", CAPTION_FEATURES)


def statements(labels: Sequence[str], pictures: int = 1) -> Kind:
    """The kind of statements with these labels about so many images each."""
    return Kind("statements", "statement", statement_features(pictures), pictures, tuple(labels))


_SCHEMA = """
PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -65536;
CREATE TABLE items (
    split TEXT, item_id, image_id INTEGER, text TEXT, more TEXT, targets TEXT, regions TEXT,
    annotated INTEGER DEFAULT 0, dropped INTEGER DEFAULT 0, PRIMARY KEY (split, item_id)
) WITHOUT ROWID;
CREATE TABLE pictures (
    split TEXT, image_id INTEGER, place INTEGER, name TEXT, PRIMARY KEY (split, image_id, place)
) WITHOUT ROWID;
CREATE TABLE numbers (image_id INTEGER PRIMARY KEY, names TEXT UNIQUE);
CREATE TABLE keys (key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE bad (reason TEXT, split TEXT, item TEXT);
"""


class Index:
    """The texts of all splits, on disk, of one kind. Bad ones are noted, and stay out.

    Args:
        path: sqlite file to make.
        kind: of the texts.
    """

    def __init__(self, path: Path, kind: Kind) -> None:
        self.kind = kind
        self.connection = sqlite3.connect(path)
        self.connection.executescript(_SCHEMA)
        self.seen: Counter[str] = Counter()  # texts by split, with those that cannot be used
        self._major_answers: Counter[str] = Counter()
        self._last_image: Any = None

    def add_bad(self, reason: str, split: str, item: str) -> None:
        """Note something that cannot be used."""
        self.connection.execute("INSERT INTO bad VALUES (?, ?, ?)", (reason, split, item))

    def add(self, text: Text) -> None:
        """Add a text, with its answers where it has some.

        Raises:
            UserError: a value is of the wrong kind.
        """
        item, where, name = self.kind.item, text.where, f"{self.kind.item} {text.id}"
        check_value(where, f"{item}_id", text.id, int, str)
        check_value(where, item, text.text, str)
        image_id = self._number(where, text.images) if text.image_id is None else text.image_id
        check_value(where, "image_id", image_id, int)
        self.seen[text.split] += 1
        if not text.text.strip():
            self.add_bad(f"empty {item}", text.split, name)
        if text.label is not None and text.label not in self.kind.labels:
            known = f"{text.label!r:.40}, not one of {', '.join(self.kind.labels)}"
            self.add_bad("unknown label", text.split, f"{text.key or name} ({known})")
            return
        values = {
            "split": text.split,
            "item_id": text.id,
            "image_id": image_id,
            "text": text.text,
            "more": self._more(text),
            "targets": _targets(where, text.targets),
            "regions": _regions(text.regions),
            "annotated": bool(text.answers),
            "dropped": not text.text.strip(),
        }
        # A caption's id is once in all splits together, and what a dataset calls a statement once in its split.
        key = {"caption": str(text.id), "statement": f"{text.split}/{text.key}"}.get(item)
        is_new = key is None or self._store(where, "INSERT OR IGNORE INTO keys VALUES (?)", {"key": key})
        insert = f"INSERT OR IGNORE INTO items ({', '.join(values)}) VALUES ({', '.join('?' * 9)})"
        if not is_new or not self._store(where, insert, values):
            self.add_bad(f"duplicate {item} id", text.split, name)
            return
        if (place := (text.split, image_id)) != self._last_image:
            self._last_image = place
            for number, image in enumerate(text.images):
                picture = {"split": text.split, "id": image_id, "place": number, "name": image}
                self._store(where, "INSERT OR IGNORE INTO pictures VALUES (?, ?, ?, ?)", picture)
        if text.answers:
            self._count_answer(text)

    def annotate(self, text: Text) -> None:
        """Add the answers to a question that is in the index; `images` and `text` do not matter.

        Its targets, and its regions where there are any, take the place of those that it was added with.

        Raises:
            UserError: a value is of the wrong kind.
        """
        name = f"question {text.id}"
        check_value(text.where, "question_id", text.id, int, str)
        if not text.answers:
            self.add_bad("question without answers", text.split, name)
        values = {
            "dropped": not text.answers,
            "more": self._more(text),
            "targets": _targets(text.where, text.targets),
            "regions": _regions(text.regions),
            "split": text.split,
            "id": text.id,
        }
        change = (
            "UPDATE items SET annotated = 1, dropped = max(dropped, ?), more = ?, targets = ?,"
            " regions = coalesce(?, regions) WHERE split = ? AND item_id = ? AND NOT annotated"
        )
        if not self._store(text.where, change, values):
            known = self.connection.execute(
                "SELECT 1 FROM items WHERE split = ? AND item_id = ?", (text.split, text.id)
            ).fetchone()
            reason = "duplicate question id" if known else "annotation without question"
            self.add_bad(reason, text.split, f"annotation of {name}")
        if text.answers or text.major is not None:
            self._count_answer(text)

    def replace_regions(self, regions: Mapping[int, Regions]) -> int:
        """Give texts these regions, by their ids in any split, instead of others; return how many were found."""
        splits = [split for (split,) in self.connection.execute("SELECT DISTINCT split FROM items")]
        update = "UPDATE items SET regions = ? WHERE split = ? AND item_id = ?"
        found = 0
        for item_id, values in regions.items():
            if item_id < 2**63:  # sqlite takes no larger ones
                rows = [(_regions(values), split, item_id) for split in splits]
                found += sum(self.connection.execute(update, row).rowcount for row in rows) > 0
        return found

    def add_instances(self, files: Sequence[Path]) -> None:
        """Give every text that names target instances their masks, from COCO's instances files.

        Nothing is read where no text does, or where there are no files: then the texts have no regions.

        Raises:
            UserError: a file is damaged, or has not all instances that are named.
        """
        run = self.connection.execute
        run("CREATE TABLE instances (id INTEGER PRIMARY KEY, region TEXT)")
        run(
            "INSERT OR IGNORE INTO instances (id)"
            " SELECT target.value FROM items, json_tree(items.targets) AS target WHERE target.type = 'integer'"
        )
        (wanted,) = run("SELECT count(*) FROM instances").fetchone()
        if not wanted or not files:
            return
        found = 0
        for file in files:
            print(f"reading {file}")
            for entry in list_annotations(file):
                region = json.dumps({"segmentation": entry["segmentation"]})
                change = "UPDATE instances SET region = ? WHERE id = ? AND region IS NULL"
                found += run(change, (region, entry["id"])).rowcount
                if found == wanted:
                    break
        missing = [str(n) for (n,) in run("SELECT id FROM instances WHERE region IS NULL ORDER BY id LIMIT 5")]
        if missing:
            raise UserError(
                f"{', '.join(map(str, files))}: no instance {', '.join(missing)}, which {wanted - found}"
                " target_instances name: is it of the corpus that is prepared?"
            )
        run(
            "UPDATE items SET regions = (SELECT json_group_array(json((SELECT json_group_array(json(instances.region))"
            " FROM json_tree(picture.value) AS target JOIN instances ON instances.id = target.value"
            " WHERE target.type = 'integer')))"
            " FROM json_each(targets) AS picture) WHERE targets IS NOT NULL"
        )

    def write_files(self, prepared: Path, min_answer_count: int) -> None:
        """Write the files of the prepared folder that follow from all texts together.

        Raises:
            UserError: no answer is frequent enough for the vocabulary.
        """
        if self.kind.labels:
            write_json(prepared / "labels.json", list(self.kind.labels))
        if self.kind.name != QUESTIONS.name:
            return
        kept = [answer for answer, count in self._major_answers.items() if count >= min_answer_count]
        if self._major_answers and not kept:
            answer, count = self._major_answers.most_common(1)[0]
            raise UserError(
                f"no answer is the major answer of {min_answer_count} questions (the most frequent, '{answer}', is of"
                f" {count}): lower --min-answer-count"
            )
        write_json(prepared / "answers.json", kept)
        none = "" if kept else ": no question has answers, so nothing can be trained on these data"
        print(f"{len(kept):,} answers in the vocabulary{none}")

    def finish(self) -> None:
        """Leave out what is bad, unanswered questions among answered ones included, and close the file.

        Raises:
            UserError: nothing is left.
        """
        unanswered = "NOT annotated AND NOT dropped AND split IN (SELECT DISTINCT split FROM items WHERE annotated)"
        item = self.kind.item
        with closing(self.connection) as connection:
            connection.executescript(
                # A column has one type: where one id is a text, a number becomes one, which may be there already.
                "UPDATE items SET dropped = 2 WHERE typeof(item_id) = 'integer'"
                " AND (SELECT 1 FROM items WHERE typeof(item_id) = 'text' LIMIT 1) AND EXISTS (SELECT 1 FROM items AS"
                " other WHERE other.split = items.split AND other.item_id = CAST(items.item_id AS TEXT));"
                f"INSERT INTO bad SELECT 'duplicate {item} id', split, '{item} ' || item_id FROM items"
                " WHERE dropped = 2;"
                "INSERT INTO bad SELECT 'question without annotation', split, 'question ' || item_id FROM items"
                f" WHERE {unanswered} ORDER BY split, item_id;"
                f"UPDATE items SET dropped = 1 WHERE {unanswered};"
                "DELETE FROM items WHERE dropped;"
                "CREATE UNIQUE INDEX by_image ON items (split, image_id, item_id);"
                "CREATE TABLE seen (split TEXT, count INTEGER);"
            )
            connection.executemany("INSERT INTO seen VALUES (?, ?)", self.seen.items())
            connection.commit()
            left = connection.execute("SELECT 1 FROM items LIMIT 1").fetchone()
            first_bad = connection.execute("SELECT split, reason, item FROM bad LIMIT 1").fetchone()
        if left is None:
            found = f" that can be used ({': '.join(first_bad)})" if first_bad else ""
            raise UserError(f"there are no {self.kind.item}s{found}")

    def _number(self, where: str, names: tuple[str, ...]) -> int:
        """The number of an image, or of some together: they are counted in the order in which they appear."""
        values = {"names": "\n".join(names)}
        self._store(where, "INSERT OR IGNORE INTO numbers (names) VALUES (?)", values)
        found = self.connection.execute("SELECT image_id FROM numbers WHERE names = ?", tuple(values.values()))
        return int(found.fetchone()[0])

    def _more(self, text: Text) -> str | None:
        """The columns that only this kind has, as JSON."""
        if self.kind.labels:
            check_value(text.where, "key", text.key, str)
            label = KEPT_BACK if text.label is None else self.kind.labels.index(text.label)
            return json.dumps({"key": text.key, "label": label})
        if self.kind.name != QUESTIONS.name or not text.answers:
            return None
        for answer in text.answers:
            check_value(text.where, "answer", answer, str)
        types = {"answer_type": text.answer_type, "question_type": text.question_type}
        if text.answer_type is None:
            types["answer_type"] = answer_type(_major(text))
        if text.question_type is None:
            types["question_type"] = " ".join(text.text.lower().split()[:2])
        for name, value in types.items():
            check_value(text.where, name, value, str)
        return json.dumps({"answers": list(text.answers), **types}, ensure_ascii=False)

    def _count_answer(self, text: Text) -> None:
        """Count a train or val question's major answer for the vocabulary, whose order is that of first appearance."""
        if text.split in ("train", "val"):
            self._major_answers[_major(text)] += 1

    def _store(self, where: str, sql: str, values: Mapping[str, Any]) -> int:
        """Run a statement with some values; returns how many rows it changed."""
        try:
            return self.connection.execute(sql, tuple(values.values())).rowcount
        except (OverflowError, UnicodeEncodeError) as error:
            raise UserError(f"{where} cannot be stored: {error}") from None


def answer_type(answer: str) -> str:
    """Return `yes/no`, `number` or `other` for an answer in normal form."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "number" if _NUMBER.fullmatch(answer) else "other"


def normal_form(answer: str) -> str:
    """An answer as the official evaluation reads it; what has none there ("A", "?", "the") is kept in lower case."""
    return normalize_answer(answer) or clean_answer(answer).lower()


def _major(text: Text) -> str:
    if text.major is not None:
        return text.major
    return Counter(normal_form(answer) for answer in text.answers).most_common(1)[0][0]


def _targets(where: str, targets: Sequence[Sequence[int | Sequence[int]]]) -> str | None:
    """COCO's instances of each image, as the index stores them."""
    for of_picture in targets:
        if not isinstance(of_picture, Sequence) or isinstance(of_picture, str):
            raise UserError(f"{where}: 'target_instances' must be a list of whole numbers, or one of each phrase")
        if len({isinstance(one, list | tuple) for one in of_picture}) > 1:
            raise UserError(
                f"{where}: 'target_instances' has whole numbers beside lists: pass one list for each phrase"
            )
        for number, _ in _phrases(of_picture):
            check_value(where, "target_instances", number, int)
    return json.dumps(targets, default=list) if any(targets) else None


def _phrases(targets: Sequence[Any]) -> list[tuple[Any, int]]:
    """Each instance that the text is about in one image, with the number of the phrase that names it."""
    return [
        (instance, phrase if isinstance(given, list | tuple) else 0)
        for phrase, given in enumerate(targets)
        for instance in (given if isinstance(given, list | tuple) else [given])
    ]


def _regions(regions: Regions) -> str | None:
    return json.dumps([list(regions)]) if regions else None


class SoftScores:
    """The official accuracy of every vocabulary answer against the human answers of a question.

    `answer_accuracy` of every vocabulary answer gives the same; here only the answers that can score are looked at.

    Args:
        vocabulary: answers; an answer's index is its id.
    """

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids: defaultdict[str, list[int]] = defaultdict(list)
        self.normalized_ids: defaultdict[str, list[int]] = defaultdict(list)
        for index, answer in enumerate(vocabulary):
            self.ids[clean_answer(answer)].append(index)
            self.normalized_ids[normalize_answer(answer)].append(index)

    def __call__(self, answers: Sequence[str]) -> tuple[list[int], list[float]]:
        """Return the ids, ascending, of the vocabulary answers that score above 0, and their scores in (0, 1]."""
        cleaned = [clean_answer(answer) for answer in ten_answers(answers)]
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


class Rows:
    """Makes prepared rows of the texts of an index.

    Args:
        kind: of the texts.
        prepared: the prepared folder, with the answer vocabulary of questions.
        index: the finished index.
    """

    def __init__(self, kind: Kind, prepared: Path, index: sqlite3.Connection) -> None:
        self.kind = kind
        self.features = datasets.Features(kind.features)
        self.id_column = f"{kind.item}_id"
        # Where one id is a text, all are: a column has one type.
        text_ids = index.execute("SELECT 1 FROM items WHERE typeof(item_id) = 'text' LIMIT 1").fetchone()
        self.as_id: Callable[[Any], Any] = str if text_ids else int
        if text_ids:
            self.features[self.id_column] = datasets.List(datasets.Value("string"))
        self.region_columns = ["region", *(one.replace("image", "region") for one in kind.more_images)]
        self.vocabulary: list[str] = []
        if kind.name == QUESTIONS.name:
            self.vocabulary = read_answers(prepared)
            self.scores = functools.lru_cache(maxsize=4096)(SoftScores(self.vocabulary).__call__)

    def row(
        self, image_id: int, items: Iterable[tuple[Any, str, str | None, str | None, str | None]]
    ) -> dict[str, Any]:
        """A row without its images' bytes, from the id, text, more, targets and regions of each of its texts."""
        single = ("image_id", "image", *self.kind.more_images)
        row: dict[str, Any] = {column: [] for column in self.features if column not in single} | {"image_id": image_id}
        for item_id, text, more, targets, regions in items:
            entry = {self.id_column: self.as_id(item_id), self.kind.item: text, **self._more(more)}
            phrases = [_phrases(of_picture) for of_picture in json.loads(targets)] if targets else []
            entry["target_instances"] = [instance for of_picture in phrases for instance, _ in of_picture]
            of_pictures = json.loads(regions) if regions else []
            for drawn, named in zip(of_pictures, phrases, strict=False):
                for region, (_, phrase) in zip(drawn, named, strict=False):
                    region["phrase"] = phrase
            of_pictures += [[]] * (self.kind.pictures - len(of_pictures))
            entry |= dict(zip(self.region_columns, of_pictures, strict=True))
            for column, value in entry.items():
                row[column].append(value)
        return row

    def _more(self, more: str | None) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(more) if more else {}
        if self.kind.name != QUESTIONS.name:
            return found
        found = {"answers": [], "answer_type": "", "question_type": "", **found}
        ids, scores = self.scores(tuple(found["answers"])) if found["answers"] else ([], [])
        return {**found, "answer_ids": ids, "answer_scores": scores}

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """What a row adds to the counts of its split."""
        texts = f"{self.kind.item}s"
        counts = {texts: len(row[self.id_column])}
        if self.kind.name == QUESTIONS.name:
            counts["answers"] = sum(map(len, row["answers"]))
            counts["questions_with_vocabulary_answer"] = sum(map(bool, row["answer_ids"]))
        if self.kind.labels:
            counts["statements_with_label"] = sum(label != KEPT_BACK for label in row["label"])
        known = list(zip(*(row[column] for column in self.region_columns), strict=True))
        counts[f"{texts}_with_region"] = sum(map(any, known))
        if phrases := sum(any(map(tells_phrases, of_text)) for of_text in known):
            counts[f"{texts}_with_phrases"] = phrases
        return counts

    def summary(self) -> dict[str, Any]:
        """What the manifest says of the whole folder."""
        if self.kind.name == QUESTIONS.name:
            return {"vocabulary": len(self.vocabulary)}
        return {"pictures": self.kind.pictures} if self.kind.labels else {}
