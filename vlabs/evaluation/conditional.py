"""Evaluation of conditional retrieval: are images that show what a phrase names similar under it?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.captions import CaptionDataModule
from vlabs.data.conditional import Gallery, Query, read_benchmark
from vlabs.data.images import ImageReader
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.prompt import check_prompt, with_phrase
from vlabs.evaluation.results import Results
from vlabs.models.absvit import BottomUp
from vlabs.models.topdown import Words, similarity
from vlabs.models.vlm import VisionLanguageModel
from vlabs.ranking.texts import EncodedTexts, encode_texts
from vlabs.utils.options import Size, as_given

FEATURES = "cls", "mean", "weighted"
PASSES = "first", "second"
PHRASES = 50


class ConditionalEvaluation(Evaluation):
    """Embeds images under a phrase, and looks whether the nearest other image holds what the phrase names.

    Of captions, an image that has the phrase among its captions is a query; the split's other images are the gallery.
    CORE and GeneCIS say themselves what is asked (`vlabs.data.conditional`). Measured is precision at 1 by cosine, as
    on CORE (SteerViT), and for GeneCIS recall at 1, 2 and 3; all images are embedded under the phrase, three ways, in
    both passes: their `cls` (what the encoder pools), the `mean` of their patches, and their mean `weighted` by the
    similarity to ξ. Only the first pass's `cls` and `mean` do not depend on the phrase.

    Args:
        prompt: the text that the model is given, with `PHRASE` where the phrase goes.
        phrases: number of phrases of captions, the most frequent ones; None for all that two images hold.
        images: images of the split, the first ones; None for all.
        batch_size: images per batch, and images with a phrase.
        source: CORE's folder (its parquet files) or one of GeneCIS's JSON files, instead of captions.
        pictures: folders with the images of GeneCIS: COCO's val2017, or Visual Genome's.

    Raises:
        UserError: the prompt has no place for the phrase, or two options exclude each other.
    """

    name = "conditional"
    needs = ("texts", "one image")
    reads = CaptionDataModule
    measured_on = "captions that are phrases (data=scenes_phrases, or made by vlabs prepare coco_captions --phrases)"
    keeps_all = True

    def __init__(
        self,
        prompt: str = "PHRASE",
        phrases: Size | None = PHRASES,
        images: Size | None = None,
        batch_size: Size = 128,
        source: str | None = None,
        pictures: Sequence[str] = (),
    ) -> None:
        check_prompt(prompt)
        if source is not None and not source.strip():
            raise UserError(
                "task.source='' names nothing: name CORE's folder or one of GeneCIS's files, or leave it out"
            )
        if pictures and (source is None or not source.lower().endswith(".json")):
            raise UserError(
                f"task.pictures=[{','.join(pictures)}] are folders with the images of GeneCIS, so of a "
                "task.source=FILE.json: pass one, or leave them out"
            )
        for option, given, usual in (("images", images, None), ("phrases", phrases, PHRASES)):
            if source is not None and given != usual:
                raise UserError(
                    f"task.{option}={as_given(given)}: task.source={source} is measured whole: leave task.{option} out"
                )
        self.prompt, self.phrases, self.images, self.batch_size = prompt, phrases, images, batch_size
        self.source, self.pictures = source, list(pictures)
        self.brings_data = source is not None

    @torch.inference_mode()
    def measure(self, checkpoint: Checkpoint, data: CaptionDataModule | None, results: Results) -> None:
        """See `Evaluation`. The metrics are `PASS/FEATURE` in percent (`PASS/FEATURE@K` beyond 1), and `chance`.

        Raises:
            UserError: nothing can be asked.
        """
        preprocessing = checkpoint.preprocessing
        if data is None:
            gallery = read_benchmark(str(self.source), self.pictures)
            open_picture = gallery.read
            gallery.read = lambda n: preprocessing.image(open_picture(n))[None]
        else:
            gallery = self._of_captions(checkpoint, data, results.split)
        if not gallery.queries:
            raise UserError(f"task.source={self.source}: no object is in two images, so nothing can be asked")
        model = checkpoint.model.to(results.device).eval()
        queries: dict[str, list[Query]] = defaultdict(list)
        for query in gallery.queries:
            queries[query.text].append(query)
        named = f"{data.dir}, split {results.split}" if data is not None else f"task.source={self.source}"
        asked_for = [
            with_phrase(self.prompt, text, preprocessing, f"{named}, {asked[0].id}") for text, asked in queries.items()
        ]
        texts = encode_texts(model, preprocessing, asked_for)
        needed = [np.unique(np.concatenate([[*q.gallery, q.reference] for q in asked])) for asked in queries.values()]
        features = self._embedded(model, gallery, texts, needed, results)
        starts = np.cumsum([0, *map(len, needed)])
        for text, asked, numbers, start in zip(queries, queries.values(), needed, starts, strict=False):
            part = {name: of[start : start + len(numbers)].float() for name, of in features.items()}
            for query, row in zip(asked, _ranks(part, numbers, asked), strict=True):
                chance = row.pop("chance")
                found = {
                    name if k == 1 else f"{name}@{k}": bool(rank <= k)
                    for k in gallery.ranks
                    for name, rank in row.items()
                }
                results.rows.append({"id": query.id, "phrase": text, "chance": chance, **found})
        self._report(results, gallery, len(queries))

    def _embedded(
        self,
        model: VisionLanguageModel,
        gallery: Gallery,
        texts: EncodedTexts,
        needed: list[np.ndarray],
        results: Results,
    ) -> Mapping[str, Tensor]:
        """Features (pairs, D), unit vectors in half precision: the `needed` images of each text, one after another."""
        which = np.repeat(np.arange(len(needed)), [len(one) for one in needed])
        image = np.concatenate(needed)
        found: dict[str, Tensor] = {}
        used = np.unique(image)
        for first in results.each(range(0, len(used), self.batch_size), "batch"):
            numbers = used[first : first + self.batch_size]
            images = torch.cat([gallery.read(int(n)) for n in numbers]).to(results.device)
            bottom_up = model.vision.encode(images)
            places = np.flatnonzero(np.isin(image, numbers))
            for at in range(0, len(places), self.batch_size):
                pairs = places[at : at + self.batch_size]
                index = torch.from_numpy(np.searchsorted(numbers, image[pairs])).to(results.device)
                text = torch.from_numpy(which[pairs]).to(results.device)
                for name, feature in _features(model, bottom_up, texts, index, text).items():
                    if name not in found:
                        found[name] = torch.empty(len(image), feature.shape[1], device=feature.device).half()
                    found[name][torch.from_numpy(pairs)] = F.normalize(feature.float(), dim=1).half()
        return found

    def _report(self, results: Results, gallery: Gallery, phrases: int) -> None:
        frame = results.frame
        results.metrics |= {"chance": 100 * float(frame["chance"].mean()), "phrases": phrases, "queries": len(frame)}
        what = "Precision at 1" if gallery.ranks == (1,) else "Recall"
        results.say(
            f"{phrases:,} phrases and {len(frame):,} queries in {gallery.count:,} images. {what}, percent; a random "
            f"other image has {results.metrics['chance']:.1f}"
        )
        for note in gallery.notes:
            results.say(note)
        table = []
        for k in gallery.ranks:
            for kind in FEATURES:
                names = [f"{when}/{kind}" + ("" if k == 1 else f"@{k}") for when in PASSES]
                if names[1] in frame:
                    cells = [results.mean(name, 100 * frame[name], digits=1) for name in names]
                    table.append([kind if gallery.ranks == (1,) else f"{kind}, at {k}", *cells])
        results.table(["embedding", "first pass", "second pass"], table)

    def _of_captions(self, checkpoint: Checkpoint, data: CaptionDataModule, split: str) -> Gallery:
        """The images of a split, which are asked for the phrases among their captions."""
        rows = data.rows(split)
        if self.images is not None:
            rows = rows.select(range(min(self.images, len(rows))))
        if len(rows) < 3:
            raise UserError(f"{data.dir}, split {split}: {len(rows)} images are too few to be ranked (task.images)")
        holding: dict[str, list[int]] = defaultdict(list)
        for n, captions in enumerate(rows.select_columns(["caption"])["caption"]):
            for phrase in dict.fromkeys(caption.strip().rstrip(".").lower() for caption in captions):
                holding[phrase].append(n)
        held = {phrase: which for phrase, which in holding.items() if 1 < len(which) < len(rows)}
        if not held:
            raise UserError(
                f"{data.dir}, split {split}: no caption is that of two images and not of all: this needs "
                "phrases, such as data=scenes_phrases or vlabs prepare coco_captions --phrases, and enough images"
            )
        reader = ImageReader(rows, checkpoint.preprocessing)
        gallery = Gallery(len(rows), lambda n: reader.read(n, 0)[1])
        everything, ids = np.arange(len(rows)), rows["image_id"]
        for phrase in sorted(held, key=lambda phrase: (-len(held[phrase]), phrase))[: self.phrases]:
            right = np.array(held[phrase])
            gallery.queries += [Query(ids[n], phrase, n, everything, right, (n,)) for n in held[phrase]]
        return gallery


def _features(
    model: VisionLanguageModel, bottom_up: BottomUp, texts: EncodedTexts, index: Tensor, which: Tensor
) -> dict[str, Tensor]:
    """Embeddings (n, D) of n images, each under a text, by pass and kind.

    Args:
        index: (n,), the images in `bottom_up`.
        which: (n,), the texts.
    """
    vision, prefix = model.vision, model.vision.num_prefix_tokens
    prior = None if texts.prior is None else texts.prior[which]
    words = Words(*texts.padded(which))
    with vision.keeping(1.0):
        seen = vision.attend(bottom_up, prior, index, words=words)
    first, weights = bottom_up.tokens[index], seen.token_weights
    if weights is None and prior is not None:
        weights = similarity(prior, first)
    features = {}
    for when, tokens in zip(PASSES, (first, seen.tokens), strict=True):
        features[f"{when}/cls"] = vision.backbone.pool(tokens)
        features[f"{when}/mean"] = tokens[:, prefix:].mean(dim=1)
        if weights is not None:
            share = weights[:, prefix:, None] + 1e-6  # a prior that is like no patch asks for all equally
            features[f"{when}/weighted"] = (share * tokens[:, prefix:]).sum(dim=1) / share.sum(dim=1)
    return features


def _ranks(features: Mapping[str, Tensor], numbers: np.ndarray, asked: Sequence[Query]) -> list[dict[str, Any]]:
    """Of every query the rank of its best right image by each feature, and the `chance` of a random one.

    Of equal images a right one comes last.

    Args:
        features: (n, D) each, of the images `numbers`, ascending.
    """
    references = np.searchsorted(numbers, [query.reference for query in asked])
    rows: list[dict[str, Any]] = [{} for _ in asked]
    cosines = {name: (of[torch.from_numpy(references)] @ of.T).cpu().numpy() for name, of in features.items()}
    for n, (query, row) in enumerate(zip(asked, rows, strict=True)):
        ranked = query.gallery[~np.isin(query.gallery, query.excluded)]
        is_right = np.isin(ranked, query.right)
        row["chance"] = float(is_right.mean())
        places = np.searchsorted(numbers, ranked)
        for name, cosine in cosines.items():
            like = cosine[n, places]
            row[name] = 1 + int((like[~is_right] >= like[is_right].max()).sum())
    return rows
