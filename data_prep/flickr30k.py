"""Prepare Flickr30k in Karpathy's splits from the files as they are downloaded, which need no unpacking.

    python -m data_prep.flickr30k --raw-dir downloads --out-dir data/flickr30k

`--raw-dir` holds the captions, in `dataset_flickr30k.json` or in `flickr30k.zip` or `caption_datasets.zip` of
https://cs.stanford.edu/people/karpathy/deepimagesent/, and the images, in the folder `flickr30k-images/` or
`flickr30k_images/` or in a zip file of one of these names. The splits are train, val and test; an image's id is its
`imgid`, a caption's its `sentid`. A run that was stopped goes on where it was when it is started again.
"""

from __future__ import annotations

from data_prep.karpathy import KarpathyCaptions, Layout, run_command
from vlabs.errors import run_cli


class Flickr30k(KarpathyCaptions):
    """The raw files of Flickr30k in one folder."""

    layout = Layout(
        name="flickr30k",
        image_folders=("flickr30k-images",),
        image_id="imgid",
        source="captions: https://cs.stanford.edu/people/karpathy/deepimagesent/flickr30k.zip;"
        " images: https://shannon.cs.illinois.edu/DenotationGraph/, a tar file has to be unpacked",
        json_archives=("flickr30k.zip", "caption_datasets.zip"),
        folder_in_json=False,
        other_folders=("flickr30k_images",),
    )


def main() -> None:
    """Run the command line."""
    run_command(Flickr30k, "data_prep.flickr30k", "Prepare Flickr30k's images and captions in Karpathy's splits.")


if __name__ == "__main__":
    run_cli(main)
