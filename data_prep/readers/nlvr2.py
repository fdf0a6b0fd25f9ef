"""Prepare NLVR2: sentences about pairs of images, each true or false.

    vlabs prepare nlvr2 --raw-dir downloads --out-dir data/nlvr2

Download: `train.json`, `dev.json` and `test1.json` (or some of them), `test2.json` and those of `balanced/` and
`unbalanced/`, from `nlvr2/data` of https://github.com/lil-lab/nlvr; and train_img.zip, dev_img.zip and test1_img.zip,
which its authors give on request.

The JSON lines may be at any depth of the folder, and the images, by names such as `dev-850-0-img0.png`, in zip and tar
files or in folders at any depth. Each file is a split by its name: `train`, `dev`, `test1`, `balanced_dev` and so on. A
row is a pair with the sentences about it; the line's `identifier` is the sentence's key. A stopped run continues when
it is started again.

If a line has `target_instances` and `target_instances_right`, as in the embedded corpus, and COCO's instances are in
the folder, they are the regions of the sentence in the left and in the right image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.engine.reader import Reader, command
from data_prep.engine.texts import Text, statements
from vlabs.data.prepared import LABELS
from vlabs.errors import UserError, run_cli
from vlabs.utils.archives import walk
from vlabs.utils.json_file import get_value

_FILES = re.compile(r"(?:(?:un)?balanced_)?(?:train|dev|test[12])\.json")
_IDENTIFIER = re.compile(r"(.+-\d+-\d+)-\d+")


class NLVR2(Reader):
    """The raw files of NLVR2 in one folder."""

    name = "nlvr2"
    kind = statements(LABELS["nlvr2"], pictures=2)
    official = {"train": 86_373, "dev": 6_982, "test1": 6_967}

    def __init__(self, raw_dir: Path) -> None:
        super().__init__(raw_dir)
        files = [path for path in walk(raw_dir) if _FILES.fullmatch(path.name)]
        # Of two with one name, that of the folder itself or of `nlvr2/data` before the others.
        self.splits = {path.stem: path for path in sorted(files, key=lambda path: -len(path.parts))}
        self.splits = dict(sorted(self.splits.items(), key=lambda one: (one[0].count("balanced"), one[0])))
        if not self.splits:
            raise UserError(
                f"{raw_dir} holds no train.json, dev.json or test1.json: download them from nlvr2/data of"
                " https://github.com/lil-lab/nlvr"
            )
        self.tables = [*self.splits.values(), *self.instances]

    def texts(self) -> Iterator[Text]:
        """See `Reader`."""
        for split, where, number, line in self.lines(self.splits):
            identifier = get_value(line, "identifier", where, str)
            pair = _IDENTIFIER.fullmatch(identifier)
            if pair is None:
                raise UserError(f"{where}: 'identifier' must be like dev-850-0-1, not {identifier!r:.80}")
            yield Text(
                where,
                split,
                (f"{pair[1]}-img0.png", f"{pair[1]}-img1.png"),
                number,
                get_value(line, "sentence", where),
                key=identifier,
                label=line.get("label"),
                targets=[line.get("target_instances", ()), line.get("target_instances_right", ())],
            )


main = command(NLVR2)

if __name__ == "__main__":
    run_cli(main)
