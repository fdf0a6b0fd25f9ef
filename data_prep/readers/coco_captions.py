"""Prepare COCO's captions in Karpathy's splits.

    vlabs prepare coco_captions --raw-dir downloads --out-dir data/coco_captions

Download: the captions, `coco.zip` or `caption_datasets.zip` of
https://cs.stanford.edu/people/karpathy/deepimagesent/, and the images, `train2014.zip` and `val2014.zip` of
https://cocodataset.org/#download.

Nothing needs unpacking, but unpacked files work too. The splits are train (113,287 images:
Karpathy's `restval` counts as training), val and test (5,000 each); an image's id is COCO's, a caption's its `sentid`.
A stopped run continues when it is started again.

With `--phrases` the captions are the categories of COCO's instances ("traffic light"), each with its mask, for
`task=naming`; `annotations_trainval2014.zip` must be in the same folder.
"""

from __future__ import annotations

from data_prep.engine.reader import command
from data_prep.readers.karpathy import KarpathyCaptions
from vlabs.errors import run_cli


class CocoCaptions(KarpathyCaptions):
    """The raw files of COCO's captions in one folder."""

    name = "coco_captions"
    layout = "coco"
    image_folders = ("train2014", "val2014")
    image_key = "cocoid"
    source = (
        "captions: https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip; images:"
        " https://cocodataset.org/#download"
    )
    json_archives = ("coco.zip", "caption_datasets.zip")


main = command(CocoCaptions)

if __name__ == "__main__":
    run_cli(main)
