"""Prepare the captions of the embedded corpus, which `data_prep.scenes` renders.

    python -m data_prep.scenes --size small --out-dir data/scenes-raw
    python -m data_prep.scenes_captions --raw-dir data/scenes-raw --out-dir data/scenes-captions

Every split of the corpus is prepared. Each caption says in `target_instances` which objects it is about.
With `--phrases` the captions are what the objects are ("red large striped star"), each with its mask.
"""

from __future__ import annotations

from data_prep.readers.karpathy import KarpathyCaptions, Layout, run_command
from data_prep.scenes.corpus import subset_name
from data_prep.scenes.render import SPLITS
from vlabs.errors import run_cli


class ScenesCaptions(KarpathyCaptions):
    """The captions and images of a rendered corpus in one folder."""

    layout = Layout(
        name="scenes",
        image_folders=tuple(subset_name(split) for split in SPLITS),
        image_id="cocoid",
        source="make them with `python -m data_prep.scenes --size small --out-dir FOLDER`",
    )


def main() -> None:
    """Run the command line."""
    run_command(ScenesCaptions, "data_prep.scenes_captions", "Prepare the captions of the embedded corpus.")


if __name__ == "__main__":
    run_cli(main)
