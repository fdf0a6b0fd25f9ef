"""The embedded corpus of single objects: one colored shape per image, whose class is the pair of shape and fill.

    vlabs prepare objects --size small --out-dir data/objects-raw

Download: nothing, the images are rendered.

The command writes `train.tar` and `val.tar`, each with one folder of JPEG files per class (`vlabs prepare classes`
reads them). Color, position and diameter vary; backgrounds are those of the scenes.

    vlabs prepare objects --size small --out-dir data/objects-several --several 500

writes images of two to four objects of different classes, and `instances.json` with their masks as COCO has them.
"""

from __future__ import annotations

import argparse
import io
import math
import os
import tarfile
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from tqdm import tqdm

from data_prep.scenes.drawing import as_jpeg, instance, mapped
from data_prep.scenes.render import COLORS, FILLS, SHAPES, Mask, SceneObject, render
from vlabs.errors import UserError, run_cli
from vlabs.utils.arguments import MOST_SEED, whole
from vlabs.utils.files import new_folder, write_json

SPLITS = ("train", "val")


class ObjectSize(NamedTuple):
    """How large a corpus is: side in pixels, images, and of how many shapes and colors."""

    image_size: int
    train_images: int
    val_images: int
    num_shapes: int
    num_colors: int
    diameter: tuple[float, float]  # as a share of the side

    @property
    def classes(self) -> list[str]:
        """`solid circle`, `striped circle`, …: every fill of every shape."""
        return [f"{fill} {shape}" for shape in SHAPES[: self.num_shapes] for fill in FILLS]

    @property
    def classes_by_folder(self) -> list[str]:
        """The names of the class folders, in the order of `classes`."""
        return [name.replace(" ", "_") for name in self.classes]


SIZES = {
    "tiny": ObjectSize(32, 120, 30, 5, 6, (0.4, 0.8)),
    "small": ObjectSize(64, 12_000, 1_500, 5, 6, (0.35, 0.8)),
    "medium": ObjectSize(112, 48_000, 4_800, 8, 8, (0.25, 0.8)),
    "large": ObjectSize(224, 120_000, 12_000, 8, 8, (0.2, 0.8)),
}


class Task(NamedTuple):
    """Which image to make."""

    size: str
    split: str
    number: int  # in the split, from 0
    seed: int

    @property
    def label(self) -> int:
        """Classes take turns, so that all have as many images."""
        return self.number % len(SIZES[self.size].classes)


def draw_object(task: Task) -> bytes:
    """An image of one object, as JPEG; a function of the task alone."""
    size = SIZES[task.size]
    rng = Random(f"objects/{task.seed}/{task.size}/{task.split}/{task.number}")
    fill, shape = size.classes[task.label].split()
    radius = rng.uniform(*size.diameter) / 2
    x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
    color = rng.choice(list(COLORS)[: size.num_colors])
    item = SceneObject(shape, color, "any", fill, x, y, radius, rng.uniform(-0.2, 0.2))
    drawn = render([item], size.image_size, rng)
    assert drawn is not None  # nothing can cover it
    return as_jpeg(drawn[0])


def _check_size(size: str) -> None:
    if size not in SIZES:
        raise UserError(f"size is {size!r}, and has to be one of {', '.join(SIZES)}")


def draw_several(size: str, number: int, seed: int) -> tuple[bytes, list[int], list[Mask]]:
    """An image of two to four objects that do not touch: as JPEG, the class of each, and the pixels of each."""
    of_size = SIZES[size]
    rng = Random(f"objects/several/{seed}/{size}/{number}")
    count = rng.randint(2, 4)
    labels = rng.sample(range(len(of_size.classes)), count)
    while True:
        items: list[SceneObject] = []
        for label in labels:
            fill, shape = of_size.classes[label].split()
            radius = rng.uniform(0.3, 0.45 if count == 2 else 0.36) / 2
            x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
            if any(math.hypot(x - other.x, y - other.y) < radius + other.radius for other in items):
                break
            color = rng.choice(list(COLORS)[: of_size.num_colors])
            items.append(SceneObject(shape, color, "any", fill, x, y, radius, rng.uniform(-0.2, 0.2)))
        if len(items) == count and (drawn := render(items, of_size.image_size, rng)) is not None:
            break
    return as_jpeg(drawn[0]), labels, drawn[1]


def make_several(size: str, out_dir: str | Path, count: int, seed: int = 0) -> None:
    """Render images of several objects into the new folder `out_dir`; every byte is a function of the arguments.

    Raises:
        UserError: for an unknown size, fewer than one image, or an `out_dir` that is there.
    """
    out_dir = Path(out_dir)
    _check_size(size)
    if count < 1:
        raise UserError(f"--several is {count}, and has to be 1 or more")
    side = SIZES[size].image_size
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    with new_folder(out_dir, "--out-dir") as partial:
        for number in tqdm(range(count), unit="image", desc=f"objects {size}, several"):
            jpeg, labels, masks = draw_several(size, number, seed)
            name = f"{number:06d}.jpg"
            (partial / name).write_bytes(jpeg)
            images.append({"id": number, "file_name": name, "width": side, "height": side})
            for label, mask in zip(labels, masks, strict=True):
                annotations.append(instance(mask, len(annotations), number, label))
        categories = [{"id": label, "name": name} for label, name in enumerate(SIZES[size].classes_by_folder)]
        write_json(partial / "instances.json", {"images": images, "annotations": annotations, "categories": categories})


def make_objects(size: str, out_dir: str | Path, seed: int = 0, num_workers: int | None = None) -> None:
    """Render a corpus into the new folder `out_dir`; nothing happens if it holds this corpus already.

    Every byte written is a function of size and seed.

    Args:
        size: a key of `SIZES`.
        num_workers: processes that render; every core by default.

    Raises:
        UserError: for an unknown size, fewer than one worker, or an `out_dir` that holds something else.
    """
    out_dir = Path(out_dir)
    _check_size(size)
    workers = (os.cpu_count() or 1) if num_workers is None else num_workers
    if workers < 1:
        raise UserError(f"--num-workers is {num_workers}, and has to be 1 or more")
    record = {"size": size, "seed": seed, "image_size": SIZES[size].image_size, "classes": SIZES[size].classes}
    if os.path.exists(out_dir):
        found = (out_dir / "objects.json").read_text() if (out_dir / "objects.json").is_file() else ""
        if f'"size": "{size}"' not in found or f'"seed": {seed},' not in found:
            raise UserError(f"{out_dir} exists and holds something else; name a new folder with --out-dir")
        print(f"{out_dir} holds the {size} objects of seed {seed} already")
        return
    with new_folder(out_dir, "--out-dir") as partial:
        for split, count in zip(SPLITS, (SIZES[size].train_images, SIZES[size].val_images), strict=True):
            tasks = [Task(size, split, number, seed) for number in range(count)]
            with tarfile.open(partial / f"{split}.tar", "w") as archive:
                pictures = tqdm(
                    mapped(draw_object, tasks, workers), total=count, unit="image", desc=f"objects {size} {split}"
                )
                for task, jpeg in zip(tasks, pictures, strict=True):
                    member = tarfile.TarInfo(f"{SIZES[size].classes_by_folder[task.label]}/{task.number:06d}.jpg")
                    member.size = len(jpeg)
                    archive.addfile(member, io.BytesIO(jpeg))
        write_json(partial / "objects.json", record)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="vlabs prepare objects", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="(default: %(default)s)")
    parser.add_argument("--out-dir", type=Path, required=True, help="new folder of the corpus")
    parser.add_argument(
        "--seed", type=whole(0, MOST_SEED), default=0, help="of everything that is drawn (default: %(default)s)"
    )
    parser.add_argument("--num-workers", type=whole(1), help="processes that render (default: every core)")
    parser.add_argument("--several", type=whole(1), help="instead of the corpus, so many images of several objects")
    arguments = parser.parse_args()
    if arguments.several is not None:
        make_several(arguments.size, arguments.out_dir, arguments.several, arguments.seed)
        return
    make_objects(arguments.size, arguments.out_dir, arguments.seed, arguments.num_workers)


if __name__ == "__main__":
    run_cli(main)
