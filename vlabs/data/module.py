"""What every data module of prepared folders is: options, preprocessing, and loaders of whole batches."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import datasets
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from vlabs.data.loading import LoaderOptions, identity_of
from vlabs.data.prepared import check_kind, count_regions, load_split
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, PICTURE_OPTIONS, Preprocessing, check_picture_option
from vlabs.data.tokenizer import read_tokenizer, special_token
from vlabs.errors import UserError
from vlabs.utils.options import Size, check_type, checked, options_of

IMAGE_SIZE = 224
"""Where nobody says another."""


@dataclass(frozen=True)
class Wants:
    """What a task wants of its data beside texts and images; see `vlabs.tasks.base.Task.wants`.

    Attributes:
        region_grid: rows and columns of the grid on which batches say what a text is about; None for nothing.
        regions_in_validation: batches of validation say it too.
        false_images: every caption comes with an image that it does not belong to.
        false_captions: captions of other images that every caption comes with.
    """

    region_grid: tuple[int, int] | None = None
    regions_in_validation: bool = False
    false_images: bool = False
    false_captions: int = 0


@checked("data")
class PreparedDataModule(pl.LightningDataModule):
    """Batches of prepared folders (`vlabs.data.prepared`). A kind of data says how rows are read, see `VQADataModule`.

    How images are read is by default as in configs of before there were options for it, which had CLIP's values.

    Args:
        dir: prepared folder.
        val_split: split that is validated on.
        image_size: side of the square input in pixels; None for the size of the checkpoint in `init=`, else 224.
        max_length: tokens per text at most.
        tokenizer: RoBERTa name or folder; None for the tokenizer that was trained with the data.
        image_mean: mean of the channels in [0, 1]; None for that of what the run starts from (`init=` or the
            pre-trained encoder), else CLIP's. See `left_open`.
        image_std: standard deviation of the channels; None likewise.
        interpolation: how images are resized: `bicubic` or `bilinear`; None for what the run starts from, else
            `bicubic`.
        crop: share of the shorter side of an image that evaluation sees; 1 for all of it.
        crop_mode: what becomes the square input: the `center` of an image, or all of it with `squash`; None for what
            the run starts from, else `center`.
        preprocessing: of a checkpoint, in place of all options of images, text and vocabulary.
        options: of `LoaderOptions`, of which `texts_per_image` is called by what the texts are: `questions_per_image`.

    Attributes:
        folders: the prepared folders, by name where there are several; the first is the one whose tokenizer is used.
        pictures: images that a text is about: 1 unless a kind of data says otherwise.
        preprocessing: images and texts to tensors.
        left_open: what of it nobody said, and is as `by_default`, until a training takes it from the checkpoint or the
            encoder that it starts from (`vlabs.training.pictures`).
        options: of the loaders.
        wants: what a task wants of it, who says so before there are loaders.

    Raises:
        UserError: no prepared data of this kind there, no tokenizer, an option out of range.
    """

    kind: ClassVar[str]
    """What a manifest calls it."""
    holds: ClassVar[str]
    """What it holds and which choices of the group `data` do, for messages."""
    unused: ClassVar[tuple[str, ...]] = ("crop",)
    """Options of others that change nothing here, but may stand in a config at their defaults."""
    item: ClassVar[str] = "text"
    """What a text is called: the column of the rows that they are in."""
    by_default: ClassVar[dict[str, Any]] = {
        "mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bicubic", "crop_mode": "center",
    }  # fmt: skip
    """How images are read for an encoder from scratch, as far as there is anything to say here."""
    hands_on: ClassVar[tuple[type, ...]] = (LoaderOptions,)
    """What gets the options that no constructor names."""
    pictures: int = 1
    train_split = "train"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            checked("data")(cls)

    def __init__(
        self,
        dir: str | Path,
        val_split: str = "val",
        image_size: Size | None = None,
        max_length: Size = 50,
        tokenizer: str | None = None,
        image_mean: Sequence[float] | None = IMAGE_MEAN,
        image_std: Sequence[float] | None = IMAGE_STD,
        interpolation: Literal["bicubic", "bilinear"] | None = "bicubic",
        crop: float | None = 1.0,
        crop_mode: Literal["center", "squash"] | None = "center",
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        given = {"image_size": image_size, "max_length": max_length, "tokenizer": tokenizer}
        shown: dict[str, Any] = {"image_mean": image_mean, "image_std": image_std, "interpolation": interpolation}
        shown |= {"crop": crop, "crop_mode": crop_mode}
        self.options = self.loader_options(**options, **given, **shown, preprocessing=preprocessing)
        check_kind(dir, self.kind)
        self.folders = {"": Path(dir)}
        self.val_split = val_split
        self.wants = Wants()
        said = {name: shown[PICTURE_OPTIONS[name]] for name in self.by_default}
        self.left_open = tuple(name for name, value in said.items() if value is None)
        values: dict[str, Any] = said | {name: self.by_default[name] for name in self.left_open}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        self.preprocessing = preprocessing or Preprocessing(
            image_size=image_size or IMAGE_SIZE,
            names=tuple(self.read_names(dir)),
            **values,
            **self.text_options(tokenizer, max_length),
        )

    @classmethod
    def loader_options(cls, **given: Any) -> LoaderOptions:
        """The options of the loaders among those of a module, all checked; before there is any data, if need be.

        Raises:
            UserError: an option is out of range, or is not used here.
        """
        per_image = f"{cls.item}s_per_image"
        if isinstance(given.get("preprocessing"), Preprocessing | None):
            given.pop("preprocessing", None)
        hints = options_of(cls) | {per_image: Size}
        for name, value in given.items():
            if name not in cls.unused and value != _DEFAULTS.get(name, ...):
                check_type(f"data.{name}", value, hints.get(name, Any))
        cls._check_used(given)
        for name, option in PICTURE_OPTIONS.items():
            if name in cls.by_default and given.get(option) is not None:
                check_picture_option(name, given[option])
        names = LoaderOptions.__dataclass_fields__.keys() & given.keys() - set(cls.unused)
        return LoaderOptions(texts_per_image=given.get(per_image, 1), **{name: given[name] for name in names})

    @classmethod
    def _check_used(cls, options: dict[str, Any]) -> None:
        """Refuse options that change nothing here; at their defaults they may stand there, as in runs of old."""
        makers = [one.__init__ for one in cls.__mro__ if issubclass(one, PreparedDataModule)]
        used = {name for make in makers for name in inspect.signature(make).parameters}
        used |= {*LoaderOptions.__dataclass_fields__, f"{cls.item}s_per_image"}
        used -= {"self", "options", "preprocessing", "texts_per_image", *cls.unused}
        for name, value in options.items():
            if name not in used and not (name in cls.unused and value in (None, _DEFAULTS[name])):
                raise UserError(f"data.{name}={value}: {cls.holds} do not use it; choose of {', '.join(sorted(used))}")

    @staticmethod
    def read_names(directory: str | Path) -> Sequence[str]:
        """The names of what a head tells apart in a prepared folder, see `Preprocessing.names`."""
        return ()

    def text_options(self, tokenizer: str | None, max_length: int) -> dict[str, Any]:
        """What a `Preprocessing` says of texts."""
        text = read_tokenizer(tokenizer, self.dir)
        padding = special_token(text, "pad")
        return {"tokenizer": text, "max_length": max_length} | ({} if padding is None else {"pad_token_id": padding})

    @property
    def dir(self) -> Path:
        """The first prepared folder."""
        return next(iter(self.folders.values()))

    @property
    def batch_size(self) -> int:
        """Texts a step on each device."""
        return self.options.batch_size

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of its data: the first folder as of `identity_of`, and all, where several are."""
        sets = [identity_of(folder) for folder in self.folders.values()]
        return sets[0] | ({"sets": sets} if len(sets) > 1 else {})

    @property
    def regions_known(self) -> int:
        """Of how many training texts it is known what part of the image they are about."""
        return sum(count_regions(folder, "train") for folder in self.folders.values())

    def extent(self) -> dict[str, Any]:
        """How much is trained on, for the checkpoint: `images`; of texts also how many, and their `words`."""
        return {"images": len(self.rows(self.train_split))}

    def rows(self, split: str) -> datasets.Dataset:
        """The rows of a split.

        Raises:
            UserError: there is no such split.
        """
        return load_split(self.dir, split)

    def val_dataloader(self) -> DataLoader[Any]:
        """Every sample of the validation split."""
        return self.eval_dataloader(self.val_split)

    def eval_dataloader(self, split: str) -> DataLoader[Any]:
        """Every sample of a split, in stored order."""
        raise NotImplementedError


_DEFAULTS = {name: one.default for name, one in LoaderOptions.__dataclass_fields__.items()}
_DEFAULTS |= {"max_length": 50, "tokenizer": None, "interpolation": "bicubic", "crop": 1.0, "crop_mode": "center"}
