"""Batches of images with one class each, augmented and mixed by timm, reproducibly.

Images may stay in their raw files; prepared rows then say where.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import datasets
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor

from vlabs.data.images import generators_kept, seed_generators
from vlabs.data.loading import check_augment
from vlabs.data.pictures import PictureDataModule, PictureDataset
from vlabs.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from vlabs.data.sampling import BatchSpec
from vlabs.errors import UserError
from vlabs.utils.options import NonNegative, Share, Size


class ClassBatch(NamedTuple):
    """n images.

    Attributes:
        images: (n, 3, H, W), normalized.
        targets: (n, classes), class probabilities that sum to 1; more than one class if mixed or smoothed.
        labels: (n,), the class of each image before mixing.
        image_ids: n ids.
        skipped: ids of images that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    image_ids: list[int]
    skipped: list[int]


class Augmentation(NamedTuple):
    """Augmentation of training images; names and meanings are those of timm's `create_transform` and `Mixup`.

    Attributes:
        scale: smallest share of an image that is cropped and resized; 1 to keep it whole.
        hflip: probability of mirroring an image.
        color_jitter: strength of changes of brightness, contrast and saturation; timm ignores it if there is an
            `auto_augment`.
        auto_augment: timm's augmentation, such as `rand-m9-mstd0.5-inc1`; None for none.
        random_erasing: probability of replacing a part of an image by noise.
        mixup: α of mixup; 0 for none.
        cutmix: α of CutMix; 0 for none.
        label_smoothing: share of a target that is spread over all classes.
        repeats: how often each image is repeated, each time with another augmentation. An epoch keeps its length, so it
            then has fewer different images (repeated augmentation); 1 for none.
    """

    scale: Share = 1.0
    hflip: Share = 0.5
    color_jitter: NonNegative = 0.0
    auto_augment: str | None = None
    random_erasing: Share = 0.0
    mixup: NonNegative = 0.0
    cutmix: NonNegative = 0.0
    label_smoothing: Share = 0.0
    repeats: Size = 1


class ClassDataset(PictureDataset):
    """Reads whole batches: indexed by a `BatchSpec`, gives a `ClassBatch`.

    Args:
        rows: prepared rows (`vlabs.data.features.CLASS_FEATURES`).
        augmentation: augmentation in training; None for none.
        preprocessing, seed, on_bad: see `PictureDataset`.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        on_bad: str = "error",
    ) -> None:
        super().__init__(rows, preprocessing, seed, on_bad)
        self.augmentation = a = augmentation
        self.transform = None if a is None else _transform(a, preprocessing)
        self.mixup = None
        if a is not None and (a.mixup > 0 or a.cutmix > 0):
            self.mixup = Mixup(
                a.mixup, a.cutmix, label_smoothing=a.label_smoothing, num_classes=len(preprocessing.names)
            )

    def __getitem__(self, spec: BatchSpec) -> ClassBatch:
        images, labels, ids, skipped = [], [], [], []
        with generators_kept():
            for place, group in enumerate(spec.groups):
                row = self.rows[group.row]
                image = self.read(row)
                if image is None:
                    skipped.append(row["image_id"])
                    continue
                images.append(self.prepare(image, row, spec, place))
                labels.append(row["label"])
                ids.append(row["image_id"])
            if self.mixup is not None and len(images) % 2:  # timm mixes images in pairs
                images, labels, ids = images[:-1], labels[:-1], ids[:-1]
            size, classes = self.preprocessing.image_size, len(self.preprocessing.names)
            batch = torch.stack(images) if images else torch.empty(0, 3, size, size)
            of = torch.tensor(labels, dtype=torch.int64)
            if self.mixup is not None and len(of):
                seed_generators(*self.key(spec, len(spec.groups)))
                batch, targets = self.mixup(batch, of)
            else:
                smoothing = self.augmentation.label_smoothing if self.augmentation is not None else 0.0
                targets = torch.full((len(of), classes), smoothing / classes)
                targets[torch.arange(len(of)), of] += 1 - smoothing
        return ClassBatch(batch, targets.float(), of, ids, skipped)

    def prepare(self, image: Image.Image, row: dict[str, Any], spec: BatchSpec, place: int) -> Tensor:
        """Turn a decoded image into the model's input, (3, H, W), normalized.

        Args:
            image: the decoded image.
            row: its prepared row.
            spec, place: its batch, and its place in that batch.
        """
        if self.transform is None:
            return self.preprocessing.image(image)
        # timm draws from the generators of random, numpy and torch. Seeding them by the position in the training makes
        # an image the same in every worker and after a resume.
        seed_generators(*self.key(spec, place))
        tensor: Tensor = self.transform(image)
        return tensor


def _transform(augmentation: Augmentation, preprocessing: Preprocessing) -> Any:
    """timm's training transform with the preprocessing's size, interpolation and normalization."""
    return create_transform(
        preprocessing.image_size,
        is_training=True,
        scale=(augmentation.scale, 1.0),
        ratio=(3 / 4, 4 / 3) if augmentation.scale < 1 else (1.0, 1.0),
        hflip=augmentation.hflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        re_prob=augmentation.random_erasing,
        re_mode="pixel",
    )


@dataclass(kw_only=True, eq=False, repr=False)
class ClassDataModule(PictureDataModule):
    """Batches of a prepared folder of classes.

    Attributes:
        augmentation: augmentation of training images, as an `Augmentation` or a dictionary of its options.

    Raises:
        UserError: see `PictureDataModule`.
    """

    kind = "classes"
    holds = "images with a class (data=objects, imagenet, classes)"
    by_default: ClassVar[dict[str, Any]] = {  # the usual values for ImageNet
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic", "crop": 0.875,
        "crop_mode": "center",
    }  # fmt: skip

    augmentation: Augmentation | dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.augmentation
        self._augmentation = a = given if isinstance(given, Augmentation) else Augmentation(**given or {})
        self.repeats = a.repeats
        if a.auto_augment is not None:
            check_augment("augmentation.auto_augment", a.auto_augment)
        if (a.mixup > 0 or a.cutmix > 0) and self.batch_size % 2:
            raise UserError(
                f"data.batch_size={self.batch_size} must be even, because mixup and CutMix mix images in pairs"
            )

    def dataset(self, rows: datasets.Dataset, training: bool) -> ClassDataset:
        """See `PictureDataModule`."""
        augmentation = self._augmentation if training else None
        return ClassDataset(rows, self.preprocessing, augmentation, self.seed, self.on_bad)
