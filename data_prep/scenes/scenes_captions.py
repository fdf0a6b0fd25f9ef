"""Prepare the captions of the embedded corpus, which `vlabs prepare scenes` renders.

    vlabs prepare scenes --size small --out-dir data/scenes-raw
    vlabs prepare scenes_captions --raw-dir data/scenes-raw --out-dir data/scenes-captions

Download: nothing, the first command renders the images.

Every split of the corpus is prepared. Each caption says in `target_instances` which objects it is about.
With `--phrases` the captions are what the objects are ("red large striped star"), each with its mask.
"""

from __future__ import annotations

from data_prep.engine.reader import command
from data_prep.readers.karpathy import KarpathyCaptions
from data_prep.scenes.corpus import subset_name
from data_prep.scenes.render import SPLITS
from vlabs.errors import run_cli


class ScenesCaptions(KarpathyCaptions):
    """The captions and images of a rendered corpus in one folder."""

    name = "scenes_captions"
    layout = "scenes"
    image_folders = tuple(subset_name(split) for split in SPLITS)
    image_key = "cocoid"
    source = "make them with `vlabs prepare scenes --size small --out-dir FOLDER`"


main = command(ScenesCaptions)

if __name__ == "__main__":
    run_cli(main)
