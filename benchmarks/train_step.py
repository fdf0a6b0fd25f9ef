"""How much faster vlabs trains on VQA than the released arithmetic does.

    python benchmarks/train_step.py                 both sides, interleaved; the last line is JSON with the ratios
    python benchmarks/train_step.py --table         cost by image size, batch and fusion depth, and a plot
    python benchmarks/train_step.py --parts         where the time of our step goes
    python benchmarks/train_step.py --device cuda   questions a second, share of the card's peak, memory

A step is forward, backward and AdamW, on random weights, images and questions of real lengths, without dropout. The
released arithmetic is the one of `released_training.py`; `less` is ours with a share of the patches and a later second
pass (`--keep`, `--start`). k is `data.questions_per_image`: k questions of an image share
its first pass. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ALPHA, PRIOR_TOKEN, SIZES, Ledger, draw_texts, gmac, make_model
from released_training import ReleasedTraining
from torch import Tensor

from vlabs.data.preprocessing import Preprocessing
from vlabs.data.vqa import VQABatch
from vlabs.models.heads import VQAHead
from vlabs.tasks.optim import PARTS, Recipe
from vlabs.tasks.vqa import VQATask
from vlabs.utils.flops import flop_counter

# Tokens of VQA v2's questions with RoBERTa's vocabulary, <s> and </s> included.
MEAN_LENGTH, SHORTEST, LONGEST, DEVIATION = 9.2, 5, 25, 0.27
# Nothing is learned, so that all steps are of the same weights; AdamW does all of its work.
_RECIPE = Recipe(lr=dict.fromkeys(PARTS, 0.0))
ANSWERS = {"base": 3129, "small": 3129, "mini": 50}
PAD = 1


def make_batch(size: str, questions: int, k: int, pixels: int | None = None, device: str = "cpu") -> VQABatch:
    """`questions` questions, k about each image."""
    torch.manual_seed(1)
    side, vocabulary, answers = pixels or SIZES[size].pixels, SIZES[size].vocabulary, ANSWERS[size]
    images = torch.randn(-(-questions // k), 3, side, side)
    texts = draw_texts(questions, vocabulary, MEAN_LENGTH, SHORTEST, LONGEST, DEVIATION)
    longest = max(map(len, texts))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in texts])
    index = torch.arange(questions) // k
    targets = torch.zeros(questions, answers)
    targets[torch.arange(questions), torch.randint(answers, (questions,))] = 1.0
    targets[torch.arange(questions), torch.randint(answers, (questions,))] = 0.3
    return VQABatch(
        images=images.to(device),
        input_ids=ids.to(device),
        attention_mask=(ids != PAD).long().to(device),
        image_index=index.to(device) if k > 1 else None,
        image_ids=index.to(device),
        targets=targets.to(device),
        coverage=None,
        question_ids=[],
        questions=[],
        answer_types=[],
        question_types=[],
        answers=[],
        skipped=[],
    )


@dataclass
class Side:
    """One of the computations that are compared.

    Attributes:
        name: as printed.
        loss: of one batch.
        optimizer: of its weights.
        owner: of the weights: the task or the released arithmetic.
        autocast: bfloat16 as Lightning's `bf16-mixed` has it.
        flops: of forward and backward, once warmed up.
        times: seconds of every repetition.
    """

    name: str
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    owner: Any
    autocast: bool = False
    flops: int = 0
    times: list[float] = field(default_factory=list)

    def forward(self) -> Tensor:
        """The loss."""
        device = self.optimizer.param_groups[0]["params"][0].device.type
        with torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext():
            return self.loss()

    def update(self) -> None:
        """The optimizer's part."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> Tensor:
        """Forward, backward, optimizer."""
        loss = self.forward()
        loss.backward()  # type: ignore[no-untyped-call]
        self.update()
        return loss.detach()

    def warm_up(self) -> Tensor:
        """The loss of a first step, whose arithmetic is counted."""
        with flop_counter() as counter:
            loss = self.step()
        self.flops = counter.get_total_flops()
        return loss

    def repeat(self) -> None:
        """Time one more step."""
        started = time.perf_counter()
        if self.step().is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter() - started)

    def measure(self, repetitions: int) -> None:
        """A warm-up and so many timed steps."""
        self.warm_up()
        for _ in range(repetitions):
            self.repeat()

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def our_side(
    name: str,
    options: Options,
    batch: VQABatch,
    autocast: bool = False,
    other: Side | None = None,
    start: int = 1,
    keep: float = 1.0,
    **sizes: int,
) -> Side:
    """vlabs' task on one batch.

    Args:
        other: a side whose weights and moments are to be used, to save memory.
        start, keep: of the image encoder, see `AbSViT`.
        sizes: as of `make_model`.
    """
    if other is None:
        head = partial(VQAHead, num_answers=ANSWERS[options.size])
        model = make_model(options.size, options.topdown, head, dropout=0.0, **sizes)
        task = VQATask(model, Preprocessing(image_size=0, tokenizer=""), {}, _RECIPE, alive_prior_weight=0.0)
        task.to(batch.images.device).train()
        optimizer: torch.optim.Optimizer = _RECIPE.optimizer(task, task.lr_group)
    else:
        task, optimizer = other.owner, other.optimizer

    vision = task.model.vision

    def loss() -> Tensor:
        vision.start, vision.keep = start, keep  # it has all decoders
        total: Tensor = task.total(task.losses(batch))
        return total

    return Side(name, loss, optimizer, task, autocast)


def rival_side(name: str, options: Options, batch: VQABatch, autocast: bool = False, other: Side | None = None) -> Side:
    """The released arithmetic on the same questions: an image for each of them, text padded to 50."""
    if other is None:
        head = partial(VQAHead, num_answers=ANSWERS[options.size])
        model = make_model(options.size, options.topdown, head, dropout=0.0).to(batch.images.device)
        rival = ReleasedTraining(model, ALPHA[options.topdown], options.topdown, PRIOR_TOKEN[options.topdown])
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(rival.parameters(), lr=0.0)
    else:
        rival, optimizer = other.owner, other.optimizer
    texts = [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
    ids, mask = rival.pad(texts)
    index = batch.image_index
    images = batch.images if index is None else batch.images[index]
    loss = partial(rival.loss, images, ids, mask, batch.image_ids, batch.targets)
    return Side(name, loss, optimizer, rival, autocast)


def compare(options: Options) -> dict[str, Any]:
    """Time both sides in turn; print the work and the time; return the ratios."""
    batches = {k: make_batch(options.size, options.questions, k) for k in (1, 4)}
    lengths = batches[1].attention_mask.sum(dim=1).float()
    print(
        f"{options.size}, {options.topdown}: {options.questions} questions a step, of {lengths.mean():.1f} tokens on "
        f"average, {options.repetitions} repetitions, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}"
    )
    released = rival_side("released k=1", options, batches[1])
    ours = our_side("ours k=1", options, batches[1])
    released_4 = rival_side("released k=4", options, batches[4], other=released)
    ours_4 = our_side("ours k=4", options, batches[4], other=ours)
    ours_4_bf16 = our_side("ours k=4 bf16", options, batches[4], autocast=True, other=ours)
    less = partial(our_side, options=options, batch=batches[4], other=ours, start=options.start, keep=options.keep)
    less_4, less_4_bf16 = less("less k=4"), less("less k=4 bf16", autocast=True)
    sides = [released, ours, released_4, ours_4, ours_4_bf16, less_4, less_4_bf16]
    losses = [float(side.warm_up()) for side in sides]
    for _ in range(options.repetitions):
        for side in sides:
            side.repeat()
    slowest = max(side.median for side in sides)
    print(f"\n{'':16}{'GMAC/question':>16}{'time':>8}{'GFLOP/s':>10}{'first loss':>12}")
    for side, loss in zip(sides, losses, strict=True):
        print(
            f"{side.name:16}{gmac(side.flops) / options.questions:16.1f}{side.median / slowest:8.1%}"
            f"{side.flops / side.median / 1e9:10.0f}{loss:12.4f}"
        )
    print(
        f"\nratio = less arithmetic x rate: {released.flops / ours.flops:.2f} x "
        f"{ours.flops / ours.median / (released.flops / released.median):.2f} at k=1, "
        f"{released_4.flops / ours_4.flops:.2f} x "
        f"{ours_4.flops / ours_4.median / (released_4.flops / released_4.median):.2f} at k=4"
    )
    for side in sides:  # their memory is needed
        del side.owner, side.optimizer, side.loss
    peaks = {side: peak_memory(side, options) for side in ("ours", "released")}
    print(f"peak memory at k=1: {peaks['ours']:.2f} GiB ours, {peaks['released']:.2f} GiB released\n")
    return {
        "ratio_float32_k1": round(released.median / ours.median, 3),
        "ratio_float32_k4": round(released_4.median / ours_4.median, 3),
        "ratio_bfloat16_k4": round(released_4.median / ours_4_bf16.median, 3),
        "ratio_less_float32_k4": round(released_4.median / less_4.median, 3),
        "ratio_less_bfloat16_k4": round(released_4.median / less_4_bf16.median, 3),
        "memory_ratio_k1": round(peaks["ours"] / peaks["released"], 3),
        "difference_of_loss": max(abs(losses[0] - losses[1]), abs(losses[2] - losses[3])),
        "size": options.size,
        "topdown": options.topdown,
        "keep": options.keep,
        "start": options.start,
        "questions": options.questions,
        "repetitions": options.repetitions,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
    }


def parts(options: Options) -> dict[str, Any]:
    """Where the time of our step goes: forward and backward of every part, and the optimizer; k = 4, on a CPU.

    Autograd goes through the parts in the reverse order of the forward pass: in the backward pass a part's time begins
    when the gradient of its output is there, and ends when that of the part before it is.
    """
    batch = make_batch(options.size, options.questions, 4)
    side = our_side("ours", options, batch, options.dtype == "bfloat16")
    model, ledger = side.owner.model, Ledger()

    def watch(owner: Any, method: str, part: str, state: Callable[[Any], Tensor]) -> None:
        original = getattr(owner, method)

        def watched(*arguments: Any, **choices: Any) -> Any:
            with ledger.part(f"{part}, forward"):
                output = original(*arguments, **choices)
            state(output).register_hook(lambda _: ledger.switch(f"{part}, backward"))
            return output

        owner.__dict__[method] = watched

    watch(model.vision, "encode", "first pass", lambda bottom_up: bottom_up.tokens)
    watch(model.text, "forward", "text", lambda states: states)
    watch(model.vision, "attend", "second pass", lambda seen: seen.tokens)
    watch(model.fusion, "forward", "fusion", lambda fused: fused.pooled)

    def step() -> None:
        with ledger.part("head and losses, forward"):
            loss = side.forward()
        with ledger.part("head and losses, backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with ledger.part("optimizer"):
            side.update()

    with ledger.counting():
        step()
    ledger.clear_seconds()
    for _ in range(options.repetitions):
        step()
    whole, work = sum(ledger.seconds.values()), sum(ledger.flops.values())
    print(
        f"{options.size}, {options.topdown}, {options.dtype}, k=4, {options.questions} questions a step, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}\n\n{'':28}{'GMAC/question':>16}{'time':>8}"
    )
    for name in [*ledger.seconds]:
        count = gmac(ledger.flops[name]) / options.questions
        print(f"{name:28}{count:16.1f}{ledger.seconds[name] / whole:8.1%}")
    print(f"{'all':28}{gmac(work) / options.questions:16.1f}{1:8.1%}\n")
    shares = {name: round(seconds / whole, 4) for name, seconds in ledger.seconds.items()}
    return {"share_of_time": shares, "gmac": {name: gmac(count) for name, count in ledger.flops.items()}}


def compiled(options: Options) -> dict[str, Any]:
    """Our step with and without `task.compile`, in turn, and what compiling takes at the start."""
    batch = make_batch(options.size, options.questions, 4, device=options.device)
    plain = our_side("plain", options, batch, options.dtype == "bfloat16")
    other = our_side("compiled", options, batch, options.dtype == "bfloat16")
    other.owner.model.compile_parts()
    losses = [float(plain.step())]
    started = time.perf_counter()
    losses.append(float(other.step()))
    start = time.perf_counter() - started
    for _ in range(options.repetitions):
        for side in (plain, other):
            side.repeat()
    print(
        f"{options.size}, {options.topdown}, {options.dtype}, k=4, {options.questions} questions a step, "
        f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}: the first compiled step takes as long as "
        f"{start / plain.median:.0f} plain ones\n"
    )
    return {
        "ratio_compiled": round(plain.median / other.median, 3),
        "start_in_steps": round(start / plain.median, 1),
        "difference_of_loss": abs(losses[0] - losses[1]),
    }


def peak_memory(side: str, options: Options) -> float:
    """Peak resident memory in GiB of a process that makes two steps of one side."""
    command = [sys.executable, __file__, "--memory-of", side, "--size", options.size, "--topdown", options.topdown]
    command += ["--questions", str(options.questions), "--threads", str(torch.get_num_threads())]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{result.stderr}")
    return float(result.stdout.splitlines()[-1])


def measure_memory(options: Options) -> float:
    """Two steps at k = 1 of the side that `--memory-of` names, and the peak of this process in GiB."""
    make = our_side if options.memory_of == "ours" else rival_side
    side = make(options.memory_of or "", options, make_batch(options.size, options.questions, 1))
    side.step()
    side.step()
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**20


def table(options: Options) -> dict[str, Any]:
    """Cost of our step as the work grows: by image, batch, fusion depth and text; prints a table, draws a plot.

    Times are those of the first value of their kind = 1.
    """
    print(
        f"{options.size}, {options.topdown}, {options.dtype}, k=1, {torch.get_num_threads()} threads of "
        f"{os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}\n"
    )
    print(f"{'':14}{'value':>8}{'GMAC/question':>16}{'time/question':>16}{'GFLOP/s':>10}")
    rows = []
    sweeps: list[tuple[str, Sequence[int]]] = [
        ("pixels", options.pixels),
        ("batch", options.batches),
        ("fusion_depth", options.depths),
        ("tokens", options.tokens),
    ]
    for name, values in sweeps:
        first = 0.0
        for value in values:
            sizes = {} if name in ("batch", "tokens") else {name: value}
            questions = value if name == "batch" else options.questions
            batch = make_batch(options.size, questions, 1, sizes.get("pixels"))
            if name == "tokens":
                ids = torch.full((questions, value), 7)
                batch = batch._replace(input_ids=ids, attention_mask=torch.ones_like(ids))
            side = our_side("ours", options, batch, options.dtype == "bfloat16", None, **sizes)
            side.measure(options.repetitions)
            flops, seconds = side.flops / questions, side.median / questions
            first = first or seconds
            rows.append({"what": name, "value": value, "gmac": gmac(int(flops)), "time": seconds / first})
            print(
                f"{name:14}{value:8}{gmac(int(flops)):16.1f}{seconds / first:16.2f}{flops / seconds / 1e9:10.0f}",
                flush=True,
            )
    if options.plot is not None:
        plot(rows, options.plot)
        print(f"\n{options.plot}")
    return {"table": rows, "size": options.size, "topdown": options.topdown, "dtype": options.dtype}


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Cost of a question against image size, batch, fusion depth and text length, each against its first value."""
    from matplotlib.figure import Figure

    titles = {"pixels": "image size (px)", "batch": "questions a step", "fusion_depth": "fusion layers"}
    titles["tokens"] = "tokens a question, padding included"
    figure = Figure(figsize=(12, 3), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, 4), titles.items(), strict=True):
        chosen = [row for row in rows if row["what"] == name]
        for key, label in (("time", "time"), ("gmac", "arithmetic")):
            if chosen:
                values = [row[key] / chosen[0][key] for row in chosen]
                axis.plot([row["value"] for row in chosen], values, marker="o", label=label)
        if name == "batch":
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:.0f}")
        axis.set_xlabel(title)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("a question, first value = 1")
    figure.axes[0].legend(frameon=False)
    partial_path = path.with_suffix(f".partial{path.suffix}")
    figure.savefig(partial_path, dpi=150)
    partial_path.replace(path)


def throughput(options: Options, device: torch.device) -> dict[str, Any]:
    """Questions a second of all sides in bfloat16 for several batches, share of the peak, and memory."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    print(f"{name}: {options.size}, {options.topdown}, bfloat16 autocast\n")
    print(f"{'':14}{'batch':>7}{'k':>4}{'questions/s':>13}{'TFLOP/s':>9}{'of peak':>9}{'GiB':>7}")
    rows = []
    for batch_size in options.batches:
        for k in (1, 4):
            batch = make_batch(options.size, batch_size, k, device=str(device))
            less = partial(our_side, start=options.start, keep=options.keep)
            for side_name, make in (("ours", our_side), ("less", less), ("released", rival_side)):
                if cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                side = make(side_name, options, batch, True)
                side.measure(options.repetitions)
                flops = side.flops / side.median / 1e12
                memory = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
                row = {
                    "side": side_name, "batch": batch_size, "k": k, "questions_per_second": batch_size / side.median,
                    "tflops": flops, "share_of_peak": flops / options.peak_tflops, "gib": memory,
                }  # fmt: skip
                rows.append(row)
                print(
                    f"{side_name:14}{batch_size:7}{k:4}{batch_size / side.median:13.1f}{flops:9.1f}"
                    f"{flops / options.peak_tflops:9.1%}{memory:7.1f}",
                    flush=True,
                )
                del side
    return {"device": name, "size": options.size, "topdown": options.topdown, "rows": rows}


@dataclass
class Options:
    """The command line, see `parse`."""

    size: str
    topdown: str
    keep: float
    start: int
    questions: int
    repetitions: int
    threads: int | None
    memory_of: str | None
    table: bool
    pixels: list[int]
    batches: list[int]
    depths: list[int]
    tokens: list[int]
    compile: bool
    parts: bool
    dtype: str
    plot: Path | None
    throughput: bool
    device: str
    peak_tflops: float


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", choices=SIZES, default="base", help="base: ViT-B/16 at 224 px, RoBERTa-base, 6 fusion layers")
    add("--topdown", choices=ALPHA, default="absvit", help="modulation of both sides")
    add("--keep", type=float, default=0.25, help="of less: share of the patches")
    add("--start", type=int, default=1, help="of less: the block with which the second pass begins")
    add("--questions", type=int, default=4, help="questions a step")
    add("--repetitions", type=int, default=5)
    add("--threads", type=int, help="of torch; its own choice if not given")
    add("--memory-of", choices=["ours", "released"], help="print the peak memory of one side instead")
    add("--table", action="store_true", help="cost as the work grows instead")
    add("--pixels", type=int, nargs="*", default=[224, 288, 384, 576], help="of --table")
    add("--batches", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], help="of --table and --throughput")
    add("--tokens", type=int, nargs="*", default=[9, 16, 32, 50], help="of --table")
    add("--depths", type=int, nargs="*", default=[2, 4, 6, 8], help="of --table")
    add("--compile", action="store_true", help="with and without task.compile instead")
    add("--parts", action="store_true", help="where the time of our step goes instead")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of --table, --compile and --parts")
    add("--plot", type=Path, help="of --table: where the plot goes")
    add("--throughput", action="store_true", help="questions a second of all sides instead")
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda: of --throughput, which it implies, and --compile",
    )
    add("--peak-tflops", type=float, default=989.0, help="of --throughput: dense bfloat16 peak (989: H100)")
    return Options(**vars(parser.parse_args(arguments)))


def main() -> None:
    options = parse()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.memory_of is not None:
        print(measure_memory(options))
        return
    if options.throughput or (options.device == "cuda" and not options.compile):
        result = throughput(options, torch.device(options.device))
    else:
        chosen = table if options.table else compiled if options.compile else parts if options.parts else compare
        result = chosen(options)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
