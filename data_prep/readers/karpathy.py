"""Captions in the layout of Karpathy's splits: one JSON file with every image's split and sentences, and the images.

What the data sets differ in is a `Layout`; each has a module with its command.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.engine.captions import CAPTIONS, CaptionIndex
from data_prep.engine.images import ImageStore, open_zip
from data_prep.engine.index import check_value
from data_prep.engine.json_file import JsonFile, get_value
from data_prep.engine.pipeline import add_options, check_split_name, prepare, read_options
from data_prep.engine.regions import add_instances, find_instances
from vlabs.data.instances import list_annotations, list_categories
from vlabs.errors import UserError

# COCO's `restval` is the part of val2014 that is in neither val nor test; everybody trains on it.
_SPLITS = {"restval": "train"}


@dataclass(frozen=True)
class Layout:
    """How one data set is laid out.

    Attributes:
        name: of the data set; its JSON file is `dataset_<name>.json`, or `<name>/dataset.json` in `<name>.zip`.
        image_folders: names of the folders with images; each is also looked for as a zip file of that name.
        image_id: key of an image's id in the JSON file.
        source: where to download it, for messages.
        json_archives: zip files that may hold the JSON file.
        folder_in_json: whether the JSON file names the folder of each image; otherwise it is the first.
        other_folders: other names of the first folder.
    """

    name: str
    image_folders: tuple[str, ...]
    image_id: str
    source: str
    json_archives: tuple[str, ...] = ()
    folder_in_json: bool = True
    other_folders: tuple[str, ...] = ()


class KarpathyCaptions:
    """The raw files of one data set of captions.

    Args:
        raw_dir: folder with the JSON file and the images, zipped or not.
        phrases: whether phrases are the captions, and not sentences: for each of COCO's instances what it is.

    Attributes:
        options: what the command line's options have to say of this, so that a run with other ones starts anew.

    Raises:
        UserError: files are missing; the message names all of them.
    """

    layout: ClassVar[Layout]
    what_phrases_are: ClassVar[str] = "what each of COCO's instances is, with its mask,"
    kind = CAPTIONS

    def __init__(self, raw_dir: Path, phrases: bool = False) -> None:
        layout = self.layout
        if not raw_dir.is_dir():
            raise UserError(f"there is no folder {raw_dir}: --raw-dir is where the downloads of {layout.name} lie")
        missing = []
        json_file = next(self._json_files(raw_dir), None)
        if json_file is None:
            archives = "".join(f", or {archive} with it" for archive in layout.json_archives)
            missing.append(f"dataset_{layout.name}.json{archives}")
        locations: list[Path] = []  # to look up names in, which start with a folder's
        places: list[Path] = []
        for folder in layout.image_folders:
            names = (folder, *layout.other_folders)
            archive = next((path for name in names if (path := raw_dir / f"{name}.zip").is_file()), None)
            unpacked = next((path for name in names if (path := raw_dir / name).is_dir()), None)
            if archive is None and unpacked is None:
                missing.append(f"{folder}.zip (or the folder {folder}/)")
            locations.append(archive or raw_dir)
            places.append(archive or unpacked or raw_dir)
        if json_file is None or missing:
            raise UserError(f"missing in {raw_dir}: {'; '.join(missing)} ({layout.source})")
        self.name = layout.name
        self.json_file = json_file
        self.store = ImageStore(
            tuple(dict.fromkeys(locations)),
            other_folders=(*layout.other_folders, "") if layout.other_folders else (),
        )
        self.instances = find_instances(raw_dir)
        if phrases and not self.instances:
            raise UserError(
                f"--phrases needs COCO's instances in {raw_dir}: annotations_trainval2014.zip of"
                " https://cocodataset.org/#download, or annotations.zip of a rendered corpus"
            )
        self.phrases = phrases
        self.options: dict[str, Any] = {"phrases": True} if phrases else {}
        self.tables: Sequence[Path] = [json_file.path, *self.instances]
        self.images: Sequence[Path] = sorted(places)

    def image_store(self, split: str) -> tuple[str, ImageStore]:
        """Return the split's own name, because no image is in two, and where the images are."""
        return split, self.store

    def fill(self, index: CaptionIndex) -> None:
        """Put all captions into the index."""
        print(f"reading {self.json_file}")
        index.connection.execute("CREATE TABLE known_images (image_id INTEGER PRIMARY KEY, split TEXT, name TEXT)")
        number = -1
        for number, entry in enumerate(self.json_file.entries("images")):
            self._fill_image(index, f"{self.json_file}, image {number}", entry)
        if number < 0:
            raise UserError(f"{self.json_file} has no 'images'")
        if self.phrases:
            self._fill_phrases(index)
        else:
            add_instances(index, self.instances)

    def _fill_phrases(self, index: CaptionIndex) -> None:
        """Put a caption for every instance into the index that is one object: `red solid star`, `traffic light`."""
        for file in self.instances:
            print(f"reading {file}")
            categories = list_categories(file)
            for entry in list_annotations(file):
                if entry.get("iscrowd"):
                    continue
                where = f"{file}, instance {entry['id']}"
                image = index.connection.execute(
                    "SELECT split, name FROM known_images WHERE image_id = ?", (entry["image_id"],)
                ).fetchone()
                if image is None:
                    continue
                index.add_caption(
                    where,
                    split=image[0],
                    image_id=entry["image_id"],
                    image_name=image[1],
                    caption_id=entry["id"],
                    caption=_phrase(where, entry, categories),
                    target_instances=[entry["id"]],
                    regions=[{"segmentation": entry["segmentation"]}],
                )

    def _fill_image(self, index: CaptionIndex, where: str, entry: dict[str, Any]) -> None:
        split, image_id = get_value(entry, "split", where), get_value(entry, self.layout.image_id, where)
        check_value(where, "split", split, str)
        check_value(where, self.layout.image_id, image_id, int)
        split = check_split_name(_SPLITS.get(split, split), where)
        image_name = self._image_name(where, entry)
        sentences = get_value(entry, "sentences", where)
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise UserError(f"{where}: 'sentences' must be a list of objects")
        try:
            added = index.connection.execute(
                "INSERT OR IGNORE INTO known_images VALUES (?, ?, ?)", (image_id, split, image_name)
            )
        except OverflowError as error:
            raise UserError(f"{where} cannot be stored: {error}") from None
        if not added.rowcount:
            index.add_bad("duplicate image id", split, f"image {image_id} ({image_name})")
            return
        if self.phrases:
            return
        if not sentences:
            index.add_bad("image without captions", split, f"image {image_id} ({image_name})")
        for text in self._texts(where, image_name, sentences):
            index.add_caption(where, split=split, image_id=image_id, image_name=image_name, **text)

    def _texts(self, where: str, image_name: str, sentences: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield what is to be a caption of an image, by the names of what `CaptionIndex.add_caption` takes."""
        for sentence in sentences:
            yield {
                "caption_id": get_value(sentence, "sentid", where),
                "caption": get_value(sentence, "raw", where),
                "target_instances": sentence.get("target_instances", []),
            }

    def _image_name(self, where: str, entry: dict[str, Any]) -> str:
        name = get_value(entry, "filename", where)
        check_value(where, "filename", name, str)
        folder = self.layout.image_folders[0]
        if self.layout.folder_in_json:
            folder = get_value(entry, "filepath", where)
            check_value(where, "filepath", folder, str)
        return f"{folder}/{name}"

    @classmethod
    def _json_files(cls, raw_dir: Path) -> Iterator[JsonFile]:
        name = f"dataset_{cls.layout.name}.json"
        in_folder = f"{cls.layout.name}/dataset.json"
        for path in (raw_dir / name, raw_dir / in_folder):
            if path.is_file():
                yield JsonFile(path)
        for archive_name in cls.layout.json_archives:
            path = raw_dir / archive_name
            if path.is_file():
                with open_zip(path) as archive:
                    members = archive.namelist()
                for member in members:
                    if Path(member).name == name or member == in_folder:
                        yield JsonFile(path, member)


def _phrase(where: str, entry: dict[str, Any], categories: dict[int, str]) -> str:
    """What an instance is: the category, after the attributes where there are any, as in the rendered corpus."""
    category = categories.get(entry.get("category_id", -1))
    if not category:
        raise UserError(f"{where}: its category {entry.get('category_id')!r} has no name in the file")
    attributes = entry.get("attributes") or {}
    if not isinstance(attributes, dict):
        raise UserError(f"{where}: 'attributes' must be an object")
    words = [value for value in attributes.values() if isinstance(value, str) and value != category]
    return " ".join([*words, category])


def run_command(raw_class: type[KarpathyCaptions], program: str, description: str) -> None:
    """Run the command line that prepares one data set."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the downloaded files")
    parser.add_argument(
        "--phrases",
        action="store_true",
        help=f"take {raw_class.what_phrases_are} as captions, in place of the sentences",
    )
    add_options(parser)
    arguments = parser.parse_args()
    raw = raw_class(arguments.raw_dir, arguments.phrases)
    prepare(raw, arguments.out_dir, read_options(arguments, **raw.options))
