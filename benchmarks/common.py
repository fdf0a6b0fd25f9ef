"""What the benchmarks share: sizes of models, random texts, and a ledger of where the work and the time go."""

from __future__ import annotations

import functools
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlabs.models.absvit import AbSViT
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import RankingHead
from vlabs.models.text import RobertaEncoder
from vlabs.models.topdown import (
    AbSTopDown,
    AbSTopDownQKV,
    FeedbackOnly,
    MaskAttention,
    PerceiverIO,
    ReleasedTopDown,
    TopDown,
)
from vlabs.models.variants.codebook import Codebook
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.film import FiLM
from vlabs.models.variants.qa_vit import QAViT
from vlabs.models.variants.sentence_attention import SentenceAttention
from vlabs.models.vlm import VisionLanguageModel, assemble
from vlabs.utils.flops import flop_counter


@dataclass(frozen=True)
class Size:
    """Widths and depths of a model: ViT of 16 px patches, RoBERTa, fusion."""

    pixels: int
    width: int
    vision_depth: int
    text_depth: int
    fusion_depth: int
    heads: int
    vocabulary: int


SIZES = {
    "base": Size(224, 768, 12, 12, 6, 12, 50265),
    "small": Size(224, 384, 12, 6, 6, 6, 50265),
    "mini": Size(64, 64, 2, 2, 2, 4, 1000),
}
# The two that the released arithmetic is written out for.
ALPHA = {"absvit_released": 5.0, "absvit": 10.0}
PRIOR_TOKEN = {"absvit_released": "eos", "absvit": "cls"}
# All choices of model/topdown.
VARIANTS: dict[str, Callable[[], TopDown] | None] = {
    "none": None,
    "perceiver_io": PerceiverIO,
    "feedback": FeedbackOnly,
    "mask_att": MaskAttention,
    "absvit_released": partial(ReleasedTopDown, ALPHA["absvit_released"]),
    "absvit": partial(AbSTopDown, ALPHA["absvit"]),
    "absvit_qkv": AbSTopDownQKV,
    "cross_attention": CrossAttention,
    "qa_vit": QAViT,
    "sentence_attention": SentenceAttention,
    "codebook": Codebook,
    "film": FiLM,
}


def make_model(
    size: str,
    topdown: str,
    head: Callable[..., nn.Module] = RankingHead,
    dropout: float = 0.1,
    start: int = 1,
    keep: float = 1.0,
    **sizes: int,
) -> VisionLanguageModel:
    """A model of that size with random weights.

    Args:
        head: called with `in_features`.
        start, keep: of the image encoder, see `AbSViT`.
        sizes: instead of some of `Size`.
    """
    torch.manual_seed(0)
    s = replace(SIZES[size], **sizes)
    variant = VARIANTS[topdown]
    vision = AbSViT(
        "vit_base_patch16_224",
        img_size=s.pixels,
        topdown=None if variant is None else variant(),
        embed_dim=s.width,
        depth=s.vision_depth,
        num_heads=s.heads,
        start=start,
        keep=keep,
    )
    text = RobertaEncoder(
        s.vocabulary,
        s.width,
        s.text_depth,
        s.heads,
        4 * s.width,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    fusion = partial(CoAttentionFusion, width=s.width, depth=s.fusion_depth, num_heads=s.heads, dropout=dropout)
    return assemble(vision, text, fusion, head, PRIOR_TOKEN.get(topdown, "cls")).eval()


def draw_texts(
    count: int, vocabulary: int, mean: float, shortest: int, longest: int, deviation: float, seed: int = 0
) -> list[list[int]]:
    """Token ids of texts with special tokens; lengths log-normal, `deviation` that of the logarithm."""
    draw = random.Random(seed)
    center = math.log(mean) - deviation**2 / 2
    texts = []
    for _ in range(count):
        length = min(max(round(draw.lognormvariate(center, deviation)), shortest), longest)
        texts.append([0, *(draw.randrange(3, vocabulary) for _ in range(length - 2)), 2])
    return texts


class Ledger:
    """Seconds and FLOPs of the parts of a computation; a part within a part is counted in the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, int] = defaultdict(int)
        self._open: list[str] = []
        self._time = 0.0
        self._count = 0
        self._counter: FlopCounterMode | None = None

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Book what a method of this one object takes under `part`."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def watched(*arguments: Any, **options: Any) -> Any:
            with self.part(part):
                return original(*arguments, **options)

        # Not through nn.Module, whose state these are no part of.
        owner.__dict__[method] = watched

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Book what runs inside under `name`."""
        self._book()
        self._open.append(name)
        try:
            yield
        finally:
            self._book()
            self._open.pop()

    def switch(self, name: str) -> None:
        """Book what the open part does from now on under `name`."""
        self._book()
        self._open[-1] = name

    def _book(self) -> None:
        now, count = time.perf_counter(), self._counter.get_total_flops() if self._counter else 0
        if self._open:
            self.seconds[self._open[-1]] += now - self._time
            self.flops[self._open[-1]] += count - self._count
        self._time, self._count = now, count

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count FLOPs too, which takes time: not where seconds are read."""
        with flop_counter() as counter:
            self._counter, self._count = counter, 0
            yield
            self._counter = None

    def clear_seconds(self) -> None:
        """Forget the time of a warm-up."""
        self.seconds.clear()


def gmac(flops: int) -> float:
    """FLOPs as 10⁹ multiply-adds."""
    return flops / 2e9
