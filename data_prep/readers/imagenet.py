"""Prepare ImageNet-1K, whose files stay as they are downloaded.

    vlabs prepare imagenet --raw-dir RAW --out-dir data/imagenet

Download: ILSVRC2012_img_train.tar (a tar file per class inside), ILSVRC2012_img_val.tar and
ILSVRC2012_devkit_t12.tar.gz, which has the classes of the validation images, of https://image-net.org.

For class folders, unpacked, see `vlabs prepare classes`.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import scipy.io

from data_prep.engine.folder import BadItem
from data_prep.engine.reader import new_parser
from data_prep.engine.tars import members, open_tar, read_packed
from data_prep.engine.units import Row, Unit
from data_prep.readers.classes import entry, entry_in, prepare_classes
from vlabs.errors import UserError, run_cli

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_LARGEST_DEVKIT = 256 * 2**20


def imagenet_units(raw_dir: Path) -> tuple[list[Unit], list[Path], list[str]]:
    """What there is to read, from which files, and all WordNet ids in the order of ImageNet-1K's usual labels.

    Raises:
        UserError: a file is missing or damaged.
    """
    files = [raw_dir / name for name in (TRAIN, VAL, DEVKIT)]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is missing: ImageNet-1K is {TRAIN}, {VAL} and {DEVKIT}")
    wnid_of_val, wnids = read_devkit(files[2])
    with open_tar(files[0]) as archive:
        inner = [member for member in members(archive, files[0]) if member.name.endswith(".tar")]
    units = [Unit("train", member.name, partial(_of_class_tar, files[0], member)) for member in inner]
    units.append(Unit("val", VAL, partial(_of_val_tar, files[1], wnid_of_val)))
    return units, files, wnids


def read_devkit(path: Path) -> tuple[list[str], list[str]]:
    """The WordNet id of every validation image, in order, and those of all classes, sorted.

    Raises:
        UserError: it is not the development kit.
    """
    try:
        content = dict(read_packed(path, _LARGEST_DEVKIT))
        data = "ILSVRC2012_devkit_t12/data"
        ids = [int(line) for line in content[f"{data}/ILSVRC2012_validation_ground_truth.txt"].split()]
        synsets = scipy.io.loadmat(io.BytesIO(content[f"{data}/meta.mat"]), squeeze_me=True)["synsets"]
        wnid = {int(row[0]): str(row[1]) for row in synsets}
        # Ids above 1000 are of classes that have others under them, and no image.
        return [wnid[number] for number in ids], sorted({name for number, name in wnid.items() if number <= 1000})
    except UserError:
        raise
    except Exception as error:  # scipy raises whatever a damaged file leads it to
        raise UserError(f"{path} is not ImageNet's development kit ({error!r}): download it again") from None


def _of_class_tar(path: Path, inner: tarfile.TarInfo) -> Iterator[Row | BadItem]:
    """The images of a class: a tar file inside the tar file."""
    with open_tar(path) as outer, open_tar(path, outer.extractfile(inner)) as archive:
        for member in members(archive, path):
            where, offset = f"{inner.name}: {member.name}", inner.offset_data + member.offset_data
            yield entry_in("train", where, Path(inner.name).stem, path, offset, member.size)


def _of_val_tar(path: Path, wnid_of_val: list[str]) -> Iterator[Row | BadItem]:
    """The validation images, whose class is known by their number."""
    with open_tar(path) as archive:
        for member in members(archive, path):
            match = _VAL_NAME.fullmatch(Path(member.name).name)
            if match is None:
                yield BadItem("image of another name", "val", member.name)
            elif not 1 <= int(match[1]) <= len(wnid_of_val):
                raise UserError(f"{path}: {member.name} is not among the {len(wnid_of_val)} of the development kit")
            else:
                yield entry(wnid_of_val[int(match[1]) - 1], path, member.offset_data, member.size)


def main() -> None:
    """Run the command line."""
    parser = new_parser("imagenet", __doc__, "images whose class is not known")
    parser.add_argument("--raw-dir", type=Path, required=True, help=f"folder with {TRAIN}, {VAL} and {DEVKIT}")
    arguments = parser.parse_args()
    units, files, wnids = imagenet_units(arguments.raw_dir)
    prepare_classes(units, files, arguments.out_dir, arguments.name or "imagenet", wnids, arguments.on_bad)


if __name__ == "__main__":
    run_cli(main)
