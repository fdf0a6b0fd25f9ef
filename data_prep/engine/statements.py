"""Statements about pictures, each with a label, on the way to the prepared form."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.engine.index import Index, as_json, check_value
from data_prep.engine.pipeline import Kind, write_json
from vlabs.data.prepared import statement_features

KEPT_BACK = -1  # the label of a statement whose label nobody tells


class StatementIndex(Index):
    """The statements of all splits, on disk. Bad ones are noted, and stay out.

    Args:
        path: sqlite file to make.
        labels: the names of the labels; a label is the position of its name.
        pictures: of a statement: 1, or 2 for a pair.
    """

    def __init__(self, path: Path, labels: Sequence[str], pictures: int = 1) -> None:
        numbers = range(2, pictures + 1)
        more = "".join(f"image_{n} TEXT, target_instances_{n} TEXT, regions_{n} TEXT, " for n in numbers)
        super().__init__(path, "statement", f"key TEXT, label INTEGER, {more}UNIQUE (split, key),")
        self.labels = list(labels)
        self.pictures = pictures
        self._image_ids: dict[tuple[str, ...], int] = {}

    def image_id(self, image_names: Sequence[str]) -> int:
        """Return the id of a picture or a pair: they are counted in the order in which they appear."""
        return self._image_ids.setdefault(tuple(image_names), len(self._image_ids) + 1)

    def add_statement(
        self,
        where: str,
        *,
        split: str,
        image_names: Sequence[str],
        statement_id: int,
        key: str,
        statement: str,
        label: str | None,
        target_instances: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Add one statement; `where` names its place in the raw data.

        Args:
            image_names: of its pictures.
            label: its name; None where it is kept back.
            target_instances: of each picture, the COCO instances that the statement is about.

        Raises:
            UserError: a value is of the wrong kind.
        """
        check_value(where, "key", key, str)
        if label is not None and label not in self.labels:
            self.add_bad("unknown label", split, f"{key} ({label!r:.40}, not one of {', '.join(self.labels)})")
            return
        targets = target_instances or [()] * self.pictures
        others = range(1, self.pictures)
        self._add(
            where,
            split=split,
            image_id=self.image_id(image_names),
            image_name=image_names[0],
            item_id=statement_id,
            text=statement,
            target_instances=targets[0],
            more={
                "key": key,
                "label": KEPT_BACK if label is None else self.labels.index(label),
                **{f"image_{n + 1}": image_names[n] for n in others},
                **{f"target_instances_{n + 1}": as_json(where, targets[n]) for n in others},
            },
        )

    def write_files(self, prepared: Path, min_answer_count: int) -> None:
        """Write the names of the labels."""
        write_json(prepared / "labels.json", self.labels)


class StatementRows:
    """Makes rows of a picture, or a pair of them, and the statements about it.

    Args:
        prepared: the folder that they are for; nothing in it matters here.
        pictures: of a statement.
    """

    def __init__(self, prepared: Path, pictures: int = 1) -> None:
        self.pictures = pictures
        self.features = statement_features(pictures)
        self.suffixes = ["", *(f"_{n}" for n in range(2, pictures + 1))]
        self.columns = (
            "item_id",
            "text",
            "key",
            "label",
            *(f"target_instances{suffix}" for suffix in self.suffixes),
            *(f"regions{suffix}" for suffix in self.suffixes),
        )

    def entry(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return a statement's entry in every list of its picture's row."""
        statement_id, statement, key, label, *rest = values
        targets, regions = rest[: self.pictures], rest[self.pictures :]
        return {
            "statement_id": statement_id,
            "statement": statement,
            "key": key,
            "label": label,
            "target_instances": [instance for part in targets if part for instance in json.loads(part)],
            **{
                f"region{suffix}": json.loads(part) if part else []
                for suffix, part in zip(self.suffixes, regions, strict=True)
            },
        }

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Return what a row adds to the counts of its split."""
        known = zip(*(row[f"region{suffix}"] for suffix in self.suffixes), strict=True)
        return {
            "statements": len(row["statement_id"]),
            "statements_with_label": sum(label != KEPT_BACK for label in row["label"]),
            "statements_with_region": sum(map(any, known)),
        }

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of the whole folder."""
        return {"pictures": self.pictures}


def statements(labels: Sequence[str], pictures: int = 1) -> Kind[StatementIndex]:
    """The kind of statements with these labels about so many pictures each."""
    return Kind(
        "statements",
        functools.partial(StatementIndex, labels=labels, pictures=pictures),
        functools.partial(StatementRows, pictures=pictures),
        unused_options=("min_answer_count",),
    )
