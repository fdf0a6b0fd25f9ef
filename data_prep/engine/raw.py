"""The base class of readers of texts."""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from data_prep.engine.folder import BadItem, name_of_rendered
from data_prep.engine.places import ImageStore, NamedImages
from data_prep.engine.regions import find_instances
from data_prep.engine.tables import read_rows, split_name
from data_prep.engine.texts import QUESTIONS, Index, Kind, Text
from vlabs.errors import UserError
from vlabs.utils.archives import walk


class Reader:
    """The raw files of one dataset in one folder. A subclass defines their names and how they are read.

    Args:
        raw_dir: the folder.

    Attributes:
        name: what its command is called, and the dataset.
        kind: of its texts.
        official: how many texts a split of the dataset has. Files in its form whose numbers differ in all splits are
            somebody's own, and called as their folder. Empty where files say whose they are, or everybody's are meant.
        min_answer_count: of the answer vocabulary of questions, if the user does not say.
        options: what the command line's options say of what is read, so that a run with other ones starts anew.
        tables: the files with all that is not an image.
        places: the files and folders with images, for the manifest, where they are not those of the store.
        store: where the images are; at any depth of the folder, and of archives in it, by their names.
        instances: COCO's instances files, for texts that name some.

    Raises:
        UserError: there is no such folder.
    """

    name: ClassVar[str]
    kind: Kind = QUESTIONS
    official: ClassVar[Mapping[str, int]] = {}
    min_answer_count: ClassVar[int] = 1

    def __init__(self, raw_dir: Path) -> None:
        if not raw_dir.is_dir():
            raise UserError(f"there is no folder {raw_dir}: --raw-dir is where the downloads of {self.name} lie")
        self.raw_dir = raw_dir
        self.options: dict[str, Any] = {}
        self.tables: Sequence[Path] = []
        self.places: set[Path] = set()
        self.instances = find_instances(raw_dir)

    @cached_property
    def store(self) -> ImageStore:
        """See the class."""
        return NamedImages.within(self.raw_dir)

    @property
    def images(self) -> Sequence[Path]:
        """The files and folders with images, for the manifest."""
        return sorted(self.places) or [path for path in self.store.locations if path not in self.tables]

    def find_images(self, *names: str) -> Path | None:
        """Where images called `NAME/...` are looked for: in the zip file of one of some names, or in this folder, if a
        folder of one of them is there; None if there is neither."""
        zipped, folders = [self.raw_dir / f"{name}.zip" for name in names], [self.raw_dir / name for name in names]
        archive = next((path for path in zipped if path.is_file()), None)
        place = archive or next((path for path in folders if path.is_dir()), None)
        if place is None:
            return None
        self.places.add(place)
        return archive or self.raw_dir

    def image_store(self, split: str) -> ImageStore:
        """Return where a split's images are."""
        return self.store

    def called(self, seen: Mapping[str, int]) -> str:
        """Return what the dataset is called, from its texts by split; empty for the name of its prepared folder."""
        return self.call(not self.official or any(seen.get(split) == count for split, count in self.official.items()))

    def call(self, is_official: bool) -> str:
        """What the dataset is called: its name where it is the official one, or as its folder."""
        return name_of_rendered(self.raw_dir) or (self.name if is_official else self.raw_dir.resolve().name)

    def split_files(self, pattern: re.Pattern[str]) -> dict[str, Path]:
        """The files under the folder whose names fit a pattern, by the split that its group names.

        Raises:
            UserError: two files are of one split.
        """
        found: dict[str, Path] = {}
        for path in sorted(walk(self.raw_dir)):
            if match := pattern.fullmatch(path.name):
                split = split_name(match[1], str(path))
                if split in found:
                    raise UserError(f"{found[split]} and {path} are both of the split {split}: remove one of them")
                found[split] = path
        return found

    def lines(self, splits: Mapping[str, Path]) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
        """Yield what files of JSON lines hold, one per split: the split, the place, its number from 1, and the object.

        Raises:
            UserError: a file is not as it should be, or empty.
        """
        for split, path in splits.items():
            print(f"reading {path}")
            number = 0
            for number, (where, line) in enumerate(read_rows(path, lines=True), start=1):
                yield split, where, number, line
            if not number:
                raise UserError(f"{path} is empty: download it again")

    def texts(self) -> Iterable[Text | BadItem]:
        """Yield all texts, and what is bad instead of those that cannot be used.

        Raises:
            UserError: a file is not as it should be.
        """
        raise NotImplementedError

    def fill(self, index: Index) -> None:
        """Put all texts into the index, and what part of their images they are about."""
        for text in self.texts():
            if isinstance(text, BadItem):
                index.add_bad(*text)
            else:
                index.add(text)
        index.add_instances(self.instances)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add the options of this dataset alone to its command line."""
        parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the files as they are downloaded")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Reader:
        """Make it from a parsed command line, whose options are called as what the class takes."""
        names = inspect.signature(cls).parameters.keys() & vars(arguments).keys()
        return cls(**{name: getattr(arguments, name) for name in names})
