"""Captions in the layout of Karpathy's splits: one JSON file with every image's split and sentences, and the images.

The datasets differ in the attributes of a subclass; each has a module with its command.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from data_prep.engine.places import ImageStore, json_files
from data_prep.engine.reader import Reader
from data_prep.engine.tables import split_name
from data_prep.engine.texts import CAPTIONS, Index, Text
from vlabs.data.instances import list_annotations, list_categories
from vlabs.errors import UserError
from vlabs.utils.json_file import check_value, get_objects, get_value

# COCO's `restval` is the part of val2014 that is in neither val nor test; everybody trains on it.
_SPLITS = {"restval": "train"}


class KarpathyCaptions(Reader):
    """The raw files of one dataset of captions.

    Args:
        raw_dir: folder with the JSON file and the images, zipped or not.
        phrases: whether phrases are the captions, and not sentences: for each of COCO's instances what it is.

    Attributes:
        layout: name in the files: the JSON file is `dataset_<layout>.json`, or `<layout>/dataset.json`, also in
            `<layout>.zip`, and says so under `dataset`.
        image_folders: names of the folders with images; each is also looked for as a zip file of that name.
        image_key: key of an image's id in the JSON file.
        source: where to download it, for messages.
        json_archives: zip files that may hold the JSON file.
        folder_in_json: whether the JSON file names the folder of each image; otherwise it is the first.
        other_folders: other names of the first folder.

    Raises:
        UserError: files are missing; the message names all of them.
    """

    layout: ClassVar[str]
    image_folders: ClassVar[tuple[str, ...]]
    image_key: ClassVar[str]
    source: ClassVar[str]
    json_archives: ClassVar[tuple[str, ...]] = ()
    folder_in_json: ClassVar[bool] = True
    other_folders: ClassVar[tuple[str, ...]] = ()
    what_phrases_are: ClassVar[str] = "what each of COCO's instances is, with its mask,"
    kind = CAPTIONS

    def __init__(self, raw_dir: Path, phrases: bool = False) -> None:
        super().__init__(raw_dir)
        missing = []
        files = json_files(raw_dir, f"*{self.layout}.zip") + json_files(raw_dir, "caption_datasets.zip")
        called = (f"dataset_{self.layout}.json", f"{self.layout}/dataset.json")
        json_file = next((file for file in files if (file.member or file.path.as_posix()).endswith(called)), None)
        if json_file is None:
            others = "".join(f", or {archive} with it" for archive in self.json_archives)
            missing.append(f"dataset_{self.layout}.json{others}")
        locations = [self.find_images(folder, *self.other_folders) for folder in self.image_folders]
        missing += [
            f"{folder}.zip (or the folder {folder}/)"
            for folder, location in zip(self.image_folders, locations, strict=True)
            if location is None
        ]
        if json_file is None or missing:
            raise UserError(f"missing in {raw_dir}: {'; '.join(missing)} ({self.source})")
        self.json_file = json_file
        tried = (*self.other_folders, "") if self.other_folders else ()
        self.store = ImageStore(tuple(dict.fromkeys(filter(None, locations))), other_folders=tried)
        if phrases and not self.instances:
            raise UserError(
                f"--phrases needs COCO's instances in {raw_dir}: annotations_trainval2014.zip of"
                " https://cocodataset.org/#download, or annotations.zip of a rendered corpus"
            )
        self.phrases = phrases
        self.options = {"phrases": True} if phrases else {}
        self.tables = [json_file.path, *self.instances]

    def called(self, seen: Mapping[str, int]) -> str:
        """The layout's name if the JSON file says that it is of it; data of your own are called as their folder."""
        return self.call(self.json_file.text("dataset") == self.layout)

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """See `Reader`."""
        super().add_options(parser)
        what = f"take {cls.what_phrases_are} as captions, instead of the sentences"
        parser.add_argument("--phrases", action="store_true", help=what)

    def fill(self, index: Index) -> None:
        """Put all captions into the index."""
        print(f"reading {self.json_file}")
        index.connection.execute("CREATE TABLE known_images (image_id INTEGER PRIMARY KEY, split TEXT, name TEXT)")
        for number, entry in enumerate(self.json_file.entries("images", some=True)):
            self._fill_image(index, f"{self.json_file}, image {number}", entry)
        if self.phrases:
            self._fill_phrases(index)
        else:
            index.add_instances(self.instances)

    def _fill_phrases(self, index: Index) -> None:
        """Put a caption for every instance into the index that is one object: `red solid star`, `traffic light`."""
        for file in self.instances:
            print(f"reading {file}")
            categories = list_categories(file)
            for entry in list_annotations(file):
                if entry.get("iscrowd"):
                    continue
                image = index.connection.execute(
                    "SELECT split, name FROM known_images WHERE image_id = ?", (entry["image_id"],)
                ).fetchone()
                if image is None:
                    continue
                where = f"{file}, instance {entry['id']}"
                split, name = image
                phrase, regions = _phrase(where, entry, categories), [{"segmentation": entry["segmentation"]}]
                index.add(
                    Text(
                        where,
                        split,
                        (name,),
                        entry["id"],
                        phrase,
                        entry["image_id"],
                        targets=[[entry["id"]]],
                        regions=regions,
                    )
                )

    def _fill_image(self, index: Index, where: str, entry: dict[str, Any]) -> None:
        split, image_id = get_value(entry, "split", where, str), get_value(entry, self.image_key, where, int)
        split = split_name(_SPLITS.get(split, split), where)
        folder = get_value(entry, "filepath", where, str) if self.folder_in_json else self.image_folders[0]
        name = f"{folder}/{get_value(entry, 'filename', where, str)}"
        sentences = get_objects(entry, "sentences", where)
        try:
            added = index.connection.execute(
                "INSERT OR IGNORE INTO known_images VALUES (?, ?, ?)", (image_id, split, name)
            )
        except OverflowError as error:
            raise UserError(f"{where} cannot be stored: {error}") from None
        if not added.rowcount:
            index.add_bad("duplicate image id", split, f"image {image_id} ({name})")
        elif not self.phrases:
            if not sentences:
                index.add_bad("image without captions", split, f"image {image_id} ({name})")
            for caption in self._captions(Text(where, split, (name,), 0, "", image_id), sentences):
                index.add(caption)

    def _captions(self, of_image: Text, sentences: Sequence[dict[str, Any]]) -> Iterator[Text]:
        """Yield the captions of an image, from a text that lacks its own."""
        for sentence in sentences:
            yield of_image._replace(
                id=get_value(sentence, "sentid", of_image.where),
                text=get_value(sentence, "raw", of_image.where),
                targets=[sentence.get("target_instances", [])],
            )


def _phrase(where: str, entry: dict[str, Any], categories: dict[int, str]) -> str:
    """What an instance is: the category, after the attributes where there are any, as in the rendered corpus."""
    category = categories.get(entry.get("category_id", -1))
    if not category:
        raise UserError(f"{where}: its category {entry.get('category_id')!r} has no name in the file")
    attributes = entry.get("attributes") or {}
    check_value(where, "attributes", attributes, dict)
    words = [value for value in attributes.values() if isinstance(value, str) and value != category]
    return " ".join([*words, category])
