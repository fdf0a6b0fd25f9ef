"""Seconds of a query over a folder of images: with stored first passes, and with images that are read anew.

    python benchmarks/search.py                                # base size, 1,000 images, k = 32
    python benchmarks/search.py --keep 0.25 --start 7          # with less arithmetic in the second pass
    python benchmarks/search.py --nearest 100000               # what FAISS finds of the nearest of made-up [cls]

Weights are random, and of the images (JPEGs of 640 x 480) a few are encoded, under many names. The other side does
what `vlabs search` did before there was a store: it ranks by [cls], and decodes and encodes the k images at every
query, one at a time. The sides take turns in one process. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SIZES, VARIANTS, make_model
from PIL import Image

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.prediction.predictor import load_any, open_image
from vlabs.prediction.search import Search
from vlabs.ranking.nearest import Nearest
from vlabs.ranking.passes import FirstPasses
from vlabs.ranking.texts import encode_texts, score_texts
from vlabs.utils.files import content_sha256

ENCODED = 16  # images that are really encoded, before there is anything to measure
QUERY = "A large red square left of a small circle, and nothing else."


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEGs of which every `ENCODED`-th is the same image in another file."""
    draw = np.random.default_rng(0)
    contents = []
    for _ in range(min(ENCODED, count)):
        coarse = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    paths = [folder / f"{n:06}.jpg" for n in range(count)]
    for n, path in enumerate(paths):
        path.write_bytes(contents[n % len(contents)] + n.to_bytes(4, "big"))
    return paths


def fill(passes: FirstPasses, paths: list[Path], checkpoint: Checkpoint) -> None:
    """Encode the images that differ, and store their passes for all."""
    images = [checkpoint.preprocessing.image(open_image(path))[None] for path in paths[:ENCODED]]
    with torch.inference_mode():
        bottom_up = passes.vision.encode(torch.cat(images).to(next(passes.vision.parameters())))
    for n, path in enumerate(paths):
        row = n % len(images)
        passes.store.add(content_sha256(path), {name: getattr(bottom_up, name)[row] for name in passes.store.layout})
    passes.store.flush()


def seconds_of_decoders(search: Search, k: int) -> float:
    """Seconds of a query in which the decoders compute C_l z of its images, which the index does not hold."""
    topdown: Any = search.model.vision.topdown
    spent: list[float] = []
    if topdown is None:
        return 0.0
    prepare = topdown.prepare

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        prepared = prepare(*arguments)
        spent.append(time.perf_counter() - began)
        return prepared

    topdown.prepare = timed
    search.find(QUERY, k=k)
    del topdown.prepare
    return sum(spent)


@torch.inference_mode()
def anew(search: Search, k: int) -> list[float]:
    """A query as it was before: [cls] alone, and k images decoded, encoded and scored, one at a time."""
    texts = encode_texts(search.model, search.preprocessing, [QUERY])
    assert texts.prior is not None
    assert search.nearest is not None
    chosen = search.nearest.find(texts.prior, k)[1].tolist()
    only = torch.zeros(1, dtype=torch.int64)
    scores = []
    for n in chosen:
        image = search.preprocessing.image(open_image(search.pictures[n]))[None]
        image = image.to(next(search.model.parameters()).dtype)
        scores.append(float(score_texts(search.model, search.model.vision.encode(image), texts, only)[0]))
    return sorted(scores, reverse=True)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print seconds a query of all sides, and of the store's parts."""
    known = load_any("scenes_search", needs=("texts", "ranks")).preprocessing
    preprocessing = replace(known, image_size=SIZES[options.size].pixels)
    less = {name: value for name in ("keep", "start") if (value := getattr(options, name)) is not None}
    kinds: list[tuple[str, dict[str, Any], torch.dtype]] = [("anew", {}, torch.float32), ("store", {}, torch.float32)]
    kinds += [("store, less", less, torch.float32)] if less else []
    kinds += [("store, less, bfloat16" if less else "store, bfloat16", less, torch.bfloat16)]
    sides: dict[str, Callable[[], Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        paths = write_pictures(folder, options.pictures)
        for name, how, dtype in kinds:
            model = make_model(options.size, options.topdown, **how).to(dtype)
            checkpoint = Checkpoint(model, preprocessing, "retrieval", {}, folder / "made-up")
            if name != "store":  # the first two are of one model
                fill(FirstPasses(folder / "index", model.vision, preprocessing, torch.int8), paths, checkpoint)
            search = Search(checkpoint, paths, folder / "index")
            assert search.nearest is not None
            ask = partial(anew, search) if name == "anew" else partial(search.find, QUERY)
            sides[name] = partial(ask, k=options.k)
        kilobytes = search.kilobytes
        print(
            f"{options.size}, {options.topdown}, {options.pictures:,} pictures, {kilobytes:,.0f} kB each, "
            f"k = {options.k}, {options.repetitions} repetitions, {torch.get_num_threads()} threads, "
            f"load {os.getloadavg()[0]:.1f}"
        )
        times: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(options.repetitions + 1):  # the first is a warm-up
            for name, run in sides.items():
                began = time.perf_counter()
                run()
                if turn:
                    times[name].append(time.perf_counter() - began)
        prior = torch.randn(1, search.model.vision.width)
        began = time.perf_counter()
        search._shortlist(prior, options.k)
        shortlist = time.perf_counter() - began
        decoders = seconds_of_decoders(search, options.k)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    for name, seconds in medians.items():
        print(f"{name:24}{seconds:8.3f} s a query{medians['anew'] / seconds:8.2f} x")
    print(f"of the last row, the shortlist {shortlist:.3f} s, C_l z of the {options.k} images {decoders:.3f} s")
    ratios = {name: round(medians["anew"] / seconds, 2) for name, seconds in medians.items()}
    return {
        "seconds": medians,
        "ratios": ratios,
        "shortlist_seconds": shortlist,
        "decoder_seconds": decoders,
        "kilobytes": kilobytes,
    } | vars(options)


def nearest(count: int, width: int, queries: int = 100) -> dict[str, Any]:
    """Print what the first stage finds of the ten nearest of made-up vectors in clusters, and in what time."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.randn(max(1, count // 100), width, generator=draw)
    vectors = centers[torch.randint(len(centers), (count,), generator=draw)]
    vectors = vectors + torch.randn(count, width, generator=draw)
    asked = vectors[torch.randint(count, (queries,), generator=draw)]
    asked = asked + 0.5 * torch.randn(queries, width, generator=draw)
    began = time.perf_counter()
    result: dict[str, Any] = {"vectors": count, "width": width}
    found = {}
    for name, many in (("all", count + 1), ("faiss", 0)):
        built = Nearest(vectors, many)
        ready = time.perf_counter()
        found[name] = [built.find(one[None], 2000)[1] for one in asked]
        milliseconds = 1000 * (time.perf_counter() - ready) / queries
        result |= {f"{name}_seconds_to_build": ready - began, f"{name}_ms": milliseconds}
        began = time.perf_counter()
    for k in (10, 200, 2000):
        shares = [torch.isin(a[:10], b[:k]).float().mean() for a, b in zip(found["all"], found["faiss"], strict=True)]
        result[f"kept_{k}"] = 100 * float(torch.stack(shares).mean())
    kept = ", ".join(f"{result[f'kept_{k}']:.1f}% in its best {k:,}" for k in (10, 200, 2000))
    print(
        f"{count:,} vectors of {width}, a query: all compared {result['all_ms']:.0f} ms, FAISS "
        f"{result['faiss_ms']:.0f} ms (built in {result['faiss_seconds_to_build']:.0f} s), which has of the exact top "
        f"ten {kept}"
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="base")
    add("--topdown", choices=VARIANTS, default="absvit")
    add("--pictures", type=int, default=1000)
    add("--k", type=int, default=32)
    add("--keep", type=float, help="share of the patches in the second pass, for a side that does less")
    add("--start", type=int, help="the block with which the second pass begins, for the same")
    add("--repetitions", type=int, default=3)
    add("--nearest", type=int, help="made-up vectors of which the nearest are to be found, in the place of all that")
    add("--threads", type=int, help="of torch; its own choice if not given")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    width = SIZES[options.size].width
    print(json.dumps(compare(options) if options.nearest is None else nearest(options.nearest, width)))


if __name__ == "__main__":
    main()
