"""Prepare examples in which a caption has to be told from a wrong one, or a picture from another.

    python -m data_prep.pairs --raw-dir winoground --out-dir data/winoground
    python -m data_prep.pairs --raw-dir VALSE --out-dir data/valse
    python -m data_prep.pairs --table mine.jsonl --out-dir data/mine

then `python -m vlabs.evaluate task=pairs data.dir=data/winoground split=test ckpt=RUN`.

Winoground's folder holds `examples.jsonl` and the pictures, in `images.zip` or a folder (the hub's
`facebook/winoground`, its `data/`). VALSE's holds its JSON files (`data/` of https://github.com/Heidelberg-NLP/VALSE),
each of which becomes a split by its name (`existence`, `actant-swap`, …), and the pictures of its sources by their
names, in folders or zip files; only what its annotators confirmed is taken, as in its paper. A table of one's own, CSV
or JSON Lines, has an example a row: `image`, `caption` and `foil`; or `image_0`, `image_1`, `caption_0` and
`caption_1`, of which those with one number belong together; and `split`, if not `test`. Its pictures' paths are
relative to it.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.engine.images import ImageStore, NamedImages, Store
from data_prep.engine.json_file import JsonFile, get_value, read_lines
from data_prep.engine.pipeline import add_options, check_split_name, prepare, read_options
from data_prep.engine.texts import Index, Text, check_value, statements
from vlabs.data.prepared import LABELS
from vlabs.errors import UserError, run_cli

_CONFIRMED = 2  # of VALSE's three annotators


class Example(NamedTuple):
    """Pictures and captions; the first caption belongs to the first picture, the second to the second, if any."""

    where: str
    split: str
    name: str
    images: tuple[str, ...]
    captions: tuple[str, ...]


class Pairs:
    """Examples from one of the three sources.

    Args:
        name: of the data.
        tables: the files with the captions.
        store: where the pictures are.
    """

    kind = statements(LABELS["nlvr2"])

    def __init__(self, name: str, tables: Sequence[Path], store: NamedImages | ImageStore) -> None:
        self.name = name
        self.tables = tables
        self.store = store
        self.images: Sequence[Path] = [path for path in store.locations if path not in tables]

    def image_store(self, split: str) -> Store:
        """Return where the pictures are."""
        return self.store

    def called(self, seen: Mapping[str, int]) -> str:
        """Return what the data set is called."""
        return self.name

    def examples(self) -> Iterator[Example]:
        """Yield the examples.

        Raises:
            UserError: a file or a row is not as it should be.
        """
        raise NotImplementedError

    def fill(self, index: Index) -> None:
        """Put a statement for every picture with every caption into the index: true where they belong together."""
        number = 0
        for example in self.examples():
            for place, image in enumerate(example.images):
                for which, caption in enumerate(example.captions):
                    number += 1
                    # With the number of pictures: one that is left out must not make a simpler example.
                    key = f"{example.name}/{len(example.images)}/{place}/{which}"
                    where, split, label = example.where, example.split, str(place == which)
                    index.add(Text(where, split, (image,), number, caption, key=key, label=label))


class Winoground(Pairs):
    """Two pictures and two captions of the same words in other orders."""

    def __init__(self, raw_dir: Path, table: Path) -> None:
        super().__init__("winoground", [table], NamedImages.within(raw_dir))

    def examples(self) -> Iterator[Example]:
        """See `Pairs`."""
        print(f"reading {self.tables[0]}")
        for where, line in read_lines(self.tables[0]):
            images = [f"{_text(line, f'image_{n}', where)}.png" for n in (0, 1)]
            captions = [_text(line, f"caption_{n}", where) for n in (0, 1)]
            yield Example(where, "test", str(get_value(line, "id", where)), tuple(images), tuple(captions))


class Valse(Pairs):
    """A picture, its caption and a foil; a file a phenomenon."""

    def __init__(self, raw_dir: Path, tables: Sequence[Path]) -> None:
        super().__init__("valse", tables, NamedImages.within(raw_dir))

    def examples(self) -> Iterator[Example]:
        """See `Pairs`."""
        for path in self.tables:
            file, left_out = JsonFile(path), 0
            print(f"reading {file}")
            split = check_split_name(path.stem, str(path))
            for name, entry in file.named():
                where = f"{file}, {name}"
                votes = get_value(entry, "mturk", where)
                if not isinstance(votes, dict) or not isinstance(votes.get("caption"), int):
                    raise UserError(f"{where}: 'mturk' must say how many chose the 'caption'")
                if votes["caption"] < _CONFIRMED:
                    left_out += 1
                    continue
                captions = (_text(entry, "caption", where), _text(entry, "foil", where))
                yield Example(where, split, name, (_text(entry, "image_file", where),), captions)
            print(f"{split}: {left_out:,} examples left out that fewer than {_CONFIRMED} annotators confirmed")


class PairTable(Pairs):
    """A table of one's own."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.stem, [path], ImageStore((path.parent,)))

    def examples(self) -> Iterator[Example]:
        """See `Pairs`."""
        for number, (where, row) in enumerate(_rows(self.tables[0]), start=1):
            split = check_split_name(str(row.get("split") or "test"), where)
            images: tuple[str, ...]
            if row.get("image_0"):
                images = (_text(row, "image_0", where), _text(row, "image_1", where))
                captions = (_text(row, "caption_0", where), _text(row, "caption_1", where))
            else:
                images = (_text(row, "image", where),)
                captions = (_text(row, "caption", where), _text(row, "foil", where))
            yield Example(where, split, str(number), images, captions)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = get_value(row, name, where)
    check_value(where, name, value, str)
    return str(value)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    print(f"reading {path}")
    if path.suffix == ".jsonl":
        yield from read_lines(path)
        return
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV: {error}") from None


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
        if tables := sorted(folder.glob("*.json")):
            return Valse(raw_dir, tables)
    raise UserError(f"{raw_dir} holds neither Winoground's examples.jsonl nor VALSE's JSON files, nor does its data/")


def open_table(path: Path) -> PairTable:
    """A table of one's own.

    Raises:
        UserError: there is no such table.
    """
    if not path.is_file() or path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"--table {path}: name a .csv or .jsonl file that is there")
    return PairTable(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.pairs", description="Prepare pairs of captions or pictures to be told apart."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--raw-dir", type=Path, help="folder with Winoground or VALSE")
    source.add_argument("--table", type=Path, help=".csv or .jsonl of your own")
    add_options(parser)
    arguments = parser.parse_args()
    raw = find_pairs(arguments.raw_dir) if arguments.raw_dir is not None else open_table(arguments.table)
    prepare(raw, arguments.out_dir, read_options(arguments))


if __name__ == "__main__":
    run_cli(main)
