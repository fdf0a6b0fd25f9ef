"""The embedded corpus as a data module: rendered and prepared on first use."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from vlabs.data.captions import CaptionDataModule
from vlabs.data.classes import ClassDataModule
from vlabs.data.masks import MaskDataModule
from vlabs.data.prepared import CLASS_FEATURES
from vlabs.data.statements import StatementDataModule
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.runs.logging import say
from vlabs.utils.files import locked


def scenes_data(size: str, dir: str | Path, **options: Any) -> VQADataModule:
    """The `scenes` corpus of a size, made in `dir` if it is not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large` (see `data_prep.scenes`).
        dir: the prepared folder; the raw files go to `dir` with `-raw` added.
        options: of `VQADataModule`.
    """
    from data_prep.engine.pipeline import Options, prepare
    from data_prep.readers.vqav2 import VQAv2
    from data_prep.scenes.corpus import make_scenes
    from data_prep.scenes.render import SIZES

    directory = Path(dir)
    _check_size(size, SIZES)

    def make() -> None:
        raw = directory.with_name(directory.name + "-raw")
        make_scenes(size, raw)
        prepare(VQAv2(raw), directory, Options(min_answer_count=1, num_workers=os.cpu_count() or 1))

    real = "data=vqav2 data.dir=FOLDER, made by `python -m data_prep.vqav2`"
    _make_once(directory, f"the embedded corpus scenes-{size}", real, make)
    return VQADataModule(directory, **options)


def scenes_captions(
    size: str, dir: str | Path, raw_dir: str | Path, phrases: bool = False, **options: Any
) -> CaptionDataModule:
    """The captions of the `scenes` corpus of a size, made in `dir` if they are not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large` (see `data_prep.scenes`).
        dir: the prepared folder.
        raw_dir: where the corpus is rendered to, or is already.
        phrases: what each object is, in the place of captions.
        options: of `CaptionDataModule`.
    """
    from data_prep.engine.pipeline import Options, prepare
    from data_prep.scenes.corpus import make_scenes
    from data_prep.scenes.render import SIZES
    from data_prep.scenes.scenes_captions import ScenesCaptions

    directory, raw, what = Path(dir), Path(raw_dir), "phrases" if phrases else "the captions"
    _check_size(size, SIZES)

    def make() -> None:
        raw.parent.mkdir(parents=True, exist_ok=True)
        make_scenes(size, raw)
        source = ScenesCaptions(raw, phrases)
        prepared = Options(min_answer_count=1, num_workers=os.cpu_count() or 1, others=source.options)
        prepare(source, directory, prepared)

    _make_once(directory, f"{what} of the embedded corpus scenes-{size}", "data=flickr30k or data=coco_captions", make)
    return CaptionDataModule(directory, **options)


def scenes_statements(size: str, layout: str, dir: str | Path, **options: Any) -> StatementDataModule:
    """Statements about the embedded corpus in the layout of another data set, made in `dir` if not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large` (see `data_prep.scenes`).
        layout: `snli_ve` or `nlvr2` (see `data_prep.scenes.layouts`).
        dir: the prepared folder; the raw files go to `dir` with `-raw` added.
        options: of `StatementDataModule`.
    """
    from data_prep.engine.pipeline import Options, prepare
    from data_prep.readers.nlvr2 import NLVR2
    from data_prep.readers.snli_ve import SNLIVE
    from data_prep.scenes.corpus import make_scenes
    from data_prep.scenes.render import SIZES

    directory = Path(dir)
    _check_size(size, SIZES)
    sources: dict[str, Any] = {"snli_ve": SNLIVE, "nlvr2": NLVR2}
    if layout not in sources:
        raise UserError(f"data.layout={layout}: choose one of {', '.join(sources)}")

    def make() -> None:
        raw = directory.with_name(directory.name + "-raw")
        make_scenes(size, raw, layout=layout)
        prepare(sources[layout](raw), directory, Options(num_workers=os.cpu_count() or 1))

    real = f"data={layout} data.dir=FOLDER, made by `python -m data_prep.{layout}`"
    _make_once(directory, f"the embedded corpus scenes-{size} as {layout}", real, make)
    return StatementDataModule(directory, **options)


def scenes_masks(size: str, dir: str | Path, raw_dir: str | Path, **options: Any) -> MaskDataModule:
    """The `scenes` corpus of a size with the shape of every pixel, made in `dir` if it is not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large` (see `data_prep.scenes`).
        dir: the prepared folder.
        raw_dir: where the corpus is rendered to, or is already.
        options: of `MaskDataModule`.
    """
    from data_prep.readers.segmentation import prepare_masks
    from data_prep.scenes.corpus import make_scenes
    from data_prep.scenes.render import SIZES

    directory, raw = Path(dir), Path(raw_dir)
    _check_size(size, SIZES)

    def make() -> None:
        raw.parent.mkdir(parents=True, exist_ok=True)
        make_scenes(size, raw)
        prepare_masks("instances", raw, directory)

    real = "data=voc, cityscapes or ade20k, made by `python -m data_prep.segmentation`"
    _make_once(directory, f"the masks of the embedded corpus scenes-{size}", real, make)
    return MaskDataModule(directory, **options)


def objects_data(size: str, dir: str | Path, **options: Any) -> ClassDataModule:
    """The single objects of a size (`data_prep.objects`), made in `dir` if they are not there yet.

    Args:
        size: `tiny`, `small`, `medium` or `large`.
        dir: the prepared folder; the pictures go to `dir` with `-raw` added, and stay there.
        options: of `ClassDataModule`.
    """
    from data_prep.readers.classes import folder_units, prepare_classes
    from data_prep.scenes.objects import SIZES, make_objects

    directory = Path(dir)
    _check_size(size, SIZES)

    def make() -> None:
        raw = directory.with_name(directory.name + "-raw")
        make_objects(size, raw)
        units, files = folder_units(raw)
        prepare_classes(units, files, directory, f"objects-{size}", SIZES[size].classes_by_folder)

    real = "data=imagenet, or data=classes data.dir=FOLDER, made by `python -m data_prep.classes`"
    _make_once(directory, f"the embedded objects-{size}", real, make)
    return ClassDataModule(directory, **options)


def several_objects(size: str, dir: str | Path, count: int = 500) -> Path:
    """The folder of the pictures of several objects of a size, made beside the prepared objects in `dir`.

    Args:
        count: how many are made.
    """
    from data_prep.scenes.objects import make_several

    folder = Path(dir).with_name(Path(dir).name + "-several")
    with _alone(folder, "instances.json") as there:
        if not there:
            say(f"data: making {count} pictures of several objects in {folder}")
            make_several(size, folder, count)
    return folder


def _check_size(size: str, sizes: Collection[str]) -> None:
    if size not in sizes:
        raise UserError(f"data.size={size}: choose one of {', '.join(sizes)}")


def _make_once(directory: Path, what: str, real: str, make: Callable[[], None]) -> None:
    """Make a prepared folder if it is not there, by one process at a time, and say what it is and what to use else."""
    with _alone(directory, "manifest.json") as there:
        say(f"data: {'' if there else 'making '}{what} in {directory}; to use real data: {real}")
        if not there:
            make()


@contextmanager
def _alone(directory: Path, last: str) -> Iterator[bool]:
    """Whether a folder holds its last file. Where it does not, others that make one beside it are waited for."""
    if (directory / last).is_file():
        yield True
        return
    directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.parent, "", wait=True):
        yield (directory / last).is_file()


def raw_classes(path: str | Path, classes: Sequence[str]) -> datasets.Dataset:
    """The pictures of raw class folders, or of a tar file of them, as prepared rows that nobody has to prepare.

    Args:
        classes: the class names by label; the folders' names are among them.

    Raises:
        UserError: there is no picture, or one of another class.
    """
    from data_prep.readers.classes import entries_of

    label_of = {name: n for n, name in enumerate(classes)}
    rows: dict[str, list[Any]] = {name: [] for name in CLASS_FEATURES}
    for number, entry in enumerate(entries_of(Path(path))):
        if entry.label not in label_of:
            raise UserError(f"{path} has pictures of {entry.label}, which is no class of the model")
        found = {"image_id": number, "path": entry.path, "offset": entry.offset, "size": entry.size, "image": b""}
        for name, value in (found | {"label": label_of[entry.label]}).items():
            rows[name].append(value)
    if not rows["label"]:
        raise UserError(f"{path} holds no pictures in class folders")
    return datasets.Dataset.from_dict(rows, CLASS_FEATURES)
