"""Evaluation of an image encoder's inside: where its attention goes to waste, and which of its heads count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from torch import Tensor, nn

from vlabs.attention.gradients import recording
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.images import ImageReader
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.grounding import all_texts
from vlabs.evaluation.judging import Scores
from vlabs.evaluation.results import Results
from vlabs.models.vlm import VisionLanguageModel
from vlabs.utils.options import Size

OUTLYING = 3.0
"""Deviations above the mean from which on the norm of a token is outlying."""


class ProbesEvaluation(Evaluation):
    """Sinks and heads of the image encoder, over questions.

    Sinks are tokens with a norm above mean + 3 deviations of the tokens of their image, after the attention of a block.
    Measured is the share of the attention of that block that goes to them, and of the fusion's attention from text to
    image for those of the last block; a uniform attention would give them their share of the tokens.

    A head counts if answers get worse when its output is its mean over the questions and tokens, in both passes.

    Args:
        num_texts: questions that are measured, evenly spread; None for all.
        batch_size: questions per batch.
    """

    name = "probes"
    needs = ("texts", "one image", "answers")
    reads = VQADataModule

    def __init__(self, num_texts: Size | None = 200, batch_size: Size = 64) -> None:
        self.num_texts, self.batch_size = num_texts, batch_size

    def measure(self, checkpoint: Checkpoint, data: VQADataModule, results: Results) -> None:
        """See `Evaluation`.

        The metrics are, in percent: for every block `sinks/BLOCK/attention`, and for the fusion's layers
        `sinks/fusion LAYER/attention`, with `…/tokens`, the share of the tokens; and `heads/BLOCK/HEAD`, by how many
        points the accuracy falls without the head.

        Raises:
            UserError: the answers are kept back, or the encoder has no heads that can be replaced.
        """
        rows = data.rows(results.split)
        if not any(answers for row in rows.select_columns(["answers"]) for answers in row["answers"]):
            raise UserError(
                f"{data.dir}, split {results.split}: the answers are kept back, so nothing is right or wrong"
            )
        model, preprocessing = checkpoint.model.to(results.device).eval(), checkpoint.preprocessing
        scores = Scores(rows)
        asked = all_texts(rows, self.num_texts)
        reader = ImageReader(rows, preprocessing)
        batches = []
        for start in range(0, len(asked), self.batch_size):
            part = asked[start : start + self.batch_size]
            images = torch.cat([reader.read(item.row, 0)[1] for item in part])
            ids, mask = preprocessing.pad(preprocessing.token_ids([item.text for item in part]))
            batches.append((images.to(results.device), ids.to(results.device), mask.to(results.device)))

        def right() -> list[float]:
            best = torch.cat([model(*batch).logits.argmax(dim=1) for batch in batches]).tolist()
            return [scores.of(item, preprocessing.names[n]) for item, n in zip(asked, best, strict=True)]

        with torch.inference_mode():
            found = [one for batch in batches for one in sinks(model, *batch)]
            whole = right()
            means = head_means(model, batches)
            heads = [(block, head) for block, of in enumerate(means) for head in range(len(of.heads))]
            falls = {}
            for block, head in results.each(heads, "head"):
                with without_head(means[block], head):
                    falls[f"{block + 1}/{head + 1}"] = [a - b for a, b in zip(whole, right(), strict=True)]
        for n, item in enumerate(asked):
            fallen = {name: of[n] for name, of in falls.items()}
            results.rows.append({"id": item.text_id, "text": item.text, "right": whole[n]} | {
                "sinks": found[n], "heads": fallen})  # fmt: skip
        if len(results.rows) < 2:
            raise UserError(f"{data.dir}, split {results.split}: fewer than two questions to measure")
        self._report(results, means)

    def _report(self, results: Results, means: Sequence[HeadMeans]) -> None:
        frame = results.frame
        results.metrics |= {"texts": len(frame), "right": frame["right"].mean()}
        results.say(
            f"{len(frame)} questions, {frame['right'].mean():.1f}% right\n"
            f"sinks: tokens with a norm above mean + {OUTLYING:g} deviations of their image, and the attention on "
            "them, in percent"
        )
        names = list(results.rows[0]["sinks"])
        results.table(
            ["block", "tokens", "attention"],
            [
                [name, *(results.mean(f"sinks/{name}/{one}", frame[f"sinks/{name}/{one}"]) for one in _OF_SINKS)]
                for name in names
            ],
        )
        results.say(
            "heads: points by which the accuracy falls if a head's output is its mean; * marks 95% intervals without 0"
        )
        most = max(len(of.heads) for of in means)
        table = []
        for block, of in enumerate(means, start=1):
            cells = [str(block)]
            for head in range(1, len(of.heads) + 1):
                name = f"heads/{block}/{head}"
                results.mean(name, frame[name])
                low, high = results.metrics[f"{name}_interval"]
                cells.append(f"{results.metrics[name]:.1f}{'' if low <= 0 <= high else ' *'}")
            table.append(cells + [""] * (most - len(of.heads)))
        results.table(["block", *(f"head {head + 1}" for head in range(most))], table)


_OF_SINKS = ("tokens", "attention")


def sinks(model: VisionLanguageModel, images: Tensor, ids: Tensor, mask: Tensor) -> list[dict[str, dict[str, float]]]:
    """For each of n texts, about one image each, the share of the tokens that are sinks, and of the attention on them.

    Args:
        model: in eval mode.
        images: (n, 3, H, W).
        ids, mask: (n, T).

    Returns:
        For each text, by the name of the block, `tokens` and `attention` in percent.
    """
    attention: list[Tensor] = []
    with recording(model.vision, ("normgrad", "relevance"), model.fusion) as recorded:
        model(images, ids, mask, record=attention)
    found: list[dict[str, dict[str, float]]] = [{} for _ in images]
    first = model.vision.backbone.depth - len(attention)
    last = None
    states = recorded.states[-len(attention) :]
    for block, (read, x) in enumerate(zip(attention, states, strict=True), start=first + 1):
        if x is None or x.shape[1] != read.shape[2]:  # a block whose attention is over something else
            continue
        read = read[..., : x.shape[1]]  # keys after the tokens are words
        norms = x.norm(dim=2)
        last = norms > norms.mean(dim=1, keepdim=True) + OUTLYING * norms.std(dim=1, keepdim=True)
        _add(found, str(block), read, last)
    for layer, read in enumerate(recorded.fusion[1::4], start=1):  # text to image, of each pair of layers
        if last is not None and read.shape[3] == last.shape[1]:
            _add(found, f"fusion {layer}", read, last)
    return found


def _add(found: list[dict[str, dict[str, float]]], name: str, read: Tensor, sink: Tensor) -> None:
    """Add a block's shares: of attention (n, heads, queries, keys) on the keys (n, keys) that are sinks."""
    on = (read.mean(dim=(1, 2)) * sink).sum(dim=1)
    for one, tokens, attention in zip(found, sink.float().mean(dim=1).tolist(), on.tolist(), strict=True):
        one[name] = {"tokens": 100 * tokens, "attention": 100 * attention}


class HeadMeans(NamedTuple):
    """A block's heads, and their mean output.

    Attributes:
        place: the module whose input is the outputs of all heads, side by side.
        heads: the columns of each head.
        means: for each pass, (C,), the mean of its input.
    """

    place: nn.Module
    heads: list[slice]
    means: list[Tensor]


def head_means(model: VisionLanguageModel, batches: Sequence[tuple[Tensor, ...]]) -> list[HeadMeans]:
    """The mean output of every head of the image encoder, over texts and tokens, block by block.

    Args:
        model: in eval mode.
        batches: what it takes: images, token ids and their mask.

    Raises:
        UserError: its blocks do not have a projection of their heads' outputs, as timm's have.
    """
    attentions = [
        module
        for name, module in model.vision.vit.named_modules()
        if name.endswith(".attn") and hasattr(module, "proj")
    ]
    if not attentions or not all(hasattr(attention, "num_heads") for attention in attentions):
        raise UserError("task=probes: this image encoder has no heads that can be replaced")
    sums: list[list[Tensor]] = [[] for _ in attentions]
    counts: list[list[int]] = [[] for _ in attentions]
    with ExitStack() as stack:
        calls = [stack.enter_context(_changing(_place(attention), _summing(sums[n], counts[n])))
                 for n, attention in enumerate(attentions)]  # fmt: skip
        for batch in batches:
            for one in calls:
                one.clear()
            model(*batch)
    found = []
    for attention, of, count in zip(attentions, sums, counts, strict=True):
        width = of[0].shape[-1] // attention.num_heads
        heads = [slice(start, start + width) for start in range(0, of[0].shape[-1], width)]
        found.append(HeadMeans(_place(attention), heads, [one / n for one, n in zip(of, count, strict=True)]))
    return found


def _place(attention: nn.Module) -> nn.Module:
    """The first module that reads the heads' outputs: timm's ViTs have a norm before the projection."""
    norm = getattr(attention, "norm", None)
    return norm if type(attention) is Attention and norm is not None else attention.proj  # type: ignore[return-value]


@contextmanager
def without_head(of: HeadMeans, head: int) -> Iterator[None]:
    """Context manager: the output of one head (from 0) of a block is its mean, in every pass of the next batches."""

    def replace(call: int, x: Tensor) -> Tensor:
        x = x.clone()
        # A model calls the block once per pass, so the number of the call says which pass it is.
        x[..., of.heads[head]] = of.means[call % len(of.means)][of.heads[head]].to(x)
        return x

    with _changing(of.place, replace):
        yield


def _summing(sums: list[Tensor], counts: list[int]) -> Any:
    """Add up inputs, by the number of the call since the last batch began."""

    def add(call: int, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2).double()
        if call == len(sums):
            sums.append(torch.zeros_like(flat[0]))
            counts.append(0)
        sums[call] += flat.sum(dim=0)
        counts[call] += len(flat)
        return x

    return add


@contextmanager
def _changing(module: nn.Module, change: Any) -> Iterator[list[None]]:
    """Context manager: `change(call, x)` is the input of a module; the list has an item for each call."""
    calls: list[None] = []

    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(None)
        return change(len(calls) - 1, given[0]), *given[1:]

    handle = module.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()
