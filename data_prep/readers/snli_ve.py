"""Prepare SNLI-VE: its JSON Lines, and the pictures of Flickr30K, which need no unpacking.

    python -m data_prep.snli_ve --raw-dir downloads --out-dir data/snli_ve

`--raw-dir` holds `snli_ve_train.jsonl`, `snli_ve_dev.jsonl` and `snli_ve_test.jsonl` (any of them will do) of
https://github.com/necla-ml/SNLI-VE, and the pictures `<Flickr30K_ID>.jpg`: in a folder, at any depth, or in a zip or
tar file that lies in it, such as `flickr30k-images.tar`. A picture is the premise, `sentence2` the hypothesis;
`sentence1`, the caption that the picture stands for, is not read. A line's `pairID` is the statement's key. A run that
was stopped goes on where it was when it is started again.

Where a line has `target_instances`, as those of the embedded corpus do, and COCO's instances lie in the folder, they
say what part of the picture a hypothesis is about.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.engine.images import NamedImages, Store
from data_prep.engine.index import check_value
from data_prep.engine.json_file import get_value, read_lines
from data_prep.engine.pipeline import add_options, check_split_name, name_of_rendered, prepare, read_options
from data_prep.engine.regions import add_instances, find_instances
from data_prep.engine.statements import StatementIndex, statements
from vlabs.data.prepared import LABELS
from vlabs.errors import UserError, run_cli

_FILE = re.compile(r"snli_ve_(.+)\.jsonl")


class SNLIVE:
    """The raw files of SNLI-VE in one folder.

    Args:
        raw_dir: the folder.

    Raises:
        UserError: there are none.
    """

    kind = statements(LABELS["snli_ve"])

    def __init__(self, raw_dir: Path) -> None:
        if not raw_dir.is_dir():
            raise UserError(f"there is no folder {raw_dir}: --raw-dir is where the downloads of SNLI-VE lie")
        found = {path: _FILE.fullmatch(path.name) for path in sorted(raw_dir.glob("snli_ve_*.jsonl"))}
        self.splits = {check_split_name(match[1], str(path)): path for path, match in found.items() if match}
        if not self.splits:
            raise UserError(
                f"{raw_dir} holds no snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl: download them from"
                " https://github.com/necla-ml/SNLI-VE"
            )
        self.name = name_of_rendered(raw_dir) or "snli_ve"
        self.store = NamedImages.within(raw_dir)
        self.instances = find_instances(raw_dir)
        self.tables: Sequence[Path] = [*self.splits.values(), *self.instances]
        self.images: Sequence[Path] = self.store.locations

    def image_store(self, split: str) -> tuple[str, Store]:
        """Return where the pictures are, which all splits share."""
        return "flickr30k", self.store

    def fill(self, index: StatementIndex) -> None:
        """Put all statements into the index."""
        for split, path in self.splits.items():
            print(f"reading {path}")
            number = 0
            for number, (where, line) in enumerate(read_lines(path), start=1):
                picture = get_value(line, "Flickr30K_ID", where)
                check_value(where, "Flickr30K_ID", picture, str)
                index.add_statement(
                    where,
                    split=split,
                    image_names=[f"{picture}.jpg"],
                    statement_id=number,
                    key=get_value(line, "pairID", where),
                    statement=get_value(line, "sentence2", where),
                    label=line.get("gold_label"),
                    target_instances=[line.get("target_instances", ())],
                )
            if not number:
                raise UserError(f"{path} is empty: download it again")
        add_instances(index, self.instances)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.snli_ve", description="Prepare SNLI-VE from the files as they are downloaded."
    )
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the JSON lines and the pictures")
    add_options(parser)
    arguments = parser.parse_args()
    prepare(SNLIVE(arguments.raw_dir), arguments.out_dir, read_options(arguments))


if __name__ == "__main__":
    run_cli(main)
