"""Flickr30K Entities: the phrases of Flickr30k's sentences, and the boxes of what they name.

For each image there is `Sentences/<image id>.txt`, with a line for each of its sentences, in which phrases stand as
`[/EN#283585/people Two young guys]`, and `Annotations/<image id>.xml` with the boxes by these numbers. Both are in
`annotations.zip` of https://github.com/BryanPlummer/flickr30k_entities, which is read as it is, unpacked, or inside the
zip file of the whole repository.
"""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.engine.regions import describe_files
from vlabs.errors import UserError
from vlabs.utils.archives import ERRORS, entries, open_zip, read_member, read_regular

_PHRASE = re.compile(r"\[/EN#(\d+)/\S+\s+([^\]]*)\]")
_FOLDERS = {"Annotations": ".xml", "Sentences": ".txt"}
_LARGEST = 256 * 2**20  # bytes of a file of annotations


@dataclass(frozen=True)
class Phrase:
    """A phrase of a sentence; its regions, as in `engine.regions`, are none where nothing of it is to be seen."""

    text: str
    regions: list[dict[str, Any]]


@dataclass(frozen=True)
class Sentence:
    """A sentence, with its phrases in their order."""

    text: str
    phrases: list[Phrase]

    @property
    def regions(self) -> list[dict[str, Any]]:
        """The regions of all phrases, each once."""
        found: list[dict[str, Any]] = []
        for phrase in self.phrases:
            found += [region for region in phrase.regions if region not in found]
        return found


class Entities:
    """The annotations, in one place.

    Args:
        place: of the annotations, for messages.
        archive: the open zip file that they are in.
        files: names in the zip file, or paths, by folder (`Sentences` or `Annotations`) and image id.

    Attributes:
        tables: the files that have to be the same for a preparation to continue.
        options: what the options have to say of files outside a zip file, for the same reason.
    """

    def __init__(self, place: Path, files: dict[tuple[str, str], str], archive: zipfile.ZipFile | None = None) -> None:
        self.place = place
        self.archive = archive
        self.files = files
        self.tables: list[Path] = [place] if archive else []
        self.options: dict[str, Any] = {}
        if not archive:
            self.options["entities"] = describe_files({"/".join(key): Path(name) for key, name in files.items()})

    def sentences(self, image_id: str) -> list[Sentence]:
        """Return the sentences of an image; none of one that is not annotated.

        Args:
            image_id: the image's file name without `.jpg`.

        Raises:
            UserError: the files of the image are damaged, or only one of them is there.
        """
        text = self._read("Sentences", image_id)
        if text is None:
            return []
        where, content = text
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text ({error}): download the Entities again") from None
        boxes = self._boxes(image_id)
        return [_read_sentence(line, boxes) for line in lines if line.strip()]

    def _boxes(self, image_id: str) -> dict[str, list[dict[str, Any]]]:
        found = self._read("Annotations", image_id)
        if found is None:
            raise UserError(f"{self.place} has Sentences/{image_id}.txt and no Annotations/{image_id}.xml")
        where, content = found
        try:
            root = ET.fromstring(content, ET.XMLParser(target=_NoDoctype()))
        except (ET.ParseError, ValueError, LookupError) as error:
            raise UserError(f"{where} cannot be read as an annotation ({error}): download the Entities again") from None
        size = [_number(where, of.find(side)) for of in root.findall("size")[:1] for side in ("height", "width")]
        boxes: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        for entry in root.iter("object"):
            for box in entry.iter("bndbox"):
                left, top, right, bottom = (_number(where, box.find(n)) for n in ("xmin", "ymin", "xmax", "ymax"))
                # Pixels count from 1 there, and the last ones belong to the box.
                region: dict[str, Any] = {"box": [left - 1, top - 1, right - left + 1, bottom - top + 1]}
                if size:
                    region["size"] = size
                for name in entry.findall("name"):
                    boxes[(name.text or "").strip()].append(region)
        return boxes

    def _read(self, folder: str, image_id: str) -> tuple[str, bytes] | None:
        """What to call a file in messages, and its content."""
        name = self.files.get((folder, image_id))
        if name is None:
            return None
        if self.archive is None:
            return name, read_regular(Path(name))
        return f"{self.place} ({name})", read_member(self.place, self.archive, name, _LARGEST)


def find_entities(raw_dir: Path) -> Entities | None:
    """Find the annotations in a folder, in a zip file there, or one folder deeper.

    Raises:
        UserError: a zip file is damaged.
    """
    zips = [raw_dir / "annotations.zip", *raw_dir.glob("*ntities*.zip"), *raw_dir.glob("*/annotations.zip")]
    for path in sorted(path for path in zips if path.is_file()):
        for archive in _nested(path):
            if files := _by_image((name, info.filename) for name, info in entries(archive)):
                return Entities(path, files, archive)
    for sentences in sorted([*raw_dir.glob("Sentences"), *raw_dir.glob("*/Sentences"), *raw_dir.glob("*/*/Sentences")]):
        place = sentences.parent
        if files := _by_image((str(path), str(path)) for folder in _FOLDERS for path in place.glob(f"{folder}/*")):
            return Entities(place, files)
    return None


def _nested(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip file, and the annotations.zip inside it, as in the zip file of the repository."""
    archive = open_zip(path)
    yield archive
    for name, info in entries(archive):
        if PurePosixPath(name).name == "annotations.zip":
            content = io.BytesIO(read_member(path, archive, info, _LARGEST))
            try:
                yield zipfile.ZipFile(content)
            except ERRORS as error:
                raise UserError(f"{path} ({name}) is not a whole zip file ({error}): download it again") from None


def _by_image(names: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """The second of each pair of names by folder and image, which the first one says; none without sentences."""
    files = {}
    for name, own in names:
        path = PurePosixPath(name)
        if _FOLDERS.get(path.parent.name) == path.suffix:
            files[path.parent.name, path.stem] = own
    return files if any(folder == "Sentences" for folder, _ in files) else {}


def _read_sentence(line: str, boxes: dict[str, list[dict[str, Any]]]) -> Sentence:
    # Number 0 is of what is not to be seen ("the camera"), whatever has that name in the annotations.
    phrases = [
        Phrase(match[2].strip(), [] if int(match[1]) == 0 else boxes.get(match[1], []))
        for match in _PHRASE.finditer(line)
    ]
    return Sentence(_PHRASE.sub(lambda match: match[2], line).strip(), phrases)


def _essence(text: str) -> str:
    """Its letters and digits, large or small."""
    return "".join(filter(str.isalnum, text.lower()))


def match_sentences(captions: Sequence[str], sentences: Sequence[Sentence]) -> list[Sentence | None]:
    """Return the sentence of each caption of an image, or None; of sentences with the same text each is taken once."""
    left = list(sentences)
    matched: list[Sentence | None] = []
    for caption in captions:
        found = next((sentence for sentence in left if _essence(sentence.text) == _essence(caption)), None)
        if found is not None:
            left.remove(found)
        matched.append(found)
    return matched


class _NoDoctype(ET.TreeBuilder):
    """Builds the tree of a document that declares nothing, so that no entity in it is ever expanded."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a DOCTYPE, which these files have not")


def _number(where: str, element: ET.Element | None) -> int:
    try:
        return int(element.text or "") if element is not None else int("")
    except ValueError:
        text = "missing" if element is None else repr(element.text)
        raise UserError(f"{where}: a side of a box or an image must be a whole number, and is {text:.80}") from None
