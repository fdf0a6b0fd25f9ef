"""Prepare RefCOCO, RefCOCO+ or RefCOCOg: expressions, each of which names one object of an image of COCO.

    vlabs prepare refcoco --raw-dir downloads --out-dir data/refcoco --dataset refcoco

Download: refcoco.zip, refcoco+.zip or refcocog.zip of https://github.com/lichengunc/refer, and train2014.zip of
https://cocodataset.org/#download.

Nothing needs unpacking, but the folders `refcoco/` (with `refs(unc).p` and `instances.json`) and `train2014/` work too.
Every expression becomes a caption, with its `sent_id` as its id and its object as its region. The splits are those of
the file: train, val, and testA and testB or test. A stopped run continues when it is started again.
"""

from __future__ import annotations

import argparse
import codecs
import io
import pickle
import pickletools
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data_prep.engine.places import ImageStore, Listing, read_file
from data_prep.engine.reader import Reader, command
from data_prep.engine.tables import split_name
from data_prep.engine.texts import CAPTIONS, Text
from vlabs.errors import UserError, one_line, run_cli
from vlabs.utils.json_file import get_value
from vlabs.utils.plain import check_plain

_SPLIT_BY = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd"}
_RELEASE = "train2014"


class RefCoco(Reader):
    """The raw files of one of the datasets.

    Args:
        raw_dir: folder with all of them.
        dataset: `refcoco`, `refcoco+` or `refcocog`.
        split_by: who divided it, such as `unc`, `google` or `umd`; as is usual if not given.

    Raises:
        UserError: files are missing; the message names all of them.
    """

    name = "refcoco"
    kind = CAPTIONS

    def __init__(self, raw_dir: Path, dataset: str, split_by: str | None = None) -> None:
        super().__init__(raw_dir)
        split_by = split_by or _SPLIT_BY[dataset]
        self.dataset = dataset
        self.options["split_by"] = split_by
        names = (f"refs({split_by}).p", "instances.json")
        place = next((path for path in (raw_dir / dataset, raw_dir / f"{dataset}.zip") if path.exists()), None)
        files = {} if place is None else Listing(place).by_last
        missing = [f"{place.name}/{name}" for name in names if name not in files] if place else []
        if place is None:
            missing = [f"the folder {dataset}/ or {dataset}.zip (https://github.com/lichengunc/refer)"]
        others = sorted(name for name in files if PurePosixPath(name).match("refs(*).p"))
        if others and names[0] not in others:
            missing.append(f"--split-by names one of {', '.join(others)}")
        location = self.find_images(_RELEASE)
        if location is None:
            missing.append(f"{_RELEASE}.zip or the folder {_RELEASE}/ (https://cocodataset.org/#download)")
        if location is None or missing:
            raise UserError(f"missing in {raw_dir}: {'; '.join(missing)}")
        self.store = ImageStore((location,))
        self.refs, instances = (files[name] for name in names)
        self.instances = [Path(instances.file)]
        self.tables = list(dict.fromkeys([Path(self.refs.file), *self.instances]))

    def called(self, seen: Any) -> str:
        """See `Reader`."""
        return self.dataset

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """See `Reader`."""
        super().add_options(parser)
        parser.add_argument("--dataset", choices=tuple(_SPLIT_BY), required=True, help="which of the three")
        what = "who divided it (default: unc, and umd for refcocog)"
        parser.add_argument("--split-by", choices=("unc", "google", "umd"), help=what)

    def texts(self) -> Iterator[Text]:
        """See `Reader`."""
        name = self.refs.file if self.refs.offset is None else f"{self.refs.file} ({self.refs.name})"
        print(f"reading {name}")
        try:
            content = read_file(self.refs)
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: {one_line(str(error))}") from None
        refs = read_plain_pickle(name, content)
        if not isinstance(refs, list) or not refs:
            raise UserError(f"{name} is no list of expressions")
        for number, ref in enumerate(refs):
            yield from self._of_ref(f"{name}, entry {number}", ref)

    @staticmethod
    def _of_ref(where: str, ref: object) -> Iterator[Text]:
        if not isinstance(ref, dict):
            raise UserError(f"{where} is no dictionary")
        split = split_name(get_value(ref, "split", where, str), where)
        image_id, instance = (get_value(ref, key, where, int) for key in ("image_id", "ann_id"))
        sentences = get_value(ref, "sentences", where)
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            raise UserError(f"{where}: 'sentences' must be a list of dictionaries")
        for sentence in sentences:
            # The entry's own file name has the number of the object in it as well.
            image = f"{_RELEASE}/COCO_{_RELEASE}_{image_id:012d}.jpg"
            caption_id, caption = (get_value(sentence, key, where) for key in ("sent_id", "sent"))
            yield Text(where, split, (image,), caption_id, caption, image_id, targets=[[instance]])


_CODES = {code.code: code for code in pickletools.opcodes}
# What plain data need. All that imports or calls something is not among it, nor tuples, which may be keys of any depth.
_PLAIN = frozenset({
    "PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2",
    "LONG", "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "LIST", "EMPTY_LIST", "APPEND", "APPENDS", "DICT", "EMPTY_DICT", "SETITEM",
    "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MEMOIZE",
})  # fmt: skip


def read_plain_pickle(name: str, content: bytes) -> Any:
    """Return what a pickle of plain data holds, of Python 2 or 3, without running any of its code.

    Args:
        name: of the file, for messages.
        content: of the file.

    Raises:
        UserError: it is damaged, or holds more than plain data.
    """
    try:
        _check_plain(content)
        value = _PlainUnpickler(io.BytesIO(content), encoding="utf-8", errors="vlabs-latin-1").load()
        check_plain(value, "it", most=len(content), finite=False)  # what is in it many times would be endless
        return value
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise UserError(
            f"{name} is not read: {one_line(str(error)) or type(error).__name__}; a file of expressions is a whole"
            " pickle of lists, dictionaries, text and numbers alone: download it again"
        ) from None


def _check_plain(content: bytes) -> None:
    """Raise an error unless a pickle is of plain data, and asks for no more memory than its size explains."""
    for number, (code, value) in enumerate(_codes(io.BytesIO(content)), start=1):
        if code.name in ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"it wants the class or function {str(value or '').replace(' ', '.')}")
        if code.name not in _PLAIN:
            raise pickle.UnpicklingError(f"it has {code.name}, which no plain data need")
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(value or 0) > number:
            raise pickle.UnpicklingError(f"it wants {value:,} slots")


def _codes(file: io.BytesIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """What `pickletools.genops` yields, which takes the texts of Python 2 for ASCII."""
    while (one := file.read(1)) != pickle.STOP:
        code = _CODES.get(one.decode("latin-1"))
        if code is None:
            raise pickle.UnpicklingError("it is cut off, or no pickle")
        text = code.name == "STRING"
        yield code, file.readline() if text else None if code.arg is None else code.arg.reader(file)


class _PlainUnpickler(pickle.Unpickler):
    """Refuses what would import or call something, as `_check_plain` has done already."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants the class or function {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it wants an object from outside")


# Texts of Python 2 are UTF-8, or Latin-1 where they are not.
codecs.register_error(
    "vlabs-latin-1",
    lambda error: (error.object[error.start : error.end].decode("latin-1"), error.end),  # type: ignore[attr-defined]
)
main = command(RefCoco)

if __name__ == "__main__":
    run_cli(main)
