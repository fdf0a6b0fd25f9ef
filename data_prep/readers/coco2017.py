"""Prepare captions in COCO's own files: COCO 2017, or your own in its layout.

    vlabs prepare coco2017 --raw-dir downloads --out-dir data/coco2017

Download: `annotations_trainval2017.zip`, `train2017.zip` and `val2017.zip` (or val alone) of
https://cocodataset.org/#download.

Nothing needs unpacking, but unpacked files work too. Every `captions_SUBSET.json` is a split, `captions_train2017.json`
train; its images are in SUBSET.zip or a folder of that name. An image's and a caption's id are COCO's. A caption may
name the COCO instances that it is about under `target_instances`. To train, pass `data=coco_captions data.dir=FOLDER`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.engine.places import ImageStore, json_files
from data_prep.engine.reader import Reader, command
from data_prep.engine.tables import split_name
from data_prep.engine.texts import CAPTIONS, Text
from vlabs.errors import UserError, run_cli
from vlabs.utils.json_file import get_value

_FILE = re.compile(r"captions_(.+)\.json")


class Coco2017(Reader):
    """The raw files of COCO's captions in one folder.

    Args:
        raw_dir: folder with the captions and the images, zipped or not.

    Raises:
        UserError: files are missing.
    """

    name = "coco2017"
    kind = CAPTIONS
    official = {"train": 591_753, "val": 25_014}

    def __init__(self, raw_dir: Path) -> None:
        super().__init__(raw_dir)
        named = [(file, _FILE.fullmatch(file.name)) for file in json_files(raw_dir, "annotations*.zip")]
        self.subsets = {match[1]: file for file, match in named if match}
        if not self.subsets:
            raise UserError(
                f"{raw_dir} holds no captions_*.json, in an annotations*.zip or unpacked: download it from"
                " https://cocodataset.org/#download"
            )
        places = {subset: self.find_images(subset) for subset in self.subsets}
        if missing := [f"{subset}.zip (or the folder {subset}/)" for subset, place in places.items() if place is None]:
            raise UserError(f"missing in {raw_dir}: {'; '.join(missing)} (https://cocodataset.org/#download)")
        self.store = ImageStore(tuple(dict.fromkeys(filter(None, places.values()))))
        self.tables = [*(file.path for file in self.subsets.values()), *self.instances]

    def texts(self) -> Iterator[Text]:
        """See `Reader`."""
        for subset, file in self.subsets.items():
            split = split_name(subset.rstrip("0123456789"), str(file))
            names = {
                get_value(one, "id", str(file), int): f"{subset}/{get_value(one, 'file_name', str(file), str)}"
                for one in file.entries("images")
            }
            for number, one in enumerate(file.entries("annotations")):
                where = f"{file}, annotation {number}"
                image = get_value(one, "image_id", where, int)
                if image not in names:
                    raise UserError(f"{where}: its image {image} is not in the file")
                yield Text(
                    where,
                    split,
                    (names[image],),
                    get_value(one, "id", where),
                    get_value(one, "caption", where),
                    image,
                    targets=[one.get("target_instances", [])],
                )


main = command(Coco2017)

if __name__ == "__main__":
    run_cli(main)
