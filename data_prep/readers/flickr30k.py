"""Prepare Flickr30k's captions in Karpathy's splits.

    vlabs prepare flickr30k --raw-dir downloads --out-dir data/flickr30k

Download: the captions, `flickr30k.zip` or `caption_datasets.zip` of
https://cs.stanford.edu/people/karpathy/deepimagesent/, and the images of https://shannon.cs.illinois.edu/DenotationGraph/
(a tar file, which has to be unpacked); if wanted, `annotations.zip` of
https://github.com/BryanPlummer/flickr30k_entities.

`dataset_flickr30k.json` works too; the images are in the folder `flickr30k-images/` or `flickr30k_images/` or in a
zip file of one of these names. The splits are train, val and test; an image's id is its `imgid`, a caption's its
`sentid`. A stopped run continues when it is started again.

If the folder also holds Flickr30K Entities (`entities.py`), the region of a caption is the boxes of all phrases of its
sentence. With `--phrases`, the phrases that have boxes are the captions instead of the sentences: each with its own
boxes, and with 100 * `sentid` + its position in the sentence, from 1, as its id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.engine.reader import command
from data_prep.engine.texts import Index, Text
from data_prep.readers.entities import find_entities, match_sentences
from data_prep.readers.karpathy import KarpathyCaptions
from vlabs.errors import UserError, run_cli
from vlabs.utils.json_file import check_value

_PHRASES_A_SENTENCE = 100  # more than any has


class Flickr30k(KarpathyCaptions):
    """The raw files of Flickr30k in one folder, with or without Flickr30K Entities.

    Args:
        raw_dir: the folder.
        phrases: whether phrases that have boxes are the captions, and not sentences.

    Raises:
        UserError: files are missing; the message names all of them.
    """

    name = layout = "flickr30k"
    what_phrases_are = "the phrases of Flickr30K Entities that have boxes"
    image_folders = ("flickr30k-images",)
    image_key = "imgid"
    source = (
        "captions: https://cs.stanford.edu/people/karpathy/deepimagesent/flickr30k.zip; images:"
        " https://shannon.cs.illinois.edu/DenotationGraph/, a tar file has to be unpacked"
    )
    json_archives = ("flickr30k.zip", "caption_datasets.zip")
    folder_in_json = False
    other_folders = ("flickr30k_images",)

    def __init__(self, raw_dir: Path, phrases: bool = False) -> None:
        super().__init__(raw_dir)
        self.of_entities = phrases
        self.entities = find_entities(raw_dir)
        self.unmatched = 0
        if phrases:
            if self.entities is None:
                raise UserError(
                    f"--phrases needs Flickr30K Entities in {raw_dir}: annotations.zip of"
                    " https://github.com/BryanPlummer/flickr30k_entities, or its folders Annotations/ and Sentences/"
                )
            self.options["phrases"] = True
        if self.entities is not None:
            # The Entities' annotations.zip is called like the file of instances of another corpus.
            self.instances = [path for path in self.instances if path not in self.entities.tables]
            self.tables = [self.json_file.path, *self.entities.tables, *self.instances]
            self.options |= self.entities.options

    def fill(self, index: Index) -> None:
        """Put all captions into the index, and say how many have no sentence among the Entities."""
        if self.entities is not None:
            print(f"reading {self.entities.place}")
        super().fill(index)
        if self.entities is not None:
            print(f"{self.unmatched:,} captions match no sentence of {self.entities.place}, and have no region")

    def _captions(self, of_image: Text, sentences: Sequence[dict[str, Any]]) -> Iterator[Text]:
        captions = list(super()._captions(of_image, sentences))
        if self.entities is None:
            yield from captions
            return
        for caption in captions:
            check_value(caption.where, "raw", caption.text, str)
            check_value(caption.where, "sentid", caption.id, int)
        found = self.entities.sentences(PurePosixPath(of_image.images[0]).stem)
        matched = match_sentences([caption.text for caption in captions], found)
        for caption, sentence in zip(captions, matched, strict=True):
            self.unmatched += sentence is None
            if not self.of_entities:
                yield caption._replace(regions=sentence.regions if sentence else [])
                continue
            phrases = sentence.phrases if sentence else []
            if len(phrases) >= _PHRASES_A_SENTENCE:
                raise UserError(
                    f"{caption.where}: a sentence has {len(phrases)} phrases among the Entities, which is too many"
                )
            for place, phrase in enumerate(phrases, 1):
                if phrase.regions and phrase.text:
                    number = _PHRASES_A_SENTENCE * int(caption.id) + place
                    yield caption._replace(id=number, text=phrase.text, targets=(), regions=phrase.regions)


main = command(Flickr30k)

if __name__ == "__main__":
    run_cli(main)
