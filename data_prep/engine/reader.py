"""What the readers of texts have in common: a folder of raw files, and the command line that prepares it."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_prep.engine.folder import name_of_rendered
from data_prep.engine.pipeline import add_options, prepare, read_options
from data_prep.engine.places import NamedImages, Store
from data_prep.engine.regions import find_instances
from data_prep.engine.tables import read_rows
from data_prep.engine.texts import QUESTIONS, Index, Kind, Text
from vlabs.errors import UserError


class Reader:
    """The raw files of one data set in one folder. A subclass says what they are called, and what they say.

    Args:
        raw_dir: the folder.

    Attributes:
        name: what its command is called, and the data set.
        kind: of its texts.
        official: how many texts a split of the data set has. Files in its form whose numbers differ in all splits are
            somebody's own, and called as their folder. Empty where files say whose they are, or everybody's are meant.
        min_answer_count: of the answer vocabulary of questions, if the user does not say.
        options: what the command line's options say of what is read, so that a run with other ones starts anew.
        tables: the files with all that is not an image.
        store: where the images are; at any depth of the folder, and of archives in it, by their names.
        instances: COCO's instances files, for texts that name some.

    Raises:
        UserError: there is no such folder.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = QUESTIONS
    official: ClassVar[Mapping[str, int]] = {}
    min_answer_count: ClassVar[int] = 1

    def __init__(self, raw_dir: Path) -> None:
        if not raw_dir.is_dir():
            raise UserError(f"there is no folder {raw_dir}: --raw-dir is where the downloads of {self.name} lie")
        self.raw_dir = raw_dir
        self.options: dict[str, Any] = {}
        self.tables: Sequence[Path] = []
        self.store: Any = NamedImages.within(raw_dir)
        self.instances = find_instances(raw_dir)

    @property
    def images(self) -> Sequence[Path]:
        """The files and folders with images, for the manifest."""
        return [path for path in self.store.locations if path not in self.tables]

    def image_store(self, split: str) -> Store:
        """Return where a split's images are."""
        store: Store = self.store
        return store

    def called(self, seen: Mapping[str, int]) -> str:
        """Return what the data set is called, from its texts by split."""
        is_official = not self.official or any(seen.get(split) == count for split, count in self.official.items())
        own = self.name if is_official else self.raw_dir.resolve().name
        return name_of_rendered(self.raw_dir) or own

    def lines(self, splits: Mapping[str, Path]) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
        """Yield what files of JSON lines hold, one a split: the split, the place, its number from 1, and the object.

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

    def texts(self) -> Iterator[Text]:
        """Yield all texts.

        Raises:
            UserError: a file is not as it should be.
        """
        raise NotImplementedError

    def fill(self, index: Index) -> None:
        """Put all texts into the index, and what part of their pictures they are about."""
        for text in self.texts():
            index.add(text)
        index.add_instances(self.instances)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Add options of this data set alone to its command line."""

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Reader:
        """Make it from a parsed command line."""
        return cls(arguments.raw_dir)


def new_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A command line of a name, which shows a module's docstring."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"vlabs prepare {name}", description=inspect.cleandoc(doc or ""), formatter_class=form
    )


def command(reader: type[Reader]) -> Callable[[], None]:
    """The command that prepares a data set."""

    def main() -> None:
        parser = new_parser(reader.name, sys.modules[reader.__module__].__doc__)
        parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the files as they are downloaded")
        reader.add_options(parser)
        if reader.kind == QUESTIONS:
            add_answer_option(parser, reader.min_answer_count)
        add_options(parser)
        arguments = parser.parse_args()
        raw = reader.of(arguments)
        prepare(raw, arguments.out_dir, read_options(arguments, **raw.options))

    return main


def add_answer_option(parser: argparse.ArgumentParser, default: int) -> None:
    """Add the option that only questions have to a command line."""
    parser.add_argument(
        "--min-answer-count",
        type=int,
        default=default,
        help="questions: how often an answer must be a question's major answer to be in the vocabulary"
        " (default %(default)s)",
    )


def add_on_bad(parser: argparse.ArgumentParser, what: str) -> None:
    """Add the option of what is done about bad items, which every preparation has."""
    parser.add_argument(
        "--on-bad", choices=("error", "skip"), default="error", help=f"{what}: stop, or leave them out (default: error)"
    )
