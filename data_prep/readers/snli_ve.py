"""Prepare SNLI-VE: hypotheses about images of Flickr30K, which are entailed, contradicted or neither.

    vlabs prepare snli_ve --raw-dir downloads --out-dir data/snli_ve

Download: `snli_ve_train.jsonl`, `snli_ve_dev.jsonl` and `snli_ve_test.jsonl` (or some of them) of
https://github.com/necla-ml/SNLI-VE, and the images of Flickr30K, `flickr30k-images.tar`.

The images `<Flickr30K_ID>.jpg` are in a folder, at any depth, or in a zip or tar file. An image is the premise,
`sentence2` the hypothesis; `sentence1`, the caption that the image replaces, is not read. A line's `pairID` is the
statement's key. A stopped run continues when it is started again.

If a line has `target_instances`, as in the embedded corpus, and COCO's instances are in the folder, they are the region
of the hypothesis.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.engine.reader import Reader, command
from data_prep.engine.texts import Text, statements
from vlabs.data.prepared import LABELS
from vlabs.errors import UserError, run_cli
from vlabs.utils.json_file import get_value

_FILE = re.compile(r"snli_ve_(.+)\.jsonl")


class SNLIVE(Reader):
    """The raw files of SNLI-VE in one folder."""

    name = "snli_ve"
    kind = statements(LABELS["snli_ve"])
    official = {"train": 529_527, "dev": 17_858, "test": 17_901}

    def __init__(self, raw_dir: Path) -> None:
        super().__init__(raw_dir)
        self.splits = self.split_files(_FILE)
        if not self.splits:
            raise UserError(
                f"{raw_dir} holds no snli_ve_train.jsonl, snli_ve_dev.jsonl or snli_ve_test.jsonl: download them from"
                " https://github.com/necla-ml/SNLI-VE"
            )
        self.tables = [*self.splits.values(), *self.instances]

    def texts(self) -> Iterator[Text]:
        """See `Reader`."""
        for split, where, number, line in self.lines(self.splits):
            picture = get_value(line, "Flickr30K_ID", where, str)
            yield Text(
                where,
                split,
                (f"{picture}.jpg",),
                number,
                get_value(line, "sentence2", where),
                key=get_value(line, "pairID", where),
                label=line.get("gold_label"),
                targets=[line.get("target_instances", ())],
            )


main = command(SNLIVE)

if __name__ == "__main__":
    run_cli(main)
