"""What every data module of prepared folders is: options, preprocessing, and loaders of whole batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytorch_lightning as pl
from torch.utils.data import DataLoader

from vlabs.data.loading import LoaderOptions, check_whole, identity_of
from vlabs.data.prepared import check_kind, count_regions, load_split
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing
from vlabs.data.tokenizer import read_tokenizer, special_token
from vlabs.errors import UserError


class PreparedDataModule(pl.LightningDataModule):
    """Batches of prepared folders (`vlabs.data.prepared`). A kind of data says how rows are read, see `VQADataModule`.

    Args:
        folders: the prepared folders by name, of one kind; the first is the one whose tokenizer is used.
        val_split: the split that is validated on.
        image_size: side of the square input in pixels.
        max_length: tokens a text at most.
        tokenizer: a RoBERTa name or folder; None for the tokenizer that was trained with the data.
        image_mean, image_std: by which channels in [0, 1] are normalised. CLIP's, unless nothing is pre-trained: then
            those of the data make training from scratch easier.
        preprocessing: of a checkpoint, in place of all options of images, text and vocabulary.
        names: of answers or labels, where there are some.
        options: of `LoaderOptions`.

    Attributes:
        pictures: images that a text is about: 1 unless a kind of data says otherwise.
        preprocessing: images and texts to tensors.
        options: of the loaders.
        region_grid: rows and columns of the grid on which batches say what a text is about; None where no loss reads
            it. A task sets it before there are loaders.

    Raises:
        UserError: no prepared data of this kind there, no tokenizer, an option out of range.
    """

    kind: ClassVar[str]
    """What a manifest calls it."""
    holds: ClassVar[str]
    """What it holds and which choices of the group `data` do, for messages."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Options of others that change nothing here, and are refused where they are given a value."""
    pictures: int = 1

    def __init__(
        self,
        folders: Mapping[str, str | Path],
        val_split: str = "val",
        image_size: int = 224,
        max_length: int = 50,
        tokenizer: str | None = None,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        preprocessing: Preprocessing | None = None,
        names: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__()
        check_whole("image_size", image_size, 1)
        check_whole("max_length", max_length, 1)
        known = LoaderOptions.__dataclass_fields__
        if unknown := [name for name in options if name not in known]:
            raise UserError(f"data.{unknown[0]}: there is no such option of {type(self).__name__}")
        defaults = {name: one.default for name, one in known.items()} | {"max_length": 50, "tokenizer": None}
        given = defaults | options | {"max_length": max_length, "tokenizer": tokenizer}
        # Runs of earlier versions have them in their configs, at their defaults.
        if changed := [name for name in self.unused if given[name] != defaults[name]]:
            used = sorted(known.keys() - set(self.unused) | {"image_size", "image_mean", "image_std", "val_split"})
            raise UserError(
                f"data.{changed[0]}={given[changed[0]]}: {self.holds} do not use it; choose of {', '.join(used)}"
            )
        self.options = LoaderOptions(**options)
        self.folders = {name: Path(folder) for name, folder in folders.items()}
        for folder in self.folders.values():
            check_kind(folder, self.kind)
        self.val_split = val_split
        self.region_grid: tuple[int, int] | None = None
        self.preprocessing = preprocessing or _preprocessing(
            read_tokenizer(tokenizer, self.dir),
            image_size=image_size,
            max_length=max_length,
            names=tuple(names),
            mean=tuple(image_mean),
            std=tuple(image_std),
        )

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
        """Of how many training texts it is known what part of the picture they are about."""
        return sum(count_regions(folder, "train") for folder in self.folders.values())

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


def _preprocessing(tokenizer: str, **options: Any) -> Preprocessing:
    padding = special_token(tokenizer, "pad")
    if padding is not None:
        options["pad_token_id"] = padding
    return Preprocessing(tokenizer=tokenizer, **options)
