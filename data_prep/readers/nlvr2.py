"""Prepare NLVR2: its JSON lines, and its pairs of pictures in the zip files as they are downloaded.

    python -m data_prep.nlvr2 --raw-dir downloads --out-dir data/nlvr2

`--raw-dir` holds `train.json`, `dev.json` and `test1.json` (any of them will do), and with them `test2.json` and those
of `balanced/` and `unbalanced/`, as in `nlvr2/data` of https://github.com/lil-lab/nlvr: in the folder itself, in its
`data/` or `nlvr2/data/`. The pictures are looked for by their names, `dev-850-0-img0.png`, in `train_img.zip`,
`dev_img.zip` and `test1_img.zip`, in tar files, or in folders at any depth. Each file is a split by its name: `train`,
`dev`, `test1`, `balanced_dev` and so on. A row is a pair with the sentences about it; the line's `identifier` is the
sentence's key. A run that was stopped goes on where it was when it is started again.

Where a line has `target_instances` and `target_instances_right`, as those of the embedded corpus do, and COCO's
instances lie in the folder, they say what part of the left and of the right picture a sentence is about.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep.engine.images import NamedImages, Store
from data_prep.engine.index import check_value
from data_prep.engine.json_file import get_value, read_lines
from data_prep.engine.pipeline import add_options, name_of_rendered, prepare, read_options
from data_prep.engine.regions import add_instances, find_instances
from data_prep.engine.statements import StatementIndex, statements
from vlabs.data.prepared import LABELS
from vlabs.errors import UserError, run_cli

_FILES = re.compile(r"(?:(?:un)?balanced_)?(?:train|dev|test[12])\.json")
_IDENTIFIER = re.compile(r"(.+-\d+-\d+)-\d+")
_FOLDERS = ("", "data", "nlvr2/data")


class NLVR2:
    """The raw files of NLVR2 in one folder.

    Args:
        raw_dir: the folder.

    Raises:
        UserError: there are none.
    """

    kind = statements(LABELS["nlvr2"], pictures=2)

    def __init__(self, raw_dir: Path) -> None:
        if not raw_dir.is_dir():
            raise UserError(f"there is no folder {raw_dir}: --raw-dir is where the downloads of NLVR2 lie")
        self.splits: dict[str, Path] = {}
        for folder in _FOLDERS:
            for part in ("", "balanced", "unbalanced"):
                for path in sorted((raw_dir / folder / part).glob("*.json")):
                    if _FILES.fullmatch(path.name):
                        self.splits.setdefault(path.stem, path)
        if not self.splits:
            raise UserError(
                f"{raw_dir} holds no train.json, dev.json or test1.json: download them from nlvr2/data of"
                " https://github.com/lil-lab/nlvr"
            )
        self.name = name_of_rendered(raw_dir) or "nlvr2"
        self.store = NamedImages.within(raw_dir)
        self.instances = find_instances(raw_dir)
        self.tables: Sequence[Path] = [*self.splits.values(), *self.instances]
        self.images: Sequence[Path] = self.store.locations

    def image_store(self, split: str) -> tuple[str, Store]:
        """Return where the pictures are; those of a balanced part are those of the whole."""
        return "nlvr2", self.store

    def fill(self, index: StatementIndex) -> None:
        """Put all sentences into the index."""
        for split, path in self.splits.items():
            print(f"reading {path}")
            number = 0
            for number, (where, line) in enumerate(read_lines(path), start=1):
                identifier = get_value(line, "identifier", where)
                check_value(where, "identifier", identifier, str)
                pair = _IDENTIFIER.fullmatch(identifier)
                if pair is None:
                    raise UserError(f"{where}: 'identifier' must be like dev-850-0-1, not {identifier!r:.80}")
                index.add_statement(
                    where,
                    split=split,
                    image_names=[f"{pair[1]}-img{side}.png" for side in (0, 1)],
                    statement_id=number,
                    key=identifier,
                    statement=get_value(line, "sentence", where),
                    label=line.get("label"),
                    target_instances=[line.get("target_instances", ()), line.get("target_instances_right", ())],
                )
            if not number:
                raise UserError(f"{path} is empty: download it again")
        add_instances(index, self.instances)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.nlvr2", description="Prepare NLVR2 from the files as they are downloaded."
    )
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the JSON lines and the pictures")
    add_options(parser)
    arguments = parser.parse_args()
    prepare(NLVR2(arguments.raw_dir), arguments.out_dir, read_options(arguments))


if __name__ == "__main__":
    run_cli(main)
