"""The base of all data modules of prepared folders: options, preprocessing, and loaders of whole batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from vlabs.data.images import Stored
from vlabs.data.loading import LoaderOptions, identity_of
from vlabs.data.prepared import check_kind, count_regions, load_split
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, PICTURE_OPTIONS, Preprocessing, check_picture_option
from vlabs.data.tokenizer import read_tokenizer, special_token
from vlabs.errors import UserError
from vlabs.utils.options import Crop, Size, check_type, checked, options_of

IMAGE_SIZE = 224
"""The default."""


@dataclass(frozen=True)
class Wants:
    """What a task or evaluation needs from its data besides texts and images; see `Task.wants`, `Evaluation.wants`.

    Attributes:
        region_grid: rows and columns of the grid on which batches give the regions of texts; None for no regions.
        region_sets: M, the regions per text: one for each of its first M phrases, see `ImageReader.coverage`.
        regions_in_validation: validation batches have regions too.
        false_images: each caption comes with an image that it does not belong to.
        false_captions: number of captions of other images that each caption comes with.
        stored: opens first passes that are read instead of images, which are then not augmented; called when loaders
            are made. None to read images.
        human_map: where people looked for a question, (H, W) over the whole image, by its id; None for nobody.
    """

    region_grid: tuple[int, int] | None = None
    region_sets: int = 1
    regions_in_validation: bool = False
    false_images: bool = False
    false_captions: int = 0
    stored: Callable[[], Stored] | None = None
    human_map: Callable[[Any], Any] | None = None


@dataclass(kw_only=True, eq=False, repr=False)
class PreparedDataModule(LoaderOptions, pl.LightningDataModule):
    """Batches of prepared folders (`vlabs.data.prepared`). Subclasses read one kind of data, e.g. `VQADataModule`.

    Options are fields, those of a subclass too: it is a dataclass like this one. The default mean, deviation,
    interpolation and crop are those of configs from before these options existed (CLIP's).

    Attributes:
        dir: prepared folder.
        val_split: split for validation.
        image_size: side of the square input in pixels; None for the size of the checkpoint in `init=`, else 224.
        max_length: tokens per text at most.
        tokenizer: RoBERTa name or folder; None for the tokenizer that was trained with the data.
        image_mean: mean of the channels in [0, 1]; None for that of the checkpoint in `init=` or of the pre-trained
            image encoder, else CLIP's.
        image_std: standard deviation of the channels; None as for `image_mean`.
        interpolation: how images are resized: `bicubic` or `bilinear`; None for that of the checkpoint or encoder, else
            `bicubic`.
        crop: share of the shorter side of an image that evaluation sees; 1 for all of it.
        crop_mode: what becomes the square input: the `center` of an image, or all of it with `squash`; None for that
            of the checkpoint or encoder, else `center`.
        preprocessing: turns images and texts into tensors. If it is given, as that of a checkpoint, it replaces all
            options of images, text and vocabulary.
        folders: the prepared folders by name; the tokenizer is that of the first.
        pictures: number of images that a text is about; 1 for most kinds of data.
        left_open: values of the preprocessing that no option sets. They are those of `by_default`, until a training
            takes them from the checkpoint or encoder that it starts from (`vlabs.training.pictures`).
        wants: what the task or evaluation needs, which is asked of it before it begins.

    Raises:
        UserError: the folder has no prepared data of this kind, there is no tokenizer, or an option is out of range.
    """

    dir: str | Path = field(kw_only=False)
    val_split: str = "val"
    image_size: Size | None = None
    max_length: Size = 50
    tokenizer: str | None = None
    image_mean: Sequence[float] | None = IMAGE_MEAN
    image_std: Sequence[float] | None = IMAGE_STD
    interpolation: Literal["bicubic", "bilinear"] | None = "bicubic"
    crop: Crop | None = 1.0
    crop_mode: Literal["center", "squash"] | None = "center"
    preprocessing: Preprocessing = None  # type: ignore[assignment]  # made from the options unless it is given

    kind: ClassVar[str]
    """The kind of data in a manifest."""
    holds: ClassVar[str]
    """The kind of data in words, and its choices in the group `data`; for messages."""
    unused: ClassVar[tuple[str, ...]] = ("crop",)
    """Options that have no effect here. A config may still have them at their defaults."""
    item: ClassVar[str] = "text"
    """What a text is called: the name of its column."""
    by_default: ClassVar[dict[str, Any]] = {
        "mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bicubic", "crop_mode": "center",
    }  # fmt: skip
    """Default values of the preprocessing, for an encoder from scratch."""
    pictures = 1
    train_split = "train"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):  # written by hand
            checked("data")(cls)

    def __post_init__(self) -> None:
        pl.LightningDataModule.__init__(self)
        given = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in ("dir", "preprocessing")}
        self.check_options(given)
        super().__post_init__()
        check_kind(self.dir, self.kind)
        self.folders = {"": Path(self.dir)}
        self.wants = Wants()
        said = {name: given[PICTURE_OPTIONS[name]] for name in self.by_default}
        self.left_open = tuple(name for name, value in said.items() if value is None)
        values: dict[str, Any] = said | {name: self.by_default[name] for name in self.left_open}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        self.preprocessing = self.preprocessing or Preprocessing(
            image_size=self.image_size or IMAGE_SIZE,
            names=tuple(self.read_names(self.dir)),
            **values,
            **self.of_texts(),
        )

    @classmethod
    def check_options(cls, given: Mapping[str, Any]) -> None:
        """Check options by name. No data are needed.

        Raises:
            UserError: an option is out of range, or has no effect here; configs of older runs have some of the latter,
                at their defaults.
        """
        hints = options_of(cls)
        defaults = {one.name: one.default for one in fields(cls) if one.name != "preprocessing"}
        used = sorted(defaults.keys() - set(cls.unused))
        for name, value in given.items():
            if name == "preprocessing" or name in cls.unused and value in (None, defaults[name]):
                continue
            if name not in used:
                raise UserError(f"data.{name}={value}: {cls.holds} do not use it; choose one of {', '.join(used)}")
            check_type(f"data.{name}", value, hints[name])
        for name, option in PICTURE_OPTIONS.items():
            if name in cls.by_default and given.get(option) is not None:
                check_picture_option(name, given[option])

    @staticmethod
    def read_names(directory: str | Path) -> Sequence[str]:
        """The names of a prepared folder's answers, labels or classes, see `Preprocessing.names`."""
        return ()

    def of_texts(self) -> dict[str, Any]:
        """The arguments of `Preprocessing` for texts."""
        text = read_tokenizer(self.tokenizer, Path(self.dir))
        padding = special_token(text, "pad")
        given = {"tokenizer": text, "max_length": self.max_length}
        return given if padding is None else given | {"pad_token_id": padding}

    def setup(self, stage: str) -> None:
        """Ask the task what it needs."""
        asked = getattr(self.trainer.lightning_module, "wants", None) if self.trainer else None
        if stage in ("fit", "validate") and asked is not None:
            self.wants = asked(self)

    @property
    def identity(self) -> dict[str, Any]:
        """Identity of the data for checkpoints: `identity_of` the first folder, and of all as `sets` if several."""
        sets = [identity_of(folder) for folder in self.folders.values()]
        return sets[0] | ({"sets": sets} if len(sets) > 1 else {})

    @property
    def regions_known(self) -> int:
        """Number of training texts with a region."""
        return sum(count_regions(folder, "train") for folder in self.folders.values())

    @property
    def phrases_known(self) -> int:
        """Number of training texts whose region tells its phrases apart."""
        return sum(count_regions(folder, "train", "phrases") for folder in self.folders.values())

    def extent(self) -> dict[str, Any]:
        """How much is trained on, for checkpoints: the number of `images`; for texts also their number and `words`."""
        return {"images": len(self.rows(self.train_split))}

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split.

        Raises:
            UserError: there is no such split.
        """
        return load_split(self.dir, split)

    def val_dataloader(self) -> DataLoader[Any]:
        """All samples of the validation split."""
        return self.eval_dataloader(self.val_split)

    def eval_dataloader(self, split: str) -> DataLoader[Any]:
        """All samples of a split, in stored order."""
        raise NotImplementedError
