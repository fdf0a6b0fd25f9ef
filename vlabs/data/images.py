"""From prepared rows to image tensors: decoded, augmented reproducibly, and never replaced silently."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote_to_bytes

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torch import Tensor

from vlabs.data.decoding import read_gray, read_palette
from vlabs.data.instances import crop_map
from vlabs.data.preprocessing import Preprocessing, decode_image
from vlabs.data.sampling import BatchSpec
from vlabs.errors import UserError, show

# Operations of RandAugment that move pixels; all others change colors only.
_MOVES = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel")


class Stored(Protocol):
    """Tensors stored for images under keys, so that images need not be read (`vlabs.ranking.passes`)."""

    def __contains__(self, key: str) -> bool:
        """Whether there are tensors for this key."""

    def read(self, keys: Sequence[str]) -> Any:
        """A named tuple of tensors (n, …), used instead of n images."""


class BatchRows(NamedTuple):
    """The texts of a batch with their images.

    Attributes:
        images: (B, 3, H, W), normalized; B may be 0. The p images of a row follow each other. With a store, the stored
            tensors instead.
        image_index: n positions in `images`: each text's image, or the first of its images.
        texts: n tuples: index of the row, the row, and the text's position in the row's lists.
        skipped: ids of images that were left out together with their texts.
    """

    images: Any
    image_index: list[int]
    texts: list[tuple[int, dict[str, Any], int]]
    skipped: list[int]


class ImageReader:
    """Reads prepared rows, with their images as tensors.

    Args:
        rows: prepared rows.
        preprocessing: turns images into tensors.
        rand_augment: timm's RandAugment string, e.g. `rand-m9-n2`; None for no augmentation.
        seed: seed of the augmentation, which is a function of (seed, epoch, image id).
        on_bad: `error`, or `skip` to leave out images that cannot be decoded; None where none may be left out.
        scaled_decoding: decode JPEGs at a smaller scale if possible (`decode_image`), and resize as for training.
        region_grid: rows and columns of the grid of patches for `coverage`; None to leave it out.
        region_sets: M, the regions per text.
        pictures: number of images per row that texts are about together: `image`, `image_2` and so on.
        stored: tensors by `key` that are read instead of images. An image without tensors could not be decoded.
        blind: give the mean color instead of every image, which is not read.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        preprocessing: Preprocessing,
        rand_augment: str | None = None,
        seed: int = 0,
        on_bad: str | None = None,
        scaled_decoding: bool = False,
        region_grid: tuple[int, int] | None = None,
        region_sets: int = 1,
        pictures: int = 1,
        stored: Stored | None = None,
        blind: bool = False,
    ) -> None:
        self.suffixes = ["", *(f"_{n}" for n in range(2, pictures + 1))]
        self.fingerprint = rows._fingerprint
        self.stored = stored
        self.rows = rows
        self.blind = blind
        if stored is not None or blind:
            self.rows = rows.remove_columns([f"image{suffix}" for suffix in self.suffixes])
        self.preprocessing = preprocessing
        self.region_grid, self.region_sets = region_grid, region_sets
        fill = tuple(round(255 * value) for value in preprocessing.mean)
        self.augment = rand_augment_transform(rand_augment, {"img_mean": fill}) if rand_augment else None
        self.move = _moves_only(rand_augment) if rand_augment else None
        self.seed = seed
        self.on_bad = on_bad
        self.at_least = preprocessing.image_size if scaled_decoding else None

    def key(self, index: int, place: int = 0) -> str:
        """Key of one of a row's images. It depends on the rows, not on the folder that they are in."""
        return "blind" if self.blind else f"{self.fingerprint}/{index}/{place}"

    def read(self, index: int, epoch: int, place: int = 0) -> tuple[dict[str, Any], Any]:
        """Read a row and one of its images (1, 3, H, W), normalized, or its stored tensors; None if it is left out.

        Raises:
            UserError: the image cannot be decoded, and `on_bad` is not `skip`.
        """
        row = self.rows[index]
        if self.stored is not None:
            if (key := self.key(index, place)) in self.stored:
                return row, self.stored.read([key])
            if self.on_bad != "skip":
                raise UserError(f"{name_of(row)} cannot be decoded: prepare the data again")
            return row, None
        with self._generators_kept():
            image = self._read_image(row, place, epoch)
        return row, None if image is None else image[None]

    def _read_image(self, row: dict[str, Any], place: int, epoch: int, out: Tensor | None = None) -> Tensor | None:
        """Read one of a row's images, into `out` if given, which saves a copy; None if it is left out."""
        if self.blind:
            size = self.preprocessing.image_size
            return (torch.empty(3, size, size) if out is None else out).zero_()
        try:
            which = f" ({place + 1} of {len(self.suffixes)})" if len(self.suffixes) > 1 else ""
            content = read_bytes(row, f"image{self.suffixes[place]}")
            image = decode_image(content, f"{name_of(row)}{which}", self.at_least)
        except UserError as error:
            if self.on_bad != "skip":
                instead = "" if self.on_bad is None else ", or pass data.on_bad=skip"
                raise UserError(f"{error}; prepare the data again{instead}") from None
            show(f"left out: {error}", file=sys.stderr)
            return None
        exact = self.at_least is None
        image = self.preprocessing.resize(image) if exact else self.preprocessing.resize_for_training(image)
        if self.augment is not None:
            seed_generators(*self._key(row, place, epoch))
            image = self.augment(image)
        return self.preprocessing.normalize(image, out)

    def _key(self, row: dict[str, Any], place: int, epoch: int) -> tuple[int, ...]:
        """Seed of the augmentation of one of a row's images."""
        return (self.seed, epoch, row["image_id"]) + ((place,) if place else ())

    def read_batch(self, spec: BatchSpec) -> BatchRows:
        """Read the images of a batch, and list the texts that belong to them."""
        index: list[int] = []
        texts: list[tuple[int, dict[str, Any], int]] = []
        skipped: list[int] = []
        size = self.preprocessing.image_size
        pictures = len(self.suffixes)
        keys: list[str] = []
        # Images are written into their place. What is left out is overwritten by the next, and the rest is cut off.
        images, count = torch.empty(0 if self.stored else len(spec.groups) * pictures, 3, size, size), 0
        with self._generators_kept():
            for group in spec.groups:
                row = self.rows[group.row]
                if self.stored is not None:
                    own = [self.key(group.row, place) for place in range(pictures)]
                    is_whole = all(key in self.stored for key in own)
                    keys += own if is_whole else []
                else:
                    read = [self._read_image(row, n, spec.epoch, images[count + n]) for n in range(pictures)]
                    is_whole = all(image is not None for image in read)
                if not is_whole:
                    skipped.append(row["image_id"])
                    continue
                index += [count] * len(group.questions)
                texts += [(group.row, row, position) for position in group.questions]
                count += pictures
        return BatchRows(self.stored.read(keys) if self.stored and keys else images[:count], index, texts, skipped)

    def coverage(self, texts: Sequence[tuple[int, dict[str, Any], int]], epoch: int) -> Tensor | None:
        """The share of each patch that each text is about, (n, rows * columns) in [0, 1]; zeros where unknown.

        If a row has p images, (n * p, rows * columns), with the images of a text one after another. Of several regions
        per text, (n, M, rows * columns), see `decode_regions`. Regions are augmented like their images: with the same
        seed, and without changes of color.

        Args:
            texts: as in `BatchRows`.

        Returns:
            None without a `region_grid`.
        """
        if self.region_grid is None:
            return None
        rows, columns = self.region_grid
        pictures = len(self.suffixes)
        shares = torch.zeros(len(texts) * pictures, self.region_sets, rows * columns)
        if texts and "region" not in self.rows.column_names:
            raise UserError("the data were prepared by a version without regions: prepare them again")
        with self._generators_kept():
            for n, (_, row, position) in enumerate(texts):
                for place, suffix in enumerate(self.suffixes):
                    png = row[f"region{suffix}"][position]
                    if png:
                        key = self._key(row, place, epoch)
                        regions = decode_regions(png, self.region_sets, f"image {row['image_id']}")
                        shares_of = [self._patch_shares(region, key).ravel() for region in regions]
                        shares[n * pictures + place] = torch.from_numpy(np.stack(shares_of))
        return shares if self.region_sets > 1 else shares[:, 0]

    def _patch_shares(self, region: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
        size, mode = self.preprocessing.image_size, self.preprocessing.crop_mode
        assert self.region_grid is not None
        if self.move is None:
            return crop_map(region, size, self.region_grid, mode)
        # In the order of the image: first resized and cropped, then moved, with the same seed.
        square = Image.fromarray(np.round(255 * crop_map(region, size, crop_mode=mode)).astype(np.uint8))
        seed_generators(*key)
        return crop_map(np.asarray(self.move(square), dtype=np.float64) / 255, size, self.region_grid)

    def _generators_kept(self) -> AbstractContextManager[None]:
        """`generators_kept` around a batch, if there is an augmentation that draws from the generators."""
        return nullcontext() if self.augment is None else generators_kept()


def joined(parts: Sequence[Any]) -> Any:
    """Concatenate the images of several batches, or the tensors stored for them."""
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(*(None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True)))


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restore the global generators of random, numpy and torch at the end, whatever is drawn or seeded inside."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


def read_bytes(row: dict[str, Any], column: str = "image") -> bytes:
    """The bytes of an image: from the row itself, or from the file that the row names.

    Raises:
        UserError: that file is gone, or shorter than before.
    """
    if row[column] or not row.get("path"):
        return bytes(row[column])
    try:
        with open(path_of(row["path"]), "rb") as file:
            file.seek(row["offset"])
            found = file.read(row["size"])
    except OSError as error:
        raise UserError(
            f"{row['path']} cannot be read ({error.strerror}): put it back or prepare the data again"
        ) from None
    if len(found) != row["size"]:
        raise UserError(f"{row['path']} has changed since the data were prepared: prepare them again")
    return found


def path_of(stored: str) -> str:
    """The path that a prepared row stores; a path that is not UTF-8 is stored as a URI."""
    return os.fsdecode(unquote_to_bytes(stored.removeprefix("file://"))) if stored.startswith("file://") else stored


def name_of(row: dict[str, Any]) -> str:
    """The name of a row's image in messages."""
    where = f" ({row.get('path') or row.get('name')})" if row.get("path") or row.get("name") else ""
    return f"image {row['image_id']}{where}"


def decode_region(png: bytes, name: str) -> np.ndarray:
    """Decode a prepared region to a map over its whole image, (H, W) float64 in [0, 1].

    Args:
        png: the file's bytes.
        name: name of the image, for messages.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        return read_gray(png).astype(np.float64)
    except ValueError as error:
        raise UserError(
            f"the region of a text about {name} cannot be decoded ({error}): prepare the data again"
        ) from None


def decode_regions(png: bytes, count: int, name: str) -> np.ndarray:
    """Decode a prepared region to `count` maps over its whole image, (count, H, W) in [0, 1]: one for each phrase.

    The last map has all further phrases too. What has no phrase of its own is the region of the whole text: the maps of
    a text with one phrase, or of a phrase that it does not have.

    Args:
        png, name: as for `decode_region`.
        count: number of maps.
    """
    whole = decode_region(png, name)
    maps = np.repeat(whole[None], count, axis=0)
    if count > 1 and (bits := read_palette(png)) is not None:
        # Bit k of an index of the palette says that the k-th phrase covers the pixel.
        phrases = [bits & 1 << phrase > 0 for phrase in range(8)]
        phrases = [phrase for phrase in phrases if phrase.any()]
        for n in range(min(count, len(phrases))):
            maps[n] = np.logical_or.reduce(phrases[n:] if n == count - 1 else [phrases[n]])
    return maps


def _moves_only(rand_augment: str) -> RandAugment:
    """The part of a RandAugment that moves pixels, for gray images.

    It draws the same random numbers as the whole, so that a region moves exactly like its image.
    """
    transform = rand_augment_transform(rand_augment, {"img_mean": 0})
    for op in transform.ops:
        if op.name not in _MOVES:
            op.aug_fn = _unchanged
    return transform


def _unchanged(image: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
    return image


def random_generator(*key: int) -> np.random.Generator:
    """A generator seeded by several whole numbers, such as (seed, epoch, sample id)."""
    return np.random.default_rng([value % 2**32 for value in key])


def seed_generators(*key: int) -> int:
    """Seed the global generators of random, numpy and torch (CPU only) by several whole numbers.

    Returns:
        The seed that follows from them.
    """
    seed = int(np.random.SeedSequence([value % 2**32 for value in key]).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # Not `torch.manual_seed`: it seeds the GPU too, from which the model draws its dropout.
    torch.default_generator.manual_seed(seed)
    return seed
