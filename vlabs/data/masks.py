"""Batches of images with a class per pixel; image and mask are scaled, cropped and flipped together, reproducibly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import RandomPhotometricDistort

from vlabs.data.decoding import read_labels
from vlabs.data.images import generators_kept, random_generator, seed_generators
from vlabs.data.pictures import PictureDataModule, PictureDataset
from vlabs.data.prepared import IGNORED
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, Preprocessing
from vlabs.data.sampling import BatchSpec
from vlabs.errors import UserError
from vlabs.utils.options import Positive, Share, Size


class MaskBatch(NamedTuple):
    """n images with their masks.

    Attributes:
        images: (n, 3, H, W), normalized.
        masks: (n, H, W), the class of each pixel; `IGNORED` for pixels that do not count.
        image_ids: n ids.
        skipped: ids of images that could not be decoded and were left out (only with `on_bad=skip`).
    """

    images: Tensor
    masks: Tensor
    image_ids: list[int]
    skipped: list[int]


class WholePicture(NamedTuple):
    """An image for evaluation.

    Attributes:
        image: (1, 3, H, W), normalized; resized if there is a `short_side`.
        mask: (rows, columns), at the original size; all `IGNORED` if it is not public.
        image_id, name: the dataset's id and name of the image.
        shown: the original image.
    """

    image: Tensor
    mask: Tensor
    image_id: int
    name: str
    shown: Image.Image


class MaskAugmentation(NamedTuple):
    """Augmentation of training images.

    Attributes:
        scale: smallest and largest factor by which an image is resized.
        crop: rows and columns of a crop; smaller images are padded with pixels that do not count.
        most: largest share of a crop that one class may have; otherwise another crop is tried, ten times at most.
        hflip: probability of mirroring an image.
        photometric: probability of changing brightness, contrast, saturation and hue.
    """

    scale: tuple[float, float] = (0.5, 2.0)
    crop: tuple[int, int] = (512, 512)
    most: float = 0.75
    hflip: float = 0.5
    photometric: float = 0.5


class MaskDataset(PictureDataset):
    """Reads training batches, or lists of whole images for evaluation; indexed by a `BatchSpec`.

    Args:
        rows: prepared rows (`vlabs.data.features.MASK_FEATURES`).
        augmentation: augmentation in training; None for whole images.
        short_side: size that the shorter side of an image is resized to (in training before `scale`); None to keep
            it. In evaluation masks keep their size.
        preprocessing, seed, on_bad: see `PictureDataset`.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        augmentation: MaskAugmentation | None = None,
        short_side: int | None = None,
        seed: int = 0,
        on_bad: str = "error",
    ) -> None:
        super().__init__(rows, preprocessing, seed, on_bad)
        self.augmentation = augmentation
        self.short_side = short_side
        self.distort = RandomPhotometricDistort(p=0.5)

    def __getitem__(self, spec: BatchSpec) -> MaskBatch | list[WholePicture]:
        if self.augmentation is None:
            whole = [self.whole(group.row) for group in spec.groups]
            return [one for one in whole if one is not None]
        images, masks, ids, skipped = [], [], [], []
        with generators_kept():
            for place, group in enumerate(spec.groups):
                row = self.rows[group.row]
                read = self._read(row)
                if read is None:
                    skipped.append(row["image_id"])
                    continue
                key = self.key(spec, place)
                seed_generators(*key)
                image, mask = self.change(*read, random_generator(*key))
                images.append(image)
                masks.append(mask)
                ids.append(row["image_id"])
        rows, columns = self.augmentation.crop
        stacked = torch.stack(images) if images else torch.empty(0, 3, rows, columns)
        of = torch.stack(masks) if masks else torch.empty(0, rows, columns, dtype=torch.int64)
        return MaskBatch(stacked, of, ids, skipped)

    def whole(self, index: int) -> WholePicture | None:
        """Read an image for evaluation; None if it is left out."""
        row = self.rows[index]
        read = self._read(row)
        if read is None:
            return None
        image, mask = read
        resized = image if self.short_side is None else resize_by(image, self.short_side / min(image.size))
        tensor = self.preprocessing.normalize(resized)[None]
        return WholePicture(tensor, torch.from_numpy(mask.astype(np.int64)), row["image_id"], row["name"], image)

    def _read(self, row: dict[str, Any]) -> tuple[Image.Image, np.ndarray] | None:
        image = self.read(row)
        if image is None:
            return None
        if not row["mask"]:
            return image, np.full((image.height, image.width), IGNORED, dtype=np.uint16)
        stored = read_labels(row["mask"])
        mask = stored.astype(np.uint16)
        if stored.dtype == np.uint8:
            # The usual value for no class; in 16 bits 255 may be a class.
            mask[stored == 255] = IGNORED
        return image, mask

    def change(self, image: Image.Image, mask: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Augment an image and its mask: (3, rows, columns), normalized, and (rows, columns).

        Args:
            image: the decoded image.
            mask: (H, W), its classes.
            rng: generator of all draws but those of colors, which torchvision takes from torch's global generator.
        """
        a = self.augmentation
        assert a is not None
        factor = rng.uniform(*a.scale) * (1.0 if self.short_side is None else self.short_side / min(image.size))
        image = resize_by(image, factor)
        if image.size != mask.shape[::-1]:
            mask = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
        top, left = self._place(mask, rng)
        rows, columns = a.crop
        pixels = np.asarray(image)[top : top + rows, left : left + columns]
        mask = mask[top : top + rows, left : left + columns]
        if rng.random() < a.hflip:
            pixels, mask = pixels[:, ::-1], mask[:, ::-1]
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        if rng.random() < a.photometric:
            picture = self.distort(picture)
        tensor = self.preprocessing.normalize(picture)
        # An image smaller than the crop is filled up after it is normalized: with the mean color, which does not count.
        missing = columns - pixels.shape[1], rows - pixels.shape[0]
        padding = (0, missing[0], 0, missing[1])
        labels = torch.from_numpy(np.ascontiguousarray(mask).astype(np.int64))
        return F.pad(tensor, padding), F.pad(labels, padding, value=IGNORED)

    def _place(self, mask: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
        """Top left corner of a crop in which no class has more than its share."""
        a = self.augmentation
        assert a is not None
        rows, columns = a.crop
        top = left = 0
        for _ in range(10):
            top = int(rng.integers(max(0, mask.shape[0] - rows) + 1))
            left = int(rng.integers(max(0, mask.shape[1] - columns) + 1))
            inside = mask[top : top + rows, left : left + columns]
            counts = np.bincount(inside[inside != IGNORED])
            if np.count_nonzero(counts) > 1 and counts.max() < a.most * counts.sum():
                break
        return top, left


def resize_by(image: Image.Image, factor: float) -> Image.Image:
    """Resize an image by a factor."""
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)


@dataclass(kw_only=True, eq=False, repr=False)
class MaskDataModule(PictureDataModule):
    """Batches of a prepared folder of masks; evaluation gives lists of whole images.

    Attributes:
        crop: rows and columns of a training crop; None for the square of `image_size`.
        scale, most, hflip, photometric: as in `MaskAugmentation`.
        short_side: size that the shorter side of an image is resized to (in training before `scale`); None to keep
            it. In evaluation masks keep their size.
        augmentation: of training images.

    Raises:
        UserError: see `PictureDataModule`.
    """

    kind = "masks"
    holds = "images with a class per pixel (data=scenes_masks, voc, cityscapes, ade20k)"
    unused = (*PictureDataModule.unused, "interpolation", "crop_mode")
    hands_on = (MaskAugmentation,)
    by_default: ClassVar[dict[str, Any]] = {"mean": IMAGE_MEAN, "std": IMAGE_STD}

    image_size: Size | None = 512
    crop: tuple[Size, Size] | None = None  # type: ignore[assignment]  # of a training crop, where others crop to test
    scale: tuple[Positive, Positive] = (0.5, 2.0)
    most: Share = 0.75
    hflip: Share = 0.5
    photometric: Share = 0.5
    short_side: Size | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self.crop or (self.preprocessing.image_size,) * 2
        low, high = self.scale
        if low > high:
            raise UserError(f"data.scale={list(self.scale)} must have the smaller factor first")
        self.augmentation = MaskAugmentation((low, high), (rows, columns), self.most, self.hflip, self.photometric)

    @property
    def identity(self) -> dict[str, Any]:
        """See `PreparedDataModule`; also `short_side`, which evaluation uses too."""
        return super().identity | ({} if self.short_side is None else {"short_side": self.short_side})

    @property
    def eval_size(self) -> int:
        """See `PictureDataModule`; 1 by default, because whole images differ in size."""
        return self.eval_batch_size or 1

    def dataset(self, rows: datasets.Dataset, training: bool) -> MaskDataset:
        """See `PictureDataModule`."""
        augmentation = self.augmentation if training else None
        return MaskDataset(rows, self.preprocessing, augmentation, self.short_side, self.seed, self.on_bad)


def stacked(pictures: Sequence[WholePicture]) -> Iterator[tuple[Tensor, list[WholePicture]]]:
    """Yield batches (n, 3, H, W) of consecutive whole images of the same size, each with its `WholePicture`s."""
    start = 0
    for end in range(1, len(pictures) + 1):
        if end == len(pictures) or pictures[end].image.shape != pictures[start].image.shape:
            yield torch.cat([one.image for one in pictures[start:end]]), list(pictures[start:end])
            start = end
