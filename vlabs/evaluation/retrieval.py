"""Evaluation of retrieval: all images of a split against all captions, through the whole network.

`exact` scores every pair; `shortlist` scores those that ξ finds promising. Both keep their scores on disk, and a run
that was stopped continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vlabs.attention.figures import Cell, as_view, grid_figure
from vlabs.attention.maps import default_map, look_by
from vlabs.checkpoints.checkpoint import Checkpoint, history_of
from vlabs.data.captions import CaptionDataModule
from vlabs.data.images import ImageReader, name_of, read_bytes
from vlabs.data.loading import identity_of
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError
from vlabs.evaluation.base import Evaluation
from vlabs.evaluation.results import Results
from vlabs.metrics.retrieval import RECALLS, Rows, check_enough_images, retrieval_ranks
from vlabs.models.vlm import VisionLanguageModel
from vlabs.ranking.passes import FirstPasses
from vlabs.ranking.scores import ScoreMatrix
from vlabs.ranking.shortlist import Similarity, share_kept, shortlist, similarities
from vlabs.ranking.texts import EncodedTexts, encode_priors, encode_texts, score_texts
from vlabs.runs.trainer import make_trainer
from vlabs.runs.values import Ranker
from vlabs.utils.files import content_sha256
from vlabs.utils.options import Count, Size, check_type
from vlabs.utils.ranks import say


class Unit(NamedTuple):
    """Work that is done at once: one image, and the captions from `first` on that are in memory together."""

    image: int
    first: int


class _Like(NamedTuple):
    """How like images are to captions, see `similarities`."""

    cls: ScoreMatrix
    patches: ScoreMatrix


class _Images(Dataset[tuple[Unit, Any]]):
    def __init__(self, images: ImageReader) -> None:
        self.images = images

    def __getitem__(self, unit: Unit) -> tuple[Unit, Any]:
        return unit, self.images.read(unit.image, 0)[1]


class _Work(pl.LightningDataModule):
    """The units that are not done yet, shared out over the processes."""

    def __init__(self, units: Sequence[Unit], images: ImageReader, num_workers: int) -> None:
        super().__init__()
        self.units = units
        self.images = images
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader[tuple[Unit, Any]]:
        """This process's units, those of the same captions together."""
        trainer = self.trainer
        assert trainer is not None
        mine = self.units[trainer.global_rank :: trainer.world_size]
        return DataLoader(
            _Images(self.images),
            sampler=mine,
            batch_size=None,
            num_workers=self.num_workers if len(mine) > 1 else 0,
            pin_memory=torch.cuda.is_available(),
        )


class _FirstPasses(pl.LightningModule):
    """Stores the first pass of every image, and writes how like it is to every caption's ξ."""

    def __init__(
        self, model: VisionLanguageModel, passes: FirstPasses, images: ImageReader, prior: Tensor, like: _Like
    ) -> None:
        super().__init__()
        self.model = model
        self.passes = passes
        self.images = images
        self.prior = prior
        self.like = like

    def predict_step(self, batch: tuple[Unit, Tensor], batch_idx: int) -> None:
        """One image."""
        unit, image = batch
        key = self.images.key(unit.image)
        self.passes.add([(key, image)])
        cls, patches = (part.to(self.device) for part in self.passes.seen([key]))
        like = similarities(cls, patches, self.prior.to(self.device), self.model.pool)
        for matrix, values in zip(self.like, like, strict=True):
            matrix.values[unit.image] = values[0].cpu().numpy()

    def on_predict_epoch_end(self) -> None:
        """Write what is not in a file yet."""
        self.passes.store.flush()


class _Scores(pl.LightningModule):
    """Writes the scores of every image with its captions, or with those that are wanted of it."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        captions: Sequence[str],
        matrix: ScoreMatrix,
        wanted: Sequence[np.ndarray] | None,
        batch_size: int,
        in_memory: int,
    ) -> None:
        super().__init__()
        self.model = checkpoint.model
        self.preprocessing = checkpoint.preprocessing
        self.captions = captions
        self.matrix = matrix
        self.wanted = wanted
        self.batch_size = batch_size
        self.in_memory = in_memory
        self.first = -1
        self.texts: EncodedTexts | None = None

    def captions_of(self, unit: Unit) -> np.ndarray:
        """The captions that a unit is to be scored with."""
        last = min(unit.first + self.in_memory, len(self.captions))
        if self.wanted is None:
            return np.arange(unit.first, last)
        wanted = self.wanted[unit.image]
        return wanted[(wanted >= unit.first) & (wanted < last)]

    def units(self, images: int) -> list[Unit]:
        """What is not done yet."""
        everything = (Unit(n, first) for first in range(0, len(self.captions), self.in_memory) for n in range(images))
        return [
            unit
            for unit in everything
            if len(self.captions_of(unit)) and not self.matrix.done(unit.image, self.captions_of(unit))
        ]

    def predict_step(self, batch: tuple[Unit, Any], batch_idx: int) -> None:
        """One image with the captions of one part."""
        unit, image = batch
        if self.texts is None or self.first != unit.first:
            self.texts = None  # makes room before the next ones are there
            part = self.captions[unit.first : unit.first + self.in_memory]
            self.texts, self.first = encode_texts(self.model, self.preprocessing, part), unit.first
        captions = self.captions_of(unit)
        which = torch.from_numpy(captions - unit.first).to(self.device)
        scores = score_texts(self.model, self.model.vision.encode(image), self.texts, which, self.batch_size)
        self.matrix.values[unit.image, captions] = scores.cpu().numpy()


class CaptionedImages:
    """The images and captions of a split, as a ranking needs them.

    Args:
        data: the captions.
        split: theirs.
        images: only the first so many images, with their captions; None for all.

    Raises:
        UserError: an image has no caption, or there are too few.
    """

    def __init__(self, data: CaptionDataModule, split: str, images: int | None = None) -> None:
        self.rows: datasets.Dataset = data.rows(split)
        if images is not None:
            self.rows = self.rows.select(range(min(images, len(self.rows))))
        self.split = split
        sets = [identity_of(folder) for folder in data.folders.values()]
        self.name = " + ".join(str(one["name"]) for one in sets)
        self.manifests = [str(one["manifest_sha256"]) for one in sets]
        lists = self.rows.select_columns(["image_id", "caption"])
        self.captions: list[str] = []
        image_of_caption = []
        for n, row in enumerate(lists):
            if not row["caption"]:
                raise UserError(f"split {split}: image {row['image_id']} has no caption, so it cannot be ranked")
            self.captions += row["caption"]
            image_of_caption += [n] * len(row["caption"])
        self.image_of_caption = np.array(image_of_caption)
        check_enough_images(len(self.rows), split)


class RetrievalEvaluation(Evaluation):
    """Ranks a split in both directions: recalls, one line per query, and a figure of some with their best images.

    Args:
        ranker: the options of the group `ranker`, see `vlabs.runs.values.Ranker`.
        figure_queries: captions in the figure; 0 for none.
        images: images of the split that are ranked, the first ones; None for all.

    Raises:
        UserError: an option is out of range.
    """

    name = "retrieval"
    needs = ("texts", "ranks")  # a matching head ranks without fine-tuning
    reads = CaptionDataModule
    in_trainer = True

    def __init__(self, ranker: Mapping[str, Any], figure_queries: Count = 6, images: Size | None = None) -> None:
        check_type("ranker", ranker, Ranker)
        self.ranker = dict(ranker)
        self.figure_queries = figure_queries
        self.images = images

    def check_model(self, model: VisionLanguageModel) -> None:
        """Raise a UserError unless the ranker can rank with this model."""
        if (name := self.ranker["name"]) != "exact" and model.prior is None:
            raise UserError(f"ranker={name} compares images with the prior ξ, which a plain ViT does not have")

    def measure(self, checkpoint: Checkpoint, data: CaptionDataModule, results: Results) -> None:
        """See `Evaluation`. Scores are kept on disk, and a run that was stopped continues."""
        self.check_model(checkpoint.model)
        ranker, workers, setting = self.ranker, data.workers, results.setting
        captioned = CaptionedImages(data, setting.split, self.images)
        identity = {
            "checkpoint": content_sha256(checkpoint.path),
            "data": "+".join(captioned.manifests),
            "split": setting.split,
            "images": len(captioned.rows),
            "precision": str(setting.trainer.precision),
            "keep": checkpoint.keep,
        }
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]
        folder = Path(ranker["scores"]) if ranker["scores"] is not None else Path("outputs/scores") / key
        trainer = make_trainer(setting.trainer, logger=False, callbacks=setting.callbacks, enable_checkpointing=False)
        if trainer.num_nodes > 1:
            raise UserError("evaluate task=retrieval runs on the devices of one machine: pass trainer.num_nodes=1")
        reader = ImageReader(captioned.rows, checkpoint.preprocessing)
        shape = (len(captioned.rows), len(captioned.captions))
        what = f"{shape[0]:,} images x {shape[1]:,} captions of {captioned.name} ({setting.split})"
        say(f"ranking {what}; scores in {folder}")
        wanted, similarity = None, None
        if ranker["name"] != "exact":
            like = _Like(*(ScoreMatrix(folder, f"like_{name}", shape, identity) for name in _Like._fields))
            passes = FirstPasses(folder / "first_passes", checkpoint.model.vision, checkpoint.preprocessing)
            pending = [
                Unit(n, 0)
                for n in range(shape[0])
                if reader.key(n) not in passes or not all(one.done(n, slice(None)) for one in like)
            ]
            if pending:
                passes.store.check_room(len(pending))
                # Lightning leaves the model on the CPU.
                checkpoint.model.to(trainer.strategy.root_device)
                prior = encode_priors(checkpoint.model, checkpoint.preprocessing, captioned.captions)
                first = _FirstPasses(checkpoint.model, passes, reader, prior, like)
                trainer.predict(first, _Work(pending, reader, workers), return_predictions=False)
                trainer.strategy.barrier()
                passes.store.refresh()
            say(f"first passes of {shape[0]:,} images, {passes.store.bytes_each / 1e3:,.0f} kB each, are beside them")
            reader = ImageReader(captioned.rows, checkpoint.preprocessing, stored=passes)
            similarity = Similarity(*(one.values for one in like))
            if ranker["name"] == "similarity":
                if trainer.is_global_zero:
                    unscored = np.broadcast_to(np.float32(np.nan), shape)
                    self._report(results, checkpoint, captioned, FilledScores(unscored, similarity))
                return
            wanted = shortlist(similarity.blocks(), ranker["k"])
        name = "exact" if ranker["name"] == "exact" else f"shortlist-k{ranker['k']}"
        matrix = ScoreMatrix(folder, name, shape, identity)
        batch_size, in_memory = int(ranker["batch_size"]), int(ranker["captions_in_memory"])
        scoring = _Scores(checkpoint, captioned.captions, matrix, wanted, batch_size, in_memory)
        units = scoring.units(shape[0])
        if units:
            trainer.predict(scoring, _Work(units, reader, workers), return_predictions=False)
            trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        matrix.values.flush()  # type: ignore[attr-defined]
        scores = matrix.values if similarity is None else FilledScores(matrix.values, similarity)
        self._report(results, checkpoint, captioned, scores)
        if wanted is not None:
            _report_kept(results, folder, shape, identity, wanted)

    def _report(self, results: Results, checkpoint: Checkpoint, data: CaptionedImages, scores: Rows) -> None:
        _report(results, checkpoint, data, scores, str(self.ranker["name"]))
        if self.figure_queries:
            results.figure("ranking", _figure(checkpoint, data, scores, self.figure_queries))


class FilledScores:
    """The scores of a shortlist, row by row: a pair without one is below all others, in the order of its similarity.

    Args:
        scores: (N, M), NaN for pairs without a score; it may be memory-mapped.
        similarity: of images and captions.
    """

    def __init__(self, scores: np.ndarray, similarity: Similarity) -> None:
        self.scores = scores
        self.shape = scores.shape
        self.similarity = similarity
        lowest = min((float(np.nanmin(row)) for row in scores if not np.isnan(row).all()), default=0.0)
        self.floor = lowest - 1 - max(float(block.max()) for block in similarity.blocks())

    def __getitem__(self, image: int) -> np.ndarray:
        """The scores (M,) of an image."""
        row = np.array(self.scores[image])
        missing = np.isnan(row)
        row[missing] = self.floor + self.similarity[image].numpy()[missing]
        return row


def _report(results: Results, checkpoint: Checkpoint, data: CaptionedImages, scores: Rows, ranker: str) -> None:
    ranks = retrieval_ranks(scores, data.image_of_caption)
    history = history_of(checkpoint.task, checkpoint.data)
    trained_on = [
        {"task": item["task"], "name": entry.get("name") or entry.get("dir", "unknown data")}
        for item in history
        for entry in item["data"].get("sets", [item["data"]])
    ]
    hashes = {entry.get("manifest_sha256") for item in history for entry in item["data"].get("sets", [item["data"]])}
    known = None not in hashes
    seen = not hashes.isdisjoint(data.manifests) or data.name in {item["name"] for item in trained_on}
    images, captions = scores.shape
    results.metrics |= {
        **ranks.metrics(),
        "data": data.name,
        "ranker": ranker,
        "images": images,
        "captions": captions,
        "trained_on": trained_on,
        "zero_shot": None if not known and not seen else not seen,
    }
    results.say(f"{data.name} {data.split}, {images:,} images, {captions:,} captions, {ranker}")
    results.say(f"the model's training: {checkpoint.training}")
    results.say(
        "not zero-shot: the model was trained on this dataset"
        if seen
        else "zero-shot: nothing of this dataset was trained on"
        if known
        else "the checkpoint does not say what it was trained on, so nobody knows whether this is zero-shot"
    )
    cells = []
    for name, what, found in (("ir", "image retrieval", ranks.image), ("tr", "text retrieval", ranks.text)):
        recalls = [results.mean(f"{name}@{k}", 100.0 * (found <= k)) for k in RECALLS]
        cells.append([what, *recalls, f"{np.median(found):.1f}"])
    results.table(["percent", *(f"R@{k}" for k in RECALLS), "median rank"], cells)
    ids = [caption_id for row in data.rows.select_columns(["caption_id"]) for caption_id in row["caption_id"]]
    results.add(caption_id=ids, rank=ranks.image.tolist())
    results.add(image_id=data.rows["image_id"], rank=ranks.text.tolist())


def _report_kept(
    results: Results, folder: Path, shape: tuple[int, int], identity: dict[str, Any], wanted: list[np.ndarray]
) -> None:
    """How much of the exact top ten the shortlist has, in percent; nothing where exact is not known."""
    if not (folder / "exact.npy").is_file():
        return
    exact = ScoreMatrix(folder, "exact", shape, identity).values
    if not np.isnan(exact).any():
        for name, percent in share_kept(wanted, exact).items():
            results.metrics[f"shortlist_kept_{name}"] = percent
            results.say(f"of the exact top ten {name} the shortlist has {percent:.1f}%")


@torch.inference_mode()
def _figure(checkpoint: Checkpoint, data: CaptionedImages, scores: Rows, queries: int) -> Any:
    """Some captions, evenly spread, with their five best images and where the model looked in each."""
    model = checkpoint.model.to("cpu").float()
    rows = []
    drawn = np.linspace(0, len(data.captions) - 1, num=queries, dtype=int)
    columns = np.stack([scores[image][drawn] for image in range(scores.shape[0])])
    for caption, column in zip(drawn.tolist(), columns.T, strict=True):
        best = np.argsort(-column, kind="stable")[:5].tolist()
        cells = list(_ranked(model, checkpoint, data, caption, best))
        rows.append((data.captions[caption], cells))
    return grid_figure(rows, "framed: the right image")


def _ranked(
    model: VisionLanguageModel, checkpoint: Checkpoint, data: CaptionedImages, caption: int, best: Sequence[int]
) -> Iterator[Cell]:
    preprocessing = checkpoint.preprocessing
    input_ids, mask = preprocessing.pad(preprocessing.token_ids([data.captions[caption]]))
    for place, image in enumerate(best, start=1):
        row = data.rows[image]
        picture = decode_image(read_bytes(row), name_of(row))
        seen = look_by(model, preprocessing.image(picture)[None], input_ids, mask, default_map(model))
        right = bool(data.image_of_caption[caption] == image)
        view = as_view(picture, preprocessing.box(picture.size))
        note = f"{place}" + (" (right)" if right else "")
        yield Cell(view, seen.maps[0, 0], seen.names[0], note=note, marked=right)
