"""How much faster vlabs ranks one image with many captions, exactly, than the released arithmetic does.

    python benchmarks/ranking.py                        both sides, interleaved; the last line is JSON with the ratios
    python benchmarks/ranking.py --table --size small   seconds and hours of whole rankings, exact and shortlist
    python benchmarks/ranking.py --device cuda          pairs a second in bfloat16, share of the card's peak

Weights, image and captions are random; the captions have lengths as Flickr30K's do. The released arithmetic is the one
of `released_ranking.py`, in float32. Our time has everything in it: the image's bottom-up pass, the text encoder over
every caption, second pass and fusion of every pair. `less` is ours with a share of the patches and a later second pass
(`--keep`, `--start`), whose scores are not the exact ones. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from common import ALPHA, PRIOR_TOKEN, SIZES, Ledger, draw_texts, gmac, make_model
from released_ranking import ReleasedRanking
from torch import Tensor

from vlabs.data.preprocessing import Preprocessing
from vlabs.models.vlm import VisionLanguageModel
from vlabs.ranking.shortlist import Similarity, shortlist, similarities
from vlabs.ranking.texts import EncodedTexts, encode_texts, score_texts
from vlabs.utils.flops import flop_counter

CAPTION_LENGTH = 40  # the released code pads captions to this many tokens
MEAN_LENGTH, SHORTEST = 16, 6
PARTS = ("text", "bottom-up", "signal", "second pass", "reconstruction", "fusion")
FLICKR30K = (1000, 5000)  # images and captions of its test split


def draw_captions(count: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Token ids of captions: lengths log-normal around 16 tokens, from 6 to 40."""
    return draw_texts(count, vocabulary, MEAN_LENGTH, SHORTEST, CAPTION_LENGTH, 0.4, seed)


def make_rival(model: VisionLanguageModel, topdown: str) -> ReleasedRanking:
    """The released arithmetic with the same weights."""
    return ReleasedRanking(model, ALPHA[topdown], topdown, PRIOR_TOKEN[topdown], CAPTION_LENGTH)


class NumberTexts(Preprocessing):
    """Preprocessing of "texts" that are token ids written as numbers, so that no tokenizer is needed."""

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[int(number) for number in text.split()] for text in texts]


@dataclass
class Side:
    """One of the computations that are compared.

    Attributes:
        name: as printed.
        run: gives the scores of the captions, (M,).
        ledger: where its parts are booked.
        times: seconds of every repetition.
    """

    name: str
    run: Callable[[], Tensor]
    ledger: Ledger
    times: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def our_scores(
    model: VisionLanguageModel, image: Tensor, captions: list[list[int]], text_batch: int, batch_size: int
) -> Tensor:
    """vlabs' scores of one image (1, 3, H, W) with M captions, from pixels and token ids: (M,)."""
    texts = our_texts(model, captions, text_batch)
    with torch.inference_mode():
        bottom_up = model.vision.encode(image)
    return score_texts(model, bottom_up, texts, torch.arange(len(captions), device=image.device), batch_size)


def our_texts(model: VisionLanguageModel, captions: list[list[int]], text_batch: int) -> EncodedTexts:
    """`encode_texts` of token ids."""
    preprocessing = NumberTexts(image_size=0, tokenizer="", max_length=CAPTION_LENGTH)
    return encode_texts(model, preprocessing, [" ".join(map(str, ids)) for ids in captions], text_batch)


def our_side(name: str, model: VisionLanguageModel, image: Tensor, captions: list[list[int]], options: Options) -> Side:
    """Ours, with its parts watched."""
    ledger = Ledger()
    ledger.watch(model.text, "forward", "text")
    ledger.watch(model.vision, "encode", "bottom-up")
    ledger.watch(model.vision, "attend", "second pass")
    ledger.watch(model.vision.topdown, "prepare", "signal")
    ledger.watch(model.vision.topdown, "signal", "signal")
    ledger.watch(model.fusion, "forward", "fusion")
    image = image.to(next(model.parameters()).dtype)
    return Side(
        name, lambda: our_scores(model, image, captions, options.text_batch_size, options.batch_size), ledger, []
    )


def rival_side(rival: ReleasedRanking, image: Tensor, captions: list[list[int]], options: Options) -> Side:
    """The released arithmetic, with its parts watched."""
    ledger = Ledger()
    for method, part in (
        ("encode_text", "text"),
        ("bottom_up", "bottom-up"),
        ("feedback", "signal"),
        ("top_down_value", "signal"),
        ("second_pass", "second pass"),
        ("reconstruct", "reconstruction"),
        ("fuse", "fusion"),
    ):
        ledger.watch(rival, method, part)
    return Side("released", lambda: rival.scores(image, captions, options.rival_batch_size), ledger, [])


def compare(options: Options) -> dict[str, Any]:
    """Time the released arithmetic and ours in turn; print where the work and the time go; return the ratios."""
    size = SIZES[options.size]
    image = torch.randn(1, 3, size.pixels, size.pixels)
    captions = draw_captions(options.captions, size.vocabulary)
    lengths = [len(ids) for ids in captions]
    print(
        f"{options.size}, {options.topdown}: 1 image x {len(captions)} captions of {statistics.mean(lengths):.1f} "
        f"tokens on average ({min(lengths)} to {max(lengths)}), {options.repetitions} repetitions, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    make_less = partial(make_model, options.size, options.topdown, start=options.start, keep=options.keep)
    sides = [
        rival_side(make_rival(make_model(options.size, options.topdown), options.topdown), image, captions, options),
        our_side("ours", make_model(options.size, options.topdown), image, captions, options),
        our_side("ours bf16", make_model(options.size, options.topdown).bfloat16(), image, captions, options),
        our_side("less", make_less(), image, captions, options),
        our_side("less bf16", make_less().bfloat16(), image, captions, options),
    ]
    scores = []
    for side in sides:  # the warm-up
        with side.ledger.counting():
            scores.append(side.run())
        side.ledger.clear_seconds()
    for _ in range(options.repetitions):
        for side in sides:
            started = time.perf_counter()
            side.run()
            side.times.append(time.perf_counter() - started)
    print_parts(sides, len(captions))
    released, ours, ours_bf16, less_side, less_bf16 = sides
    return {
        "ratio_float32": round(released.median / ours.median, 3),
        "ratio_bfloat16": round(released.median / ours_bf16.median, 3),
        "ratio_less_float32": round(released.median / less_side.median, 3),
        "ratio_less_bfloat16": round(released.median / less_bf16.median, 3),
        "less_to_exact_float32": round(ours.median / less_side.median, 3),
        "less_to_exact_bfloat16": round(ours_bf16.median / less_bf16.median, 3),
        "difference_float32": float((scores[1] - scores[0]).abs().max()),
        "difference_bfloat16": float((scores[2] - scores[1]).abs().max()),
        "correlation_bfloat16": float(torch.corrcoef(torch.stack(scores[1:3]))[0, 1]),
        "deviation_of_scores": float(scores[1].std()),
        "spread_of_times": [round(max(side.times) / min(side.times), 2) for side in sides],
        "size": options.size,
        "topdown": options.topdown,
        "keep": options.keep,
        "start": options.start,
        "captions": len(captions),
        "repetitions": options.repetitions,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def print_parts(sides: Sequence[Side], pairs: int) -> None:
    """Multiply-adds a pair and share of the released time, part by part, and the rate at which each side works."""
    whole = statistics.mean(sides[0].times)
    print("\n" + f"{'':16}" + "".join(f"{side.name:>22}" for side in sides))
    print(f"{'':16}" + f"{'GMAC/pair':>12}{'time':>10}" * len(sides))
    for part in PARTS:
        cells = ""
        for side in sides:
            seconds = side.ledger.seconds[part] / len(side.times)
            cells += f"{gmac(side.ledger.flops[part]) / pairs:12.3f}{seconds / whole:10.1%}"
        print(f"{part:16}{cells}")
    totals = [sum(side.ledger.flops.values()) for side in sides]
    print(
        f"{'all':16}"
        + "".join(
            f"{gmac(total) / pairs:12.3f}{statistics.mean(side.times) / whole:10.1%}"
            for side, total in zip(sides, totals, strict=True)
        )
    )
    print(
        f"{'GFLOP/s':16}"
        + "".join(f"{total / side.median / 1e9:22.0f}" for side, total in zip(sides, totals, strict=True))
    )
    print("\nThe times are shares of the released time. Ratio = less arithmetic x rate:")
    for side, total in list(zip(sides, totals, strict=True))[1:]:
        rate = total / side.median / (totals[0] / sides[0].median)
        print(f"  {side.name}: {totals[0] / total:.2f} x {rate:.2f}")
    print()


@dataclass
class Rates:
    """Seconds that a ranking takes for each thing in it."""

    image: float
    text: float
    pair: float

    def hours(self, images: int, texts: int, pairs: int) -> float:
        """Hours for so many."""
        return (images * self.image + texts * self.text + pairs * self.pair) / 3600


@torch.inference_mode()
def rank(
    model: VisionLanguageModel, images: Tensor, captions: list[list[int]], options: Options, k: int | None = None
) -> tuple[Rates, float, int]:
    """Score N images (N, 3, H, W) with M captions: the rates, all seconds, and the pairs that were scored.

    Args:
        k: score only the shortlist, each image's k best captions and each caption's k best images by how like ξ their
            [cls] and their patches are.
    """
    synchronize = torch.cuda.synchronize if images.device.type == "cuda" else lambda: None
    marks = [time.perf_counter()]

    def mark() -> None:
        synchronize()
        marks.append(time.perf_counter())

    texts = our_texts(model, captions, options.text_batch_size)
    mark()
    passes = [model.vision.encode(image[None]) for image in images]
    mark()
    wanted = [np.arange(len(captions))] * len(images)
    if k is not None:
        assert texts.prior is not None
        patches = torch.cat([one.tokens for one in passes])[:, model.vision.num_prefix_tokens :]
        like = similarities(torch.cat([one.cls for one in passes]), patches, texts.prior)
        wanted = shortlist(Similarity(*(part.cpu().numpy() for part in like)).blocks(), k)
    mark()
    for bottom_up, chosen in zip(passes, wanted, strict=True):
        score_texts(model, bottom_up, texts, torch.from_numpy(chosen).to(images.device), options.batch_size)
    mark()
    pairs = sum(map(len, wanted))
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    rates = Rates(seconds[1] / len(images), seconds[0] / len(captions), seconds[3] / pairs)
    return rates, sum(seconds), pairs


def table(options: Options) -> dict[str, Any]:
    """Print seconds of whole rankings, and what their rates give for Flickr30K's 1,000 images and 5,000 captions."""
    model = make_model(options.size, options.topdown).to(options.torch_dtype)
    size = SIZES[options.size]
    images, captions = FLICKR30K
    at_most = min(images * captions, (images + captions) * options.k)
    print(
        f"{options.size}, {options.topdown}, {options.dtype}, k = {options.k}, on this machine's {os.cpu_count()} CPU "
        f"cores ({torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f})\n"
        f"hours: {images:,} images x {captions:,} captions at the row's rates, all {images * captions:,} pairs or at "
        f"most {at_most:,} of a shortlist\n"
    )
    print(
        f"{'size':>10}{'exact s':>10}{'pairs':>8}{'shortlist s':>13}{'pairs':>8}{'s/image':>10}{'s/text':>10}"
        f"{'s/pair':>10}{'exact h':>10}{'shortlist h':>13}"
    )
    rows = []
    for index, (n, m) in enumerate(options.sizes):
        pictures = torch.randn(n, 3, size.pixels, size.pixels, dtype=options.torch_dtype)
        drawn = draw_captions(m, size.vocabulary)
        if index == 0:
            rank(model, pictures[:1], drawn[: options.batch_size], options)  # the warm-up
        rates, exact, pairs = rank(model, pictures, drawn, options)
        _, short, kept = rank(model, pictures, drawn, options, options.k)
        hours = rates.hours(images, captions, images * captions), rates.hours(images, captions, at_most)
        print(
            f"{f'{n}x{m}':>10}{exact:10.2f}{pairs:8}{short:13.2f}{kept:8}{rates.image:10.4f}{rates.text:10.4f}"
            f"{rates.pair:10.4f}{hours[0]:10.1f}{hours[1]:13.2f}",
            flush=True,
        )
        rows.append(
            {
                "images": n,
                "captions": m,
                "exact_s": exact,
                "shortlist_s": short,
                "exact_h": hours[0],
                "shortlist_h": hours[1],
            }
        )
    return {"table": rows, "cpu_cores": os.cpu_count(), "size": options.size, "dtype": options.dtype, "k": options.k}


def throughput(options: Options, device: torch.device) -> dict[str, Any]:
    """Pairs a second, share of the peak, and minutes for Flickr30K's test: the released arithmetic, ours, and less.

    Ours and less rank at least `options.pairs` pairs; the released side, in float32, as many of one image as 2,000.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    exact = _rate_of(make_model(options.size, options.topdown), options, device)
    less = _rate_of(make_model(options.size, options.topdown, start=options.start, keep=options.keep), options, device)
    released = _released_rate(options, device)
    print(f"{name}: {options.size}, {options.topdown}, {options.dtype}, {exact['pairs']:,} pairs\n")
    print(f"{'':10}{'pairs/s':>10}{'GMAC/pair':>11}{'TFLOP/s':>9}{'of peak':>9}{'minutes':>9}")
    for side, row in (("released", released), ("ours", exact), ("less", less)):
        print(
            f"{side:10}{row['pairs_per_second']:10,.1f}{row['gmac']:11.1f}{row['tflops']:9.2f}"
            f"{row['share_of_peak']:9.1%}{row['minutes_1000x5000']:9.1f}"
        )
    print(f"\nminutes: for {FLICKR30K[0]:,} images x {FLICKR30K[1]:,} captions; the released side is in float32")
    chosen = {name: getattr(options, name) for name in ("size", "topdown", "dtype", "keep", "start")}
    return {"device": name, **exact, "less": less, "released": released, **chosen}


def _rate_of(model: VisionLanguageModel, options: Options, device: torch.device) -> dict[str, Any]:
    model = model.to(device, options.torch_dtype)
    size = SIZES[options.size]
    captions = draw_captions(min(FLICKR30K[1], options.pairs), size.vocabulary)
    count = -(-options.pairs // len(captions))
    images = torch.randn(count, 3, size.pixels, size.pixels, dtype=options.torch_dtype, device=device)
    with flop_counter() as counter:  # the warm-up: every length that comes has been seen
        rank(model, images[:1], captions, options)
    rates, _, pairs = rank(model, images, captions, options)
    # Every image after the first costs the same; its texts are encoded once for all.
    with flop_counter() as text_counter:
        our_texts(model, captions, options.text_batch_size)
    per_pair = (counter.get_total_flops() - text_counter.get_total_flops()) / len(captions)
    minutes = 60 * rates.hours(*FLICKR30K, FLICKR30K[0] * FLICKR30K[1])
    return _row(pairs, per_pair, rates.pair + rates.image / len(captions), minutes, options)


def _released_rate(options: Options, device: torch.device) -> dict[str, Any]:
    rival = make_rival(make_model(options.size, options.topdown).to(device), options.topdown)
    size = SIZES[options.size]
    captions = draw_captions(min(2000, options.pairs), size.vocabulary)
    image = torch.randn(1, 3, size.pixels, size.pixels, device=device)
    first = captions[: options.rival_batch_size]
    with torch.inference_mode(), flop_counter() as counter:  # the warm-up
        rival.scores(image, first, options.rival_batch_size)
    started = time.perf_counter()
    with torch.inference_mode():
        rival.scores(image, captions, options.rival_batch_size).cpu()
    seconds = (time.perf_counter() - started) / len(captions)
    minutes = seconds * FLICKR30K[0] * FLICKR30K[1] / 60
    return _row(len(captions), counter.get_total_flops() / len(first), seconds, minutes, options)


def _row(pairs: int, flops: float, seconds: float, minutes: float, options: Options) -> dict[str, Any]:
    rate = flops / seconds / 1e12
    return {
        "pairs": pairs, "pairs_per_second": 1 / seconds, "gmac": flops / 2e9, "tflops": rate,
        "share_of_peak": rate / options.peak_tflops, "minutes_1000x5000": minutes,
    }  # fmt: skip


@dataclass
class Options:
    """The command line, see `parse`."""

    size: str
    topdown: str
    keep: float
    start: int
    captions: int
    repetitions: int
    threads: int | None
    batch_size: int
    text_batch_size: int
    rival_batch_size: int
    table: bool
    sizes: list[tuple[int, int]]
    k: int
    dtype: str
    throughput: bool
    device: str
    pairs: int
    peak_tflops: float

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="base", help="base: ViT-B/16 at 224 px, RoBERTa-base, 6 fusion layers")
    add("--topdown", choices=ALPHA, default="absvit_released", help="modulation of both sides")
    add("--keep", type=float, default=0.25, help="of less: share of the patches")
    add("--start", type=int, default=1, help="of less: the block with which the second pass begins")
    add("--captions", type=int, default=32, help="captions of the one image")
    add("--repetitions", type=int, default=5)
    add("--threads", type=int, help="of torch; its own choice if not given")
    add("--batch-size", type=int, help="our pairs at a time (default 8, on a GPU 256)")
    add("--text-batch-size", type=int, help="our texts at a time (default 16, on a GPU 256)")
    add("--rival-batch-size", type=int, default=16, help="the released side's pairs at a time")
    add("--table", action="store_true", help="seconds of whole rankings instead, exact and shortlist")
    sizes = [(1, 32), (2, 64), (4, 64), (8, 128)]
    add("--sizes", nargs="+", type=images_by_captions, default=sizes, help="of --table, e.g. 1x32 8x128")
    add("--k", type=int, default=32, help="of --table: length of the shortlist")
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="of --table and --throughput (default float32, on a GPU bfloat16)",
    )
    add("--throughput", action="store_true", help="pairs a second of all sides instead; always so on a GPU")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--pairs", type=int, default=50_000, help="of --throughput: at least so many")
    add("--peak-tflops", type=float, default=989.0, help="of --throughput: dense bfloat16 peak (989: H100)")
    options = Options(**vars(parser.parse_args(arguments)))
    cuda = options.device == "cuda"
    options.throughput = options.throughput or cuda
    if cuda and options.table:
        parser.error("--table is of the CPU")
    options.dtype = options.dtype or ("bfloat16" if cuda else "float32")
    options.batch_size = options.batch_size or (256 if cuda else 8)
    options.text_batch_size = options.text_batch_size or (256 if cuda else 16)
    return options


def images_by_captions(text: str) -> tuple[int, int]:
    """Read `8x128`."""
    images, captions = text.split("x")
    return int(images), int(captions)


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.throughput:
        result = throughput(options, torch.device(options.device))
    elif options.table:
        result = table(options)
    else:
        result = compare(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
