"""Prepare POPE: yes/no questions that ask whether an object is in an image.

    vlabs prepare pope --raw-dir downloads --out-dir data/pope

Download: `coco_pope_random.json`, `coco_pope_popular.json` and `coco_pope_adversarial.json` (or some of them) of
https://github.com/AoiDragon/POPE (`output/coco`), and COCO's `val2014.zip`.

Each file is a split: `random`, `popular`, `adversarial`. The images are in a folder, at any depth, or in a zip
or tar file. A question's answer counts as given by all ten annotators of VQA v2. A stopped run continues when it is
started again.

    vlabs evaluate ckpt=RUN data.dir=data/pope split=adversarial
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.engine.reader import Reader, command
from data_prep.engine.texts import Text
from vlabs.errors import UserError, run_cli
from vlabs.utils.json_file import get_value

_FILE = re.compile(r"[a-z0-9]+_pope_(.+)\.jsonl?")


class POPE(Reader):
    """The raw files of POPE in one folder."""

    name = "pope"
    official = {"random": 3_000, "popular": 3_000, "adversarial": 3_000}

    def __init__(self, raw_dir: Path) -> None:
        super().__init__(raw_dir)
        self.splits = self.split_files(_FILE)
        if not self.splits:
            raise UserError(
                f"{raw_dir} holds no coco_pope_random.json, coco_pope_popular.json or coco_pope_adversarial.json:"
                " download them from https://github.com/AoiDragon/POPE (output/coco)"
            )
        self.tables = list(self.splits.values())

    def texts(self) -> Iterator[Text]:
        """See `Reader`."""
        for split, where, _, line in self.lines(self.splits):
            label = get_value(line, "label", where, str).strip().lower()
            if label not in ("yes", "no"):
                raise UserError(f"{where}: the label is {label!r:.40}, not yes or no")
            yield Text(
                where,
                split,
                (get_value(line, "image", where, str),),
                get_value(line, "question_id", where),
                get_value(line, "text", where),
                answers=[label],
                major=label,
            )


main = command(POPE)

if __name__ == "__main__":
    run_cli(main)
