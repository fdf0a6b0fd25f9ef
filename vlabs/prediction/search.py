"""Ranks the images of a folder by text: ξ selects the most promising ones, and the whole network ranks those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vlabs.attention.figures import Cell, as_view
from vlabs.attention.maps import look_of
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.decoding import known_suffixes
from vlabs.data.preprocessing import check_text
from vlabs.errors import UserError, show
from vlabs.models.topdown import whole
from vlabs.prediction.predictor import open_image
from vlabs.ranking.nearest import Nearest
from vlabs.ranking.passes import FirstPasses
from vlabs.ranking.shortlist import Similarity, similarities
from vlabs.ranking.texts import EncodedTexts, encode_texts
from vlabs.utils.archives import walk
from vlabs.utils.arguments import SEARCH_INDEX
from vlabs.utils.files import content_sha256

T = TypeVar("T")

CACHE = SEARCH_INDEX
MEANING = "an image's part of 100% for all that were compared (softmax): which fits best, not whether one fits"
"""What the percentages of found images are."""
_SCORED_AT_ONCE = 32
_COMPARED_AT_ONCE = 4  # few, so that their patches stay in the processor's cache


@dataclass
class Found:
    """An image that was found for a query.

    Attributes:
        path: path of its file.
        score: ranking score; higher is better.
        map: (rows, columns), where the model looked.
        name: name of that map, see `vlabs.attention.maps.look_of`.
        share: softmax of the scores over the images that were scored, in [0, 1].
    """

    path: Path
    score: float
    map: np.ndarray
    name: str
    share: float = 0.0


class Search:
    """Ranks the images of a folder by text.

    Args:
        checkpoint: a model that was pre-trained or fine-tuned for retrieval.
        pictures: image files.
        index_dir: where first passes are stored, by the content of the files and not by their names.
        device: `cpu` or `cuda`.
        first: the number of images, by similarity of [cls] and ξ, whose patches are compared with ξ too.
        skip_bad: leave out images that cannot be decoded, and name them; otherwise they are an error.

    Raises:
        UserError: there is no image, or one cannot be decoded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pictures: Sequence[Path],
        index_dir: Path = CACHE,
        device: str = "cpu",
        skip_bad: bool = False,
        first: int = 2000,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model.to(device)
        self.preprocessing = checkpoint.preprocessing
        self.device = device
        self.first = first
        self.passes = FirstPasses(index_dir, self.model.vision, self.preprocessing, torch.int8)
        keys = {path: key for path in pictures if (key := _read(content_sha256, path, skip_bad)) is not None}
        missing = {key: path for path, key in keys.items() if key not in self.passes}
        if missing:
            read = ((key, _read(self._tensor, path, skip_bad)) for key, path in missing.items())
            self.passes.fill(read, len(missing))
        self.pictures, self.keys = [], []
        for path, key in keys.items():
            if key in self.passes:
                self.pictures.append(path)
                self.keys.append(key)
            elif path != missing[key]:
                show(f"left out: {path} is the same as {missing[key]}")
        if not self.pictures:
            raise UserError("--images holds no image")
        # All of them lie together, which is little: the tokens are some hundred times as much.
        has_prior = self.model.prior is not None
        self.nearest = Nearest(self.passes.store.read(self.keys, ["cls"])["cls"]) if has_prior else None

    @property
    def kilobytes(self) -> float:
        """The size of an image in the index."""
        return self.passes.store.bytes_each / 1e3

    def _tensor(self, path: Path) -> Tensor:
        return self.preprocessing.image(open_image(path))[None]

    @torch.inference_mode()
    def find(self, query: str, k: int | None = 32) -> list[Found]:
        """The scored images, best first. No image is decoded or encoded.

        Args:
            query: any text.
            k: the number of images, by similarity to ξ (`vlabs.ranking.shortlist`), that go through the whole network;
                None for all. Without ξ, or without a bottom-up [cls], all are scored.
        """
        check_text("a query", query)
        texts = encode_texts(self.model, self.preprocessing, [query])
        chosen: Sequence[int] = range(len(self.pictures))
        if k is not None and k < len(chosen) and self.nearest is not None and texts.prior is not None:
            chosen = self._shortlist(whole(texts.prior).float().cpu(), k)
        found = []
        for start in range(0, len(chosen), _SCORED_AT_ONCE):
            found += self._scored(texts, chosen[start : start + _SCORED_AT_ONCE])
        shares = torch.tensor([item.score for item in found], dtype=torch.float64).softmax(dim=0).tolist()
        found = [replace(item, share=share) for item, share in zip(found, shares, strict=True)]
        return sorted(found, key=lambda item: -item.score)

    def _shortlist(self, prior: Tensor, k: int) -> list[int]:
        """The k images most similar to ξ (1, D), among those with the most similar [cls]."""
        assert self.nearest is not None
        _, first = self.nearest.find(prior, max(self.first, k))
        parts = []
        for some in first.split(_COMPARED_AT_ONCE):
            seen = self.passes.seen([self.keys[n] for n in some.tolist()])
            cls, patches, asked = (part.to(self.device) for part in (*seen, prior))
            parts.append(similarities(cls, patches, asked, self.model.pool))
        like = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
        best = Similarity(*like)[:][:, 0].topk(min(k, len(first))).indices
        return first[best].tolist()  # type: ignore[no-any-return]

    def _scored(self, texts: EncodedTexts, some: Sequence[int]) -> list[Found]:
        """Score some images with one text, in a batch."""
        bottom_up = self.model.vision.encode(self.passes.read([self.keys[n] for n in some]))
        states, mask = texts.padded(torch.zeros(len(some), dtype=torch.int64, device=self.device))
        prior = None if texts.prior is None else texts.prior.expand(len(some), *texts.prior.shape[1:])
        output = self.model.join(bottom_up, prior, states, mask, read_image=True)
        scores = self.model.head.score(output.pooled_features).tolist()  # type: ignore[operator]
        look = look_of(self.model, output)
        return [
            Found(self.pictures[n], score, map[0], name)
            for n, score, map, name in zip(some, scores, look.maps, look.names, strict=True)
        ]

    def show(self, found: Sequence[Found]) -> list[Cell]:
        """A figure of found images, each with its rank, share and map."""
        cells = []
        for place, item in enumerate(found, start=1):
            image = open_image(item.path)
            view = as_view(image, self.preprocessing.box(image.size))
            cells.append(Cell(view, item.map, item.name, note=f"{place}: {item.path.name} {item.share:.1%}"))
        return cells


def list_pictures(folder: str | Path) -> list[Path]:
    """The image files under a folder, by their suffixes, sorted; the number of other files is printed.

    Raises:
        UserError: the folder does not exist, or has no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--images {folder}: there is no such folder")
    suffixes = known_suffixes()
    files = list(walk(folder))
    pictures = [path for path in files if path.suffix.lower() in suffixes]
    others = Counter(path.suffix.lower() or path.name for path in files if path.suffix.lower() not in suffixes)
    if others:
        named = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        show(f"left out: {others.total()} files that are no images by their names ({named})")
    if not pictures:
        raise UserError(f"--images {folder}: there is no image in it")
    return pictures


def _read(read: Callable[[Path], T], path: Path, skip_bad: bool) -> T | None:
    """What is read from an image file; of a bad one that may be left out, a line that names it, and None."""
    try:
        return read(path)
    except UserError as error:
        if not skip_bad:
            raise
        show(f"left out: {error}")
        return None
