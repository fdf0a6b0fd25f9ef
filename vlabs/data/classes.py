"""Pictures with one class each, in batches: read where they lie, augmented and mixed by timm, the same in every run."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlabs.data.images import name_of, read_bytes
from vlabs.data.loading import GroupLoader, check_augment, check_number, check_whole, eval_loader
from vlabs.data.module import PreparedDataModule
from vlabs.data.prepared import check_kind, load_split, read_classes
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing, decode_image
from vlabs.data.sampling import BatchSpec, EpochSampler, Group
from vlabs.errors import UserError, show
from vlabs.utils.ranks import rank_and_world


class ClassBatch(NamedTuple):
    """n pictures.

    Attributes:
        images: (n, 3, H, W), normalised.
        targets: (n, classes), what each picture is of, summing to 1; two classes where pictures are mixed.
        labels: (n,), the class of each picture, before mixing.
        image_ids: n.
        skipped: ids of images that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    image_ids: list[int]
    skipped: list[int]


class Augmentation(NamedTuple):
    """How training pictures are changed; the names and meanings of timm's `create_transform` and `Mixup`.

    Attributes:
        scale: least share of a picture that is cropped and resized; 1 to keep it whole.
        hflip: how often it is mirrored.
        color_jitter: of brightness, contrast and saturation, where there is no `auto_augment`.
        auto_augment: timm's string, e.g. `rand-m9-mstd0.5-inc1`; None for none.
        random_erasing: how often a part is replaced by noise.
        mixup, cutmix: α of the two ways to mix a picture with another of its batch; 0 for neither.
        label_smoothing: share of a target that is spread over all classes.
        repeats: how often every picture comes in an epoch, of which every third is then seen (repeated augmentation);
            1 for once.
    """

    scale: float = 1.0
    hflip: float = 0.5
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    repeats: int = 1


class ImageSampler(EpochSampler):
    """Yields the batches of an epoch, this process's part; a pure function of (seed, epoch).

    Args:
        count: pictures.
        batch_size: pictures a batch; in training the last batch is left out if it is not full.
        training: shuffled; else in stored order.
        repeats: as in `Augmentation`, by timm's sampler.
    """

    def __init__(self, count: int, batch_size: int, training: bool, seed: int, repeats: int = 1) -> None:
        super().__init__(count)
        self.batch_size, self.training, self.seed, self.repeats = batch_size, training, seed, repeats
        self.rank, self.world_size = rank_and_world()

    @property
    def how(self) -> dict[str, int]:
        """See `EpochSampler`."""
        return {
            "pictures": self.size, "batch_size": self.batch_size, "processes": self.world_size, "seed": self.seed,
        }  # fmt: skip

    @property
    def left(self) -> int:
        """See `EpochSampler`."""
        return max(0, self.size - self._given)

    def batches_of(self, size: int) -> int:
        """See `EpochSampler`."""
        if not self.training:
            return -(-len(range(self.rank, size, self.world_size)) // self.batch_size)
        return size // self.world_size // self.batch_size

    @property
    def _given(self) -> int:
        """Pictures of the epoch that came before: whatever the options, they are the first ones of its order."""
        return sum(part["given"] * part["batch_size"] * part["processes"] for part in self.before)

    def _order(self) -> list[int]:
        if not self.training:
            return list(range(self.rank, self.size, self.world_size))
        seed = self.before[0]["seed"] if self.before else self.seed
        if self.repeats > 1:
            sampler = RepeatAugSampler(
                range(self.size), self.world_size, self.rank, num_repeats=self.repeats, selected_round=0
            )
            sampler.set_epoch(self.epoch + 1_000_003 * seed)
            return list(sampler)[self._given // self.world_size :]
        order = np.random.default_rng((seed, self.epoch)).permutation(self.size)[self._given :]
        whole = len(order) - len(order) % self.world_size
        return [int(n) for n in order[:whole][self.rank :: self.world_size]]

    def __iter__(self) -> Iterator[BatchSpec]:
        order = self._order()
        for step in range(self.first, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            groups = [Group(number, (0,)) for number in chosen]
            yield BatchSpec(self.epoch, groups, step * self.world_size + self.rank)


class ClassDataset(Dataset[ClassBatch]):
    """Reads whole batches: indexed by a `BatchSpec`, gives a `ClassBatch`.

    Args:
        rows: prepared rows (`vlabs.data.prepared.CLASS_FEATURES`).
        preprocessing: pictures to tensors, and the classes (its `answers`).
        augmentation: of training; None for none.
        seed: of the augmentation, a function of (seed, epoch, batch, place in it).
        on_bad: `error`, or `skip` to leave out pictures that cannot be decoded.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        on_bad: str = "error",
    ) -> None:
        self.rows = rows
        self.preprocessing = preprocessing
        self.augmentation = augmentation
        self.seed = seed
        self.on_bad = on_bad
        a = augmentation
        self.transform = None if a is None else _transform(a, preprocessing)
        self.mixup = None
        if a is not None and (a.mixup > 0 or a.cutmix > 0):
            self.mixup = Mixup(
                a.mixup, a.cutmix, label_smoothing=a.label_smoothing, num_classes=len(preprocessing.answers)
            )

    def __getitem__(self, spec: BatchSpec) -> ClassBatch:
        images, labels, ids, skipped = [], [], [], []
        with generators_kept():
            for place, group in enumerate(spec.groups):
                row = self.rows[group.row]
                image = self._read(row, spec, place)
                if image is None:
                    skipped.append(row["image_id"])
                    continue
                images.append(image)
                labels.append(row["label"])
                ids.append(row["image_id"])
            if self.mixup is not None and len(images) % 2:  # pictures are mixed in pairs
                images, labels, ids = images[:-1], labels[:-1], ids[:-1]
            size, classes = self.preprocessing.image_size, len(self.preprocessing.answers)
            batch = torch.stack(images) if images else torch.empty(0, 3, size, size)
            of = torch.tensor(labels, dtype=torch.int64)
            if self.mixup is not None and len(of):
                self._seed(spec, len(spec.groups))
                batch, targets = self.mixup(batch, of)
            else:
                smoothing = self.augmentation.label_smoothing if self.augmentation is not None else 0.0
                targets = torch.full((len(of), classes), smoothing / classes)
                targets[torch.arange(len(of)), of] += 1 - smoothing
        return ClassBatch(batch, targets.float(), of, ids, skipped)

    def _read(self, row: dict[str, Any], spec: BatchSpec, place: int) -> Tensor | None:
        try:
            image = decode_image(read_bytes(row), name_of(row))
        except UserError as error:
            if self.on_bad != "skip":
                raise UserError(f"{error}; mend it, or pass data.on_bad=skip") from None
            show(f"left out: {error}", file=sys.stderr)
            return None
        return self.prepare(image, row, spec, place)

    def prepare(self, image: Image.Image, row: dict[str, Any], spec: BatchSpec, place: int) -> Tensor:
        """A picture as the model sees it, (3, H, W), normalised.

        Args:
            image: as it was decoded.
            row: what the data say of it.
            spec, place: its batch, and its place in it.
        """
        if self.transform is None:
            return self.preprocessing.image(image)
        self._seed(spec, place)
        tensor: Tensor = self.transform(image)
        return tensor

    def _seed(self, spec: BatchSpec, place: int) -> None:
        """What timm draws next, from all three generators, is a function of where in the training it is."""
        seed = int(np.random.SeedSequence((self.seed, spec.epoch, spec.number, place)).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leave the global generators of random, numpy and torch as they are, whatever is drawn or seeded inside."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def _transform(augmentation: Augmentation, preprocessing: Preprocessing) -> Any:
    """timm's training transform, normalising as the preprocessing does."""
    return create_transform(
        preprocessing.image_size,
        is_training=True,
        scale=(augmentation.scale, 1.0),
        ratio=(3 / 4, 4 / 3) if augmentation.scale < 1 else (1.0, 1.0),
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        interpolation="bicubic",
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )


class ClassDataModule(PreparedDataModule):
    """Batches of a prepared folder of classes.

    Args:
        dir: the prepared folder.
        crop: share of a picture's shorter side that evaluation sees: 0.875 as usual on ImageNet, 1 for all of it.
        augmentation: of `Augmentation`, by name.
        options: of `PreparedDataModule`; there are no texts.

    Raises:
        UserError: see `PreparedDataModule`.
    """

    kind = "classes"
    holds = "pictures with a class (data=objects, imagenet, classes)"

    def __init__(
        self,
        dir: str | Path,
        crop: float = 1.0,
        image_size: int = 224,
        image_mean: Sequence[float] = IMAGE_MEAN,
        image_std: Sequence[float] = IMAGE_STD,
        augmentation: dict[str, Any] | None = None,
        preprocessing: Preprocessing | None = None,
        **options: Any,
    ) -> None:
        check_whole("image_size", image_size, 1)
        if not isinstance(crop, int | float) or not 0 < crop <= 1:
            raise UserError(f"data.crop={crop} must be a share of the shorter side, in (0, 1]")
        unknown = [name for name in augmentation or {} if name not in Augmentation._fields]
        if unknown:
            raise UserError(f"data.augmentation.{unknown[0]}: choose of {', '.join(Augmentation._fields)}")
        check_kind(dir, self.kind)
        own = Preprocessing(
            image_size=image_size,
            tokenizer="",
            answers=tuple(read_classes(dir)),
            mean=tuple(image_mean),
            std=tuple(image_std),
            crop=float(crop),
        )
        super().__init__({"": dir}, preprocessing=preprocessing or own, **options)
        self.augmentation = Augmentation(**(augmentation or {}))
        check_whole("augmentation.repeats", self.augmentation.repeats, 1)
        for name in ("scale", "hflip", "random_erasing", "label_smoothing"):
            check_number(f"augmentation.{name}", getattr(self.augmentation, name), 1)
        for name in ("color_jitter", "mixup", "cutmix"):
            check_number(f"augmentation.{name}", getattr(self.augmentation, name))
        if self.augmentation.auto_augment is not None:
            check_augment("augmentation.auto_augment", self.augmentation.auto_augment)
        mixes = self.augmentation.mixup > 0 or self.augmentation.cutmix > 0
        if mixes and self.options.batch_size % 2:
            raise UserError(
                f"data.batch_size={self.options.batch_size}: pictures are mixed in pairs, so it must be even"
            )
        classes = read_classes(dir)
        if tuple(classes) != self.preprocessing.answers:
            raise UserError(f"{dir} has {len(classes)} classes, which are not those that the checkpoint was trained on")

    def rows(self, split: str) -> datasets.Dataset:
        """See `PreparedDataModule`."""
        return load_split(self.dir, split)

    def train_dataloader(self) -> DataLoader[ClassBatch]:
        """Training batches, full ones only."""
        rows = self.rows("train")
        sampler = ImageSampler(len(rows), self.batch_size, True, self.options.seed, self.augmentation.repeats)
        if not len(sampler):
            raise UserError(
                f"{self.dir} has {len(rows)} images to train on, fewer than data.batch_size={self.batch_size}"
            )
        return GroupLoader(self._dataset(rows, self.augmentation), sampler, self.options.num_workers)

    def val_dataloader(self) -> DataLoader[ClassBatch]:
        """Every picture of the validation split."""
        return self.eval_dataloader(self.val_split)

    def eval_dataloader(self, split: str) -> DataLoader[ClassBatch]:
        """Every picture of a split, in stored order."""
        rows = self.rows(split)
        size = self.options.eval_batch_size or self.batch_size
        sampler = ImageSampler(len(rows), size, False, self.options.seed)
        return eval_loader(self._dataset(rows, None), sampler, self.options)

    def _dataset(self, rows: datasets.Dataset, augmentation: Augmentation | None) -> ClassDataset:
        return ClassDataset(rows, self.preprocessing, augmentation, self.options.seed, self.options.on_bad)
