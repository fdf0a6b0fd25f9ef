"""The embedded corpus as data modules, rendered and prepared on first use.

This is the only module of vlabs that uses `data_prep`.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import datasets

from vlabs.data.captions import CaptionDataModule
from vlabs.data.classes import ClassDataModule
from vlabs.data.features import CLASS_FEATURES
from vlabs.data.masks import MaskDataModule
from vlabs.data.module import PreparedDataModule
from vlabs.data.statements import StatementDataModule
from vlabs.data.tokenizer import read_tokenizer
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.utils.files import locked
from vlabs.utils.options import check_type
from vlabs.utils.ranks import say

Corpus = Literal["tiny", "small", "medium", "large"]
_Module = TypeVar("_Module", bound=PreparedDataModule)


def _of(name: str) -> Any:
    """Import a module of `data_prep`, which is needed only when data are made."""
    return importlib.import_module(f"data_prep.{name}")


def scenes_data(size: Corpus, dir: str | Path, **options: Any) -> VQADataModule:
    """Questions about the `scenes` corpus. The data are made in `dir` if they are not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large`.
        dir: prepared folder; the raw files go to a folder with `-raw` added to its name.
        options: of `VQADataModule`.
    """

    def make(out: Path) -> None:
        _prepare(_of("readers.vqav2").VQAv2(_scenes(size, _beside(out))), out)

    real = "data=vqav2 data.dir=FOLDER, made by `vlabs prepare vqav2`"
    return _made(VQADataModule, options, dir, size, f"the embedded corpus scenes-{size}", real, make)


def scenes_captions(
    size: Corpus, dir: str | Path, raw_dir: str | Path, phrases: bool = False, **options: Any
) -> CaptionDataModule:
    """Captions of the `scenes` corpus. The data are made in `dir` if they are not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large`.
        dir: prepared folder.
        raw_dir: folder of the rendered corpus; it is rendered there if necessary.
        phrases: use a phrase for each object instead of captions.
        options: of `CaptionDataModule`.
    """

    def make(out: Path) -> None:
        _prepare(_of("scenes.scenes_captions").ScenesCaptions(_scenes(size, raw_dir), phrases), out)

    what = f"{'phrases' if phrases else 'the captions'} of the embedded corpus scenes-{size}"
    return _made(CaptionDataModule, options, dir, size, what, "data=flickr30k or data=coco_captions", make)


def scenes_statements(
    size: Corpus, layout: Literal["snli_ve", "nlvr2"], dir: str | Path, **options: Any
) -> StatementDataModule:
    """Statements about the `scenes` corpus, in the layout of another dataset. Made in `dir` if not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large`.
        dir: prepared folder.
        layout: dataset whose layout the statements have.
        options: of `StatementDataModule`.
    """
    readers = {"snli_ve": "SNLIVE", "nlvr2": "NLVR2"}

    def make(out: Path) -> None:
        raw = _scenes(size, _beside(out), layout=layout)
        _prepare(getattr(_of(f"readers.{layout}"), readers[layout])(raw), out)

    real = f"data={layout} data.dir=FOLDER, made by `vlabs prepare {layout}`"
    return _made(StatementDataModule, options, dir, size, f"the embedded corpus scenes-{size} as {layout}", real, make)


def scenes_masks(size: Corpus, dir: str | Path, raw_dir: str | Path, **options: Any) -> MaskDataModule:
    """The `scenes` corpus with masks: the shape that each pixel belongs to. Made in `dir` if not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large`.
        dir: prepared folder.
        raw_dir: folder of the rendered corpus; it is rendered there if necessary.
        options: of `MaskDataModule`.
    """

    def make(out: Path) -> None:
        _of("readers.segmentation").prepare_masks("instances", _scenes(size, raw_dir), out)

    real = "data=voc, cityscapes or ade20k, made by `vlabs prepare segmentation`"
    return _made(MaskDataModule, options, dir, size, f"the masks of the embedded corpus scenes-{size}", real, make)


def objects_data(size: Corpus, dir: str | Path, **options: Any) -> ClassDataModule:
    """Images of single objects (`vlabs prepare objects`). The data are made in `dir` if they are not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large`.
        dir: prepared folder; the images stay in the raw files.
        options: of `ClassDataModule`.
    """

    def make(out: Path) -> None:
        classes, objects, raw = _of("readers.classes"), _of("scenes.objects"), _beside(out)
        objects.make_objects(size, raw)
        names = objects.SIZES[size].classes_by_folder
        classes.prepare_classes(*classes.folder_units(raw), out, f"objects-{size}", names)

    real = "data=imagenet, or data=classes data.dir=FOLDER, made by `vlabs prepare classes`"
    return _made(ClassDataModule, options, dir, size, f"the embedded objects-{size}", real, make)


def several_objects(size: str, dir: str | Path, count: int = 500) -> Path:
    """The folder of images with several objects, made beside the prepared single objects in `dir` if necessary.

    Args:
        size: as in `objects_data`.
        dir: prepared folder of `objects_data`.
        count: number of images to make.
    """
    folder = Path(dir).with_name(Path(dir).name + "-several")
    with _alone(folder, "instances.json") as there:
        if not there:
            say(f"data: making {count} images of several objects in {folder}")
            _of("scenes.objects").make_several(size, folder, count)
    return folder


def search_displays(size: Corpus, target: str, other: str, others: int, count: int) -> Iterator[tuple[Any, list[Any]]]:
    """Yield rendered images of one object among others that are all alike, for visual search.

    Args:
        size: corpus whose image side and small objects are used.
        target, other: the object and the others, such as `striped red circle` and `red circle`.
        others: number of other objects.
        count: number of images.

    Yields:
        An image, and the masks (H, W) of its objects, the target first.

    Raises:
        UserError: a phrase does not name a color and a shape, or the objects find no room.
    """
    draw = _of("scenes.displays").draw_display
    for number in range(count):
        yield draw(size, target, other, others, f"{target}/{other}/{others}/{number}")


def search_object(phrase: str) -> dict[str, str]:
    """Color, fill and shape of an object of `search_displays`.

    Raises:
        UserError: the phrase does not name a color and a shape, or says something else.
    """
    found: dict[str, str] = _of("scenes.displays").read_phrase(phrase)
    return found


def raw_classes(path: str | Path, classes: Sequence[str]) -> datasets.Dataset:
    """Rows of the images in raw class folders, or in a tar file of them, without preparing them first.

    Args:
        path: the folder or tar file.
        classes: the class names, by label; folders are named by them.

    Raises:
        UserError: there is no image, or an image of an unknown class.
    """
    label_of = {name: n for n, name in enumerate(classes)}
    rows: dict[str, list[Any]] = {name: [] for name in CLASS_FEATURES}
    for number, row in enumerate(_of("readers.classes").entries_of(Path(path))):
        if row["label"] not in label_of:
            raise UserError(f"{path} has images of {row['label']}, which is not a class of the model")
        for name, value in (row | {"image_id": number, "label": label_of[row["label"]]}).items():
            rows[name].append(value)
    if not rows["label"]:
        raise UserError(f"{path} has no images in class folders")
    return datasets.Dataset.from_dict(rows, CLASS_FEATURES)


def _beside(directory: Path) -> Path:
    return directory.with_name(directory.name + "-raw")


def _scenes(size: Corpus, raw: str | Path, **options: Any) -> Path:
    """The folder of a rendered corpus, which is rendered if it is not there."""
    Path(raw).parent.mkdir(parents=True, exist_ok=True)
    _of("scenes.corpus").make_scenes(size, raw, **options)
    return Path(raw)


def _prepare(raw: Any, out: Path) -> None:
    pipeline = _of("engine.pipeline")
    pipeline.prepare(raw, out, pipeline.Options(num_workers=os.cpu_count() or 1))


def _made(
    module: type[_Module],
    options: dict[str, Any],
    dir: str | Path,
    size: Corpus,
    what: str,
    real: str,
    make: Callable[[Path], None],
) -> _Module:
    """A data module of a prepared folder, which one process makes if it is not there. Prints what the data are."""
    check_type("data.size", size, Corpus)
    module.check_options(options)  # so that a wrong option is reported before minutes of work
    if options.get("tokenizer") and not (Path(dir) / "manifest.json").is_file():
        read_tokenizer(options["tokenizer"], Path(dir))
    with _alone(Path(dir), "manifest.json") as there:
        say(f"data: {'' if there else 'making '}{what} in {Path(dir)}; to use real data: {real}")
        if not there:
            make(Path(dir))
    return module(dir, **options)


@contextmanager
def _alone(directory: Path, last: str) -> Iterator[bool]:
    """Give whether a folder is complete, i.e. has the file that is written last.

    If not, hold a lock on its parent: one process makes the folder, the others wait and then find it complete.
    """
    if (directory / last).is_file():
        yield True
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.parent, "", wait=True):
        yield (directory / last).is_file()
