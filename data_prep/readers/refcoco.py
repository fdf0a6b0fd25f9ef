"""Prepare RefCOCO, RefCOCO+ or RefCOCOg: expressions, each of which names one object of a picture of COCO.

    python -m data_prep.refcoco --raw-dir downloads --out-dir data/refcoco --dataset refcoco

`--raw-dir` holds the folder `refcoco/`, `refcoco+/` or `refcocog/`, or the zip file of it
(https://github.com/lichengunc/refer), with `refs(unc).p` and `instances.json`, and the images, in `train2014.zip` or in
the folder `train2014/`. Every expression becomes a caption, with its `sent_id` as its id, and its object is what part
of the picture it is about. The splits are those of the file: train, val, and testA and testB or test. A run that was
stopped goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import io
import pickle
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.engine.images import ImageStore, open_zip
from data_prep.engine.json_file import get_value
from data_prep.engine.pipeline import add_options, check_split_name, prepare, read_options
from data_prep.engine.texts import CAPTIONS, Index, Text, check_value
from vlabs.errors import UserError, run_cli

_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
_RELEASE = "train2014"


class RefCoco:
    """The raw files of one of the data sets.

    Args:
        raw_dir: folder with all of them.
        dataset: `refcoco`, `refcoco+` or `refcocog`.
        split_by: who divided it, such as `unc`, `google` or `umd`.

    Raises:
        UserError: files are missing; the message names all of them.
    """

    kind = CAPTIONS

    def __init__(self, raw_dir: Path, dataset: str, split_by: str) -> None:
        if not raw_dir.is_dir():
            raise UserError(f"there is no folder {raw_dir}: --raw-dir is where the downloads of {dataset} lie")
        self.name = dataset
        refs = f"refs({split_by}).p"
        folder, archive = raw_dir / dataset, raw_dir / f"{dataset}.zip"
        self.member: str | None = None
        missing = []
        if folder.is_dir():
            self.refs, self.instances = folder / refs, folder / "instances.json"
            others = [path.name for path in folder.glob("refs(*).p")]
            missing = [f"{dataset}/{path.name}" for path in (self.refs, self.instances) if not path.is_file()]
            self.tables: Sequence[Path] = [self.refs, self.instances]
        elif archive.is_file():
            self.refs = self.instances = archive
            with open_zip(archive) as opened:
                members = [PurePosixPath(name) for name in opened.namelist()]
            others = [path.name for path in members if path.match("refs(*).p")]
            self.member = next((str(path) for path in members if path.name == refs), None)
            missing = [] if self.member else [f"{refs} in {archive.name}"]
            missing += (
                [] if any(path.name == "instances.json" for path in members) else [f"instances.json in {archive}"]
            )
            self.tables = [archive]
        else:
            others = []
            missing = [f"the folder {dataset}/ or {dataset}.zip (https://github.com/lichengunc/refer)"]
        if others and refs not in others:
            missing.append(f"--split-by names one of {', '.join(sorted(others))}")
        images = next((path for path in (raw_dir / f"{_RELEASE}.zip", raw_dir / _RELEASE) if path.exists()), None)
        if images is None:
            missing.append(f"{_RELEASE}.zip or the folder {_RELEASE}/ (https://cocodataset.org/#download)")
        if images is None or missing:
            raise UserError(f"missing in {raw_dir}: {'; '.join(missing)}")
        self.images: Sequence[Path] = [images]
        self.store = ImageStore((images if images.is_file() else raw_dir,))

    def image_store(self, split: str) -> ImageStore:
        """Return where the images are."""
        return self.store

    def called(self, seen: Mapping[str, int]) -> str:
        """Return what the data set is called."""
        return self.name

    def fill(self, index: Index) -> None:
        """Put all expressions into the index."""
        name = f"{self.refs} ({self.member})" if self.member else str(self.refs)
        print(f"reading {name}")
        refs = read_plain_pickle(name, self._read())
        if not isinstance(refs, list) or not refs:
            raise UserError(f"{name} is no list of expressions")
        for number, ref in enumerate(refs):
            self._fill_ref(index, f"{name}, entry {number}", ref)
        index.add_instances([self.instances])

    def _read(self) -> bytes:
        if self.member is None:
            return self.refs.read_bytes()
        try:
            with open_zip(self.refs) as archive:
                return archive.read(self.member)
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise UserError(f"{self.refs} is not a whole zip file ({error}): download it again") from None

    @staticmethod
    def _fill_ref(index: Index, where: str, ref: object) -> None:
        if not isinstance(ref, dict):
            raise UserError(f"{where} is no dictionary")
        split, image_id, instance = (get_value(ref, key, where) for key in ("split", "image_id", "ann_id"))
        check_value(where, "split", split, str)
        check_value(where, "image_id", image_id, int)
        check_value(where, "ann_id", instance, int)
        sentences = get_value(ref, "sentences", where)
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise UserError(f"{where}: 'sentences' must be a list of dictionaries")
        for sentence in sentences:
            # The entry's own file name has the number of the object in it as well.
            image = f"{_RELEASE}/COCO_{_RELEASE}_{image_id:012d}.jpg"
            caption_id, caption = (get_value(sentence, key, where) for key in ("sent_id", "sent"))
            split = check_split_name(split, where)
            index.add(Text(where, split, (image,), caption_id, caption, image_id, targets=[[instance]]))


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers, and refuses whatever would import or call something."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants the class or function {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it wants an object from outside")


def read_plain_pickle(name: str, content: bytes) -> Any:
    """Return what a pickle of plain data holds, of Python 2 or 3, without running any of its code.

    Args:
        name: of the file, for messages.
        content: of the file.

    Raises:
        UserError: it is damaged, or holds more than plain data.
    """
    try:
        return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise UserError(
            f"{name} is not read: {str(error) or type(error).__name__}; a file of expressions is a whole pickle of"
            " lists, dictionaries, text and numbers alone: download it again"
        ) from None


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.refcoco",
        description="Prepare RefCOCO, RefCOCO+ or RefCOCOg from the downloaded files.",
    )
    parser.add_argument("--raw-dir", type=Path, required=True, help="folder with the downloaded files")
    parser.add_argument("--dataset", choices=tuple(_SPLIT_BY), required=True, help="which of the three")
    parser.add_argument(
        "--split-by", choices=("unc", "google", "umd"), help="who divided it (default: unc, and umd for refcocog)"
    )
    add_options(parser)
    arguments = parser.parse_args()
    split_by = arguments.split_by or _SPLIT_BY[arguments.dataset]
    raw = RefCoco(arguments.raw_dir, arguments.dataset, split_by)
    prepare(raw, arguments.out_dir, read_options(arguments, split_by=split_by))


if __name__ == "__main__":
    run_cli(main)
