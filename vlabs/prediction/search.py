"""Ranking the pictures of a folder by text: ξ finds the most promising ones, the whole network ranks those."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.attention.figures import Cell, as_view
from vlabs.attention.maps import default_map, look_by
from vlabs.checkpoints.checkpoint import Checkpoint
from vlabs.data.decoding import known_suffixes
from vlabs.data.preprocessing import check_text
from vlabs.errors import UserError, show
from vlabs.prediction.predictor import open_image
from vlabs.ranking.index import ImageIndex
from vlabs.ranking.texts import encode_texts, score_texts
from vlabs.utils.archives import walk
from vlabs.utils.arguments import SEARCH_INDEX
from vlabs.utils.files import content_sha256

CACHE = SEARCH_INDEX
MEANING = "a score (a logit) that ranks the pictures of one text; scores of two texts do not compare"
"""What the numbers of found pictures are."""


@dataclass
class Found:
    """A picture and its ranking score for a query; higher is better."""

    path: Path
    score: float


class Search:
    """Ranks the pictures of a folder by text.

    Args:
        checkpoint: of a model that was pre-trained or fine-tuned for retrieval.
        pictures: files, each a picture.
        index_dir: where the index is kept.
        device: `cpu` or `cuda`.
        skip_bad: leave out pictures that cannot be decoded, and name them; else they are an error.

    Raises:
        UserError: there is no picture, or one cannot be decoded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        pictures: Sequence[Path],
        index_dir: Path = CACHE,
        device: str = "cpu",
        skip_bad: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model.to(device)
        self.preprocessing = checkpoint.preprocessing
        self.device = device
        self.pictures = list(pictures)
        self.seen: Tensor | None = None
        if skip_bad:
            self.pictures = [path for path in self.pictures if _decodes(path)]
        if not self.pictures:
            raise UserError("--images holds no picture")
        if self.model.prior is not None and self.model.vision.has_bottom_up:
            index = ImageIndex(index_dir.expanduser() / f"{content_sha256(checkpoint.path)[:16]}.safetensors")
            digests = [content_sha256(path) for path in self.pictures]
            index.add(zip(digests, self.pictures, strict=True), self._bottom_up_cls)
            vectors = [index.vectors[digest] for digest in digests]
            width = self.model.vision.width
            if not all(one.shape == (width,) and one.is_floating_point() and one.isfinite().all() for one in vectors):
                raise UserError(f"{index.path} holds no finite numbers of this model: remove it")
            self.seen = torch.stack(vectors)

    @torch.inference_mode()
    def _bottom_up_cls(self, path: Path) -> Tensor:
        return self.model.vision.encode(self._tensor(path)).cls[0].float().cpu().clone()

    def _tensor(self, path: Path) -> Tensor:
        return self.preprocessing.image(open_image(path))[None].to(self.device)

    @torch.inference_mode()
    def find(self, query: str, k: int | None = 32) -> list[Found]:
        """The pictures that were scored, best first.

        Args:
            query: any text.
            k: pictures that go through the whole network, those with the largest cosine of ξ and the bottom-up [cls];
                None for all. Where there is no ξ, or no bottom-up [cls], all are scored.
        """
        check_text("a query", query)
        texts = encode_texts(self.model, self.preprocessing, [query])
        chosen = list(range(len(self.pictures)))
        if k is not None and self.seen is not None and texts.prior is not None:
            similarity = F.cosine_similarity(texts.prior[0].float().cpu(), self.seen, dim=1)
            chosen = similarity.topk(min(k, len(chosen))).indices.tolist()
        only = torch.zeros(1, dtype=torch.int64, device=self.device)
        found = []
        for n in chosen:
            bottom_up = self.model.vision.encode(self._tensor(self.pictures[n]))
            found.append(Found(self.pictures[n], float(score_texts(self.model, bottom_up, texts, only)[0])))
        return sorted(found, key=lambda item: -item.score)

    def show(self, query: str, found: Sequence[Found]) -> list[Cell]:
        """Found pictures, each with its place, score and map for the query."""
        input_ids, mask = self.preprocessing.pad(self.preprocessing.token_ids([query]))
        cells = []
        for place, item in enumerate(found, start=1):
            image = open_image(item.path)
            tensor = self.preprocessing.image(image)[None]
            look = look_by(self.model, tensor, input_ids, mask, default_map(self.model))
            view = as_view(image, self.preprocessing.box(image.size))
            cells.append(Cell(view, look.maps[0, 0], look.names[0], note=f"{place}: {item.path.name} {item.score:.2f}"))
        return cells


def list_pictures(folder: str | Path) -> list[Path]:
    """The files under a folder whose names end as pictures' do, sorted; how many others there are is said.

    Raises:
        UserError: there is no such folder, or no picture in it.
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
        show(f"left out: {others.total()} files that are no pictures by their names ({named})")
    if not pictures:
        raise UserError(f"--images {folder}: there is no picture in it")
    return pictures


def _decodes(path: Path) -> bool:
    try:
        open_image(path)
    except UserError as error:
        show(f"left out: {error}")
        return False
    return True
