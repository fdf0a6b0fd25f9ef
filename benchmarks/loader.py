"""How much faster vlabs loads training batches than the plain way does.

    python benchmarks/loader.py            both sides, interleaved; the last line is JSON with the ratios
    python benchmarks/loader.py --memory   memory of a loader with 4 workers over an epoch

The data are made up: JPEGs of 640×480 with as many bytes as COCO's, and questions, prepared by `data_prep.own`. The
plain way reads one row a question: decode the whole JPEG, torchvision's resize, RandAugment, tensor, tokenise and pad
to 50. Both sides run in this one process, so the figures are of one core. k is `data.questions_per_image`.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from tokenizers import Tokenizer
from torchvision.transforms import v2

from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD
from vlabs.data.vqa import VQADataModule

WIDTH, HEIGHT, QUALITY = 640, 480, 92
QUESTIONS_PER_IMAGE = 5
MAX_LENGTH = 50
AUGMENT = "rand-m9-n2"


def make_picture(seed: int) -> bytes:
    """A JPEG of smooth and rough patches, about 160 KB as COCO's images have on average."""
    rng = np.random.default_rng(seed)
    canvas = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, strength in ((4, 90.0), (16, 60.0), (64, 35.0), (160, 22.0)):
        noise = rng.normal(size=(cells, cells, 3)).astype(np.float32)
        channels = [
            np.asarray(Image.fromarray(noise[..., c], mode="F").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
            for c in range(3)
        ]
        canvas += strength * np.stack(channels, axis=-1)
    canvas += 9.0 * rng.normal(size=canvas.shape)
    file = io.BytesIO()
    Image.fromarray((canvas + 128).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def make_data(folder: Path, images: int) -> Path:
    """A prepared folder of made-up images, each with five questions."""
    words = [
        "what",
        "is",
        "the",
        "colour",
        "of",
        "a",
        "dog",
        "on",
        "table",
        "how",
        "many",
        "people",
        "are",
        "red",
        "left",
    ]
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for n in range(images):
        (folder / "images" / f"{n}.jpg").write_bytes(make_picture(n))
        for _ in range(QUESTIONS_PER_IMAGE):
            text = " ".join(rng.choice(words, size=rng.integers(4, 10)))
            answer = str(rng.choice(["yes", "no", "red", "2"]))
            rows.append({"image": f"images/{n}.jpg", "question": f"{text}?", "answers": [answer], "split": "train"})
    table = folder / "table.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "data_prep.own", "--table", str(table), "--out-dir", str(folder / "prepared")]
    result = subprocess.run([*command, "--min-answer-count", "1"], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{result.stderr}")
    shutil.rmtree(folder / "images")
    return folder / "prepared"


class PlainLoader:
    """The plain way: one question at a time, nothing shared, nothing left out.

    Args:
        folder: prepared data.
        size: side of the square input in pixels.
        batch_size: questions a batch.
    """

    def __init__(self, folder: Path, size: int, batch_size: int) -> None:
        self.rows = datasets.load_from_disk(str(folder / "train"))
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
        self.answers = len(json.loads((folder / "answers.json").read_text()))
        self.resize = v2.Compose([v2.Resize(size, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])
        self.augment = rand_augment_transform(AUGMENT, {"img_mean": tuple(round(255 * value) for value in IMAGE_MEAN)})
        self.tensor = v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)])
        self.normalize = v2.Normalize(list(IMAGE_MEAN), list(IMAGE_STD))
        self.batch_size = batch_size
        counts = [len(ids) for ids in self.rows["question_id"]]
        self.questions = [(row, position) for row, count in enumerate(counts) for position in range(count)]

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = np.random.default_rng(0).permutation(len(self.questions))
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            samples = [self.sample(*self.questions[n]) for n in order[start : start + self.batch_size]]
            yield {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    def sample(self, number: int, position: int) -> dict[str, torch.Tensor]:
        """One question with its image."""
        row = self.rows[number]
        image = self.augment(self.resize(Image.open(io.BytesIO(row["image"])).convert("RGB")))
        ids = self.tokenizer.encode(row["question"][position]).ids[:MAX_LENGTH]
        target = torch.zeros(self.answers)
        for answer, score in zip(row["answer_ids"][position], row["answer_scores"][position], strict=True):
            target[answer] = score
        return {
            "image": self.normalize(self.tensor(image)),
            "input_ids": torch.tensor(ids + [1] * (MAX_LENGTH - len(ids))),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * (MAX_LENGTH - len(ids))),
            "target": target,
        }


def our_loader(folder: Path, options: Options, k: int, num_workers: int = 0) -> VQADataModule:
    """vlabs' data module."""
    return VQADataModule(
        folder, image_size=options.image_size, batch_size=options.batch_size, questions_per_image=k,
        max_length=MAX_LENGTH, rand_augment=AUGMENT, num_workers=num_workers,
    )  # fmt: skip


def rate(batches: Iterator[Any], count: int, questions: Callable[[Any], int]) -> float:
    """Questions a second over some batches."""
    started, seen = time.perf_counter(), 0
    for _ in range(count):
        seen += questions(next(batches))
    return seen / (time.perf_counter() - started)


def compare(folder: Path, options: Options) -> dict[str, Any]:
    """Time both sides in turn, return the ratios."""
    sides: dict[str, tuple[Callable[[], Iterator[Any]], Callable[[Any], int]]] = {
        "plain": (lambda: iter(PlainLoader(folder, options.image_size, options.batch_size)), lambda b: len(b["image"])),
    }
    for k in (1, 4):
        loader = our_loader(folder, options, k).train_dataloader()
        sides[f"k={k}"] = (lambda loader=loader: iter(loader), lambda b: len(b.question_ids))  # type: ignore[misc]
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for repetition in range(options.repetitions + 1):
        for name, (start, questions) in sides.items():
            found = rate(start(), options.batches, questions)
            if repetition:  # the first is the warm-up
                rates[name].append(found)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    size = statistics.mean(len(image) for image in datasets.load_from_disk(str(folder / "train"))["image"])
    print(
        f"{options.image_size} px of {WIDTH}x{HEIGHT} JPEGs of {size / 1000:.0f} KB, {AUGMENT}, batch "
        f"{options.batch_size}, {options.repetitions} repetitions of {options.batches} batches, load "
        f"{os.getloadavg()[0]:.1f}\n"
    )
    for name, median in medians.items():
        print(f"{name:8}{median:10.1f} questions/s per core")
    need = options.gpu_rate
    if need:
        workers = {k: -(-need // medians[f"k={k}"]) for k in (1, 4)}
        print(f"\na GPU that trains on {need:g} questions/s takes {workers[1]:g} workers at k=1, {workers[4]:g} at k=4")
    print()
    return {
        "ratio_k1": round(medians["k=1"] / medians["plain"], 3),
        "ratio_k4": round(medians["k=4"] / medians["plain"], 3),
        "image_size": options.image_size,
        "batch_size": options.batch_size,
        "repetitions": options.repetitions,
        "load": round(os.getloadavg()[0], 1),
    }


def profile(folder: Path, options: Options) -> None:
    """Milliseconds an image or question of the steps of ours, one by one."""
    dataset: Any = our_loader(folder, options, 1).train_dataloader().dataset
    reader, preprocessing = dataset.images, dataset.preprocessing
    from vlabs.data.preprocessing import decode_image

    rows = [dataset.rows[n] for n in range(min(50, len(dataset.rows)))]
    whole = [decode_image(row["image"], "") for row in rows]
    scaled = [decode_image(row["image"], "", options.image_size) for row in rows]
    small = [preprocessing.resize(image) for image in scaled]
    steps: dict[str, Callable[[int], Any]] = {
        "read row": lambda n: dataset.rows[n],
        "decode, whole": lambda n: decode_image(rows[n]["image"], ""),
        "decode, scaled": lambda n: decode_image(rows[n]["image"], "", options.image_size),
        "resize, whole": lambda n: preprocessing.resize(whole[n]),
        "resize, scaled": lambda n: preprocessing.resize_for_training(scaled[n]),
        "RandAugment": lambda n: reader.augment(small[n]),
        "to tensor": lambda n: preprocessing.normalize(small[n]),
        "tokenise one": lambda n: preprocessing.token_ids(rows[n]["question"][:1]),
    }
    print("ms on one core:")
    for name, step in steps.items():
        started = time.perf_counter()
        for n in range(len(rows)):
            step(n)
        print(f"{name:18}{1000 * (time.perf_counter() - started) / len(rows):8.2f}")
    print()


def memory(folder: Path, options: Options) -> dict[str, Any]:
    """Memory of this process and its 4 workers in the course of an epoch, shared pages once."""
    loader = our_loader(folder, options, 1, num_workers=4).train_dataloader()
    batches = len(loader)
    marks = {max(1, batches * share // 100) for share in (25, 50, 75, 100)}
    peaks = []
    for number, _ in enumerate(loader, 1):
        if number in marks:
            peaks.append(_pss())
            print(f"after {number:5} of {batches} batches: {peaks[-1]:8.0f} MiB", flush=True)
    return {"mib": peaks, "growth": round(peaks[-1] / peaks[0], 3), "batches": batches, "images": options.images}


def _pss() -> float:
    """Proportional memory of this process and its children in MiB."""
    own = os.getpid()
    total = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if own in (int(path.name), parent):
                text = (path / "smaps_rollup").read_text()
                total += int(text.split("\nPss:")[1].split()[0])
        except (OSError, IndexError):
            continue
    return total / 1024


@dataclass
class Options:
    """The command line, see `parse`."""

    images: int
    image_size: int
    batch_size: int
    batches: int
    repetitions: int
    memory: bool
    gpu_rate: float


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=int, default=200, help="images that are made")
    add("--image-size", type=int, default=224)
    add("--batch-size", type=int, default=32, help="questions a batch")
    add("--batches", type=int, default=4, help="batches a repetition")
    add("--repetitions", type=int, default=25)
    add("--memory", action="store_true", help="memory over an epoch instead")
    add("--gpu-rate", type=float, default=0.0, help="questions/s of a GPU: print how many workers feed it")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder), options.images)
        if options.memory:
            result = memory(data, options)
        else:
            profile(data, options)
            result = compare(data, options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
