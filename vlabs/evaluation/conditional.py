"""Evaluation of conditional retrieval: does a phrase make images alike that hold what it names?"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.captions import CaptionDataModule
from vlabs.data.images import ImageReader
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.models.absvit import BottomUp
from vlabs.models.topdown import Words, similarity
from vlabs.models.vlm import VisionLanguageModel
from vlabs.utils.options import Size

FEATURES = "cls", "mean", "weighted"
PASSES = "first", "second"


class ConditionalEvaluation(Evaluation):
    """Embeds every image under a phrase, and looks whether the nearest other image holds what the phrase names.

    An image that has the phrase among its captions is a query; the split's other images are the gallery. Measured is
    precision at 1 by cosine, as on CORE (SteerViT). An image is embedded three ways, in both passes: its `cls` (what
    the encoder pools), the `mean` of its patches, and their mean `weighted` by the similarity to ξ. Only the first
    pass's `cls` and `mean` do not depend on the phrase.

    Args:
        prompt: the text that the model is given, with `PHRASE` where the phrase goes.
        phrases: number of phrases, the most frequent ones; None for all that two images hold.
        images: images of the split, the first ones; None for all.
        batch_size: images per batch.

    Raises:
        UserError: the prompt has no place for the phrase.
    """

    name = "conditional"
    needs = ("texts", "one image")
    reads = CaptionDataModule

    def __init__(
        self,
        prompt: str = "PHRASE",
        phrases: Size | None = 50,
        images: Size | None = None,
        batch_size: Size = 128,
    ) -> None:
        if "PHRASE" not in prompt:
            raise UserError(f"task.prompt={prompt} must say where the phrase goes, such as 'is there a PHRASE?'")
        self.prompt, self.phrases, self.images, self.batch_size = prompt, phrases, images, batch_size

    @torch.inference_mode()
    def measure(self, checkpoint: Checkpoint, data: CaptionDataModule, results: Results) -> None:
        """See `Evaluation`. The metrics are `PASS/FEATURE` in percent, and `chance`, that of a random other image.

        Raises:
            UserError: no phrase is held by two images and not by all.
        """
        rows = data.rows(results.split)
        if self.images is not None:
            rows = rows.select(range(min(self.images, len(rows))))
        if len(rows) < 3:
            raise UserError(
                f"{data.dir}, split {results.split}: {len(rows)} images are too few to be ranked (task.images)"
            )
        holding: dict[str, list[int]] = defaultdict(list)
        for n, captions in enumerate(rows.select_columns(["caption"])["caption"]):
            for phrase in dict.fromkeys(caption.strip().rstrip(".").lower() for caption in captions):
                holding[phrase].append(n)
        held = {phrase: which for phrase, which in holding.items() if 1 < len(which) < len(rows)}
        if not held:
            raise UserError(
                f"{data.dir}, split {results.split}: no caption is that of two images and not of all: this needs "
                "phrases, such as data=scenes_phrases or vlabs prepare coco_captions --phrases, and enough images"
            )
        asked = sorted(held, key=lambda phrase: (-len(held[phrase]), phrase))[: self.phrases]
        model = checkpoint.model.to(results.device).eval()
        reader = ImageReader(rows, checkpoint.preprocessing)
        firsts = range(0, len(rows), self.batch_size)
        found: dict[str, dict[str, list[Tensor]]] = {phrase: defaultdict(list) for phrase in asked}
        for first in results.each(firsts, "batch"):
            read = [reader.read(n, 0)[1] for n in range(first, min(first + self.batch_size, len(rows)))]
            images = torch.cat([image for image in read if image is not None]).to(results.device)
            bottom_up = model.vision.encode(images)
            for phrase in asked:
                ids, mask = checkpoint.preprocessing.pad(
                    checkpoint.preprocessing.token_ids([self.prompt.replace("PHRASE", phrase)])
                )
                for name, feature in _features(model, bottom_up, ids.to(images.device), mask.to(images.device)).items():
                    found[phrase][name].append(F.normalize(feature.float(), dim=1).half())
        for phrase in asked:
            holds = torch.zeros(len(rows), dtype=torch.bool)
            holds[held[phrase]] = True
            hits = {name: _hits(torch.cat(parts), holds) for name, parts in found[phrase].items()}
            chance = (len(held[phrase]) - 1) / (len(rows) - 1)
            for place, n in enumerate(held[phrase]):
                right = {name: bool(one[place]) for name, one in hits.items()}
                results.rows.append({"id": rows[n]["image_id"], "phrase": phrase, "chance": chance, **right})
        frame = results.frame
        results.metrics |= {"chance": 100 * float(frame["chance"].mean()), "phrases": len(asked), "queries": len(frame)}
        results.say(
            f"{len(asked)} phrases and {len(frame):,} queries in {len(rows):,} images. Precision at 1, percent; a "
            f"random other image has {results.metrics['chance']:.1f}"
        )
        table = []
        for kind in FEATURES:
            names = [f"{when}/{kind}" for when in PASSES]
            if names[1] in frame:
                table.append([kind, *(results.mean(name, 100 * frame[name], digits=1) for name in names)])
        results.table(["embedding", "first pass", "second pass"], table)


def _features(model: VisionLanguageModel, bottom_up: BottomUp, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Embeddings (B, D) of B images under one text, by pass and kind."""
    vision, prefix, count = model.vision, model.vision.num_prefix_tokens, len(bottom_up.tokens)
    states = model.text(ids, mask)
    prior = model.prior_of(states, ids, mask)
    many = None if prior is None else prior.expand(count, *prior.shape[1:])
    words = Words(states.expand(count, -1, -1), mask.expand(count, -1))
    with vision.keeping(1.0):
        seen = vision.attend(bottom_up, many, words=words)
    weights = seen.token_weights
    if weights is None and many is not None:
        weights = similarity(many, bottom_up.tokens)
    features = {}
    for when, tokens in zip(PASSES, (bottom_up.tokens, seen.tokens), strict=True):
        features[f"{when}/cls"] = vision.backbone.pool(tokens)
        features[f"{when}/mean"] = tokens[:, prefix:].mean(dim=1)
        if weights is not None:
            share = weights[:, prefix:, None] + 1e-6  # a prior that is like no patch asks for all alike
            features[f"{when}/weighted"] = (share * tokens[:, prefix:]).sum(dim=1) / share.sum(dim=1)
    return features


def _hits(features: Tensor, holds: Tensor) -> np.ndarray:
    """Whether the nearest other image holds it too, for every image that does."""
    features, queries = features.float(), holds.nonzero()[:, 0].to(features.device)
    cosine = features[queries] @ features.T
    cosine.scatter_(1, queries[:, None], -2.0)
    hit: np.ndarray = holds[cosine.argmax(dim=1).cpu()].numpy()
    return hit
