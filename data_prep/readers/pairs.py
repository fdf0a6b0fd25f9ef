"""Prepare examples in which a right caption competes with a wrong one, or a right image with another.

    vlabs prepare pairs --raw-dir winoground --out-dir data/winoground
    vlabs prepare pairs --raw-dir VALSE --out-dir data/valse
    vlabs prepare pairs --table mine.jsonl --out-dir data/mine

Download: Winoground (`hf download facebook/winoground`), or VALSE (https://github.com/Heidelberg-NLP/VALSE) and the
images of its sources; nothing for a table of your own.

Winoground's folder holds `examples.jsonl` and the images, in `images.zip` or a folder. VALSE's holds its JSON files,
each of which becomes a split by its name (`existence`, `actant-swap`, …), and the images by their names, in folders or
zip files; only examples that its annotators confirmed are used, as in its paper. Your own table has an example per row:
`image`, `caption` and `foil`; or `image_0`, `image_1`, `caption_0` and `caption_1`, of which those with one number
belong together; and `split`, if not `test`. Its images' paths are relative to it. Then:

    vlabs evaluate task=pairs data.dir=data/winoground split=test ckpt=RUN
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.engine.folder import BadItem
from data_prep.engine.places import ImageStore
from data_prep.engine.reader import Reader, command
from data_prep.engine.tables import as_text, check_table, missing_column, read_rows, split_name
from data_prep.engine.texts import Text, statements
from vlabs.data.prepared import LABELS
from vlabs.errors import UserError, run_cli
from vlabs.utils.archives import is_clutter
from vlabs.utils.json_file import JsonFile, get_value

_CONFIRMED = 2  # of VALSE's three annotators


class Example(NamedTuple):
    """A row of the raw data, and its columns of images and captions; those of one place belong together.

    Attributes:
        suffix: what images' names lack.
    """

    where: str
    split: str
    name: str
    row: dict[str, Any]
    images: Sequence[str]
    captions: Sequence[str]
    suffix: str = ""


class Pairs(Reader):
    """Examples from one of the three sources."""

    name = "pairs"
    kind = statements(LABELS["nlvr2"])

    def called(self, seen: Mapping[str, int]) -> str:
        """See `Reader`."""
        return self.name

    def examples(self) -> Iterator[Example]:
        """Yield the examples.

        Raises:
            UserError: a file is not as it should be.
        """
        raise NotImplementedError

    def texts(self) -> Iterator[Text | BadItem]:
        """A statement for every image with every caption: true where they belong together."""
        number = 0
        for where, split, name, row, images, captions, suffix in self.examples():
            if absent := [column for column in (*images, *captions) if column not in row]:
                raise missing_column(where, row, absent[0])
            values = {column: as_text(where, column, row[column]) for column in (*images, *captions)}
            if empty := [column for column, value in values.items() if value is None]:
                yield BadItem(f"empty {empty[0]}", split, where)
                continue
            for place, image in enumerate(images):
                for which, caption in enumerate(captions):
                    number += 1
                    # With the number of images: one that is left out must not make a simpler example.
                    key = f"{name}/{len(images)}/{place}/{which}"
                    file, label = f"{values[image]}{suffix}", str(place == which)
                    yield Text(where, split, (file,), number, str(values[caption]), key=key, label=label)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """See `Reader`."""
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--raw-dir", type=Path, help="folder with Winoground or VALSE")
        source.add_argument("--table", type=Path, help="table of your own")

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Pairs:
        """See `Reader`."""
        return find_pairs(arguments.raw_dir) if arguments.raw_dir is not None else PairTable(arguments.table)


class Winoground(Pairs):
    """Two images and two captions of the same words in other orders."""

    name = "winoground"

    def __init__(self, raw_dir: Path, table: Path) -> None:
        super().__init__(raw_dir)
        self.tables = [table]

    def examples(self) -> Iterator[Example]:
        """See `Pairs`."""
        print(f"reading {self.tables[0]}")
        for where, line in read_rows(self.tables[0]):
            name = str(get_value(line, "id", where))
            yield Example(where, "test", name, line, ["image_0", "image_1"], ["caption_0", "caption_1"], ".png")


class Valse(Pairs):
    """An image, its caption and a foil; a file a phenomenon."""

    name = "valse"

    def __init__(self, raw_dir: Path, tables: Sequence[Path]) -> None:
        super().__init__(raw_dir)
        self.tables = tables

    def examples(self) -> Iterator[Example]:
        """See `Pairs`."""
        for path in self.tables:
            file, left_out = JsonFile(path), 0
            print(f"reading {file}")
            split = split_name(path.stem, str(path))
            for name, entry in file.named():
                where = f"{file}, {name}"
                votes = get_value(entry, "mturk", where)
                if not isinstance(votes, dict) or not isinstance(votes.get("caption"), int):
                    raise UserError(f"{where}: 'mturk' must say how many chose the 'caption'")
                if votes["caption"] < _CONFIRMED:
                    left_out += 1
                    continue
                yield Example(where, split, name, entry, ["image_file"], ["caption", "foil"])
            print(f"{split}: {left_out:,} examples left out that fewer than {_CONFIRMED} annotators confirmed")


class PairTable(Pairs):
    """A table of your own."""

    def __init__(self, path: Path) -> None:
        check_table(path)
        super().__init__(path.parent)
        self.tables, self.store = [path], ImageStore((path.parent,))

    def called(self, seen: Mapping[str, int]) -> str:
        """See `Reader`."""
        return self.tables[0].stem

    def examples(self) -> Iterator[Example]:
        """See `Pairs`."""
        print(f"reading {self.tables[0]}")
        for number, (where, row) in enumerate(read_rows(self.tables[0]), start=1):
            split = split_name(as_text(where, "split", row.get("split")) or "test", where)
            if row.get("image_0") or "image" not in row:
                images, captions = ["image_0", "image_1"], ["caption_0", "caption_1"]
            else:
                images, captions = ["image"], ["caption", "foil"]
            yield Example(where, split, str(number), row, images, captions)


def find_pairs(raw_dir: Path) -> Pairs:
    """Winoground or VALSE, whichever a folder holds.

    Raises:
        UserError: neither.
    """
    if not raw_dir.is_dir():
        raise UserError(f"there is no folder {raw_dir}: --raw-dir is where Winoground or VALSE lies")
    for folder in (raw_dir, raw_dir / "data"):
        if (folder / "examples.jsonl").is_file():
            return Winoground(folder, folder / "examples.jsonl")
        if tables := sorted(path for path in folder.glob("*.json") if not is_clutter(path.name)):
            return Valse(raw_dir, tables)
    raise UserError(f"{raw_dir} holds neither Winoground's examples.jsonl nor VALSE's JSON files, nor does its data/")


main = command(Pairs)

if __name__ == "__main__":
    run_cli(main)
