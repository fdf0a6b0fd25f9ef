"""Nearest neighbors of a vector among many."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.errors import show

MANY = 300_000
"""Vectors from which on not all are compared, where FAISS is installed (`pip install 'vlabs[faiss]'`)."""
_LISTS = 64  # that are looked through, of about the square root of the number of vectors


class Nearest:
    """Vectors by their cosine with a query: all are compared or, if there are very many, those that FAISS finds.

    FAISS sorts vectors into lists by their nearest center, and compares only the lists nearest to the query.

    Args:
        vectors: (N, D).
        many: the N from which FAISS is used.
    """

    def __init__(self, vectors: Tensor, many: int = MANY) -> None:
        self.vectors = F.normalize(vectors.float(), dim=1)
        self.index: Any = None
        if len(vectors) < many:
            return
        if importlib.util.find_spec("faiss") is None:
            show(f"all of {len(vectors):,} images are compared at every query: pip install 'vlabs[faiss]' for fewer")
            return
        import faiss

        lists = int(len(vectors) ** 0.5)
        self.index = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        self.index.nprobe = min(_LISTS, lists)
        self.index.train(self.vectors[torch.randperm(len(vectors))[: 64 * lists]].numpy())
        self.index.add(self.vectors.numpy())

    def find(self, vector: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines and indices of the k best for a vector (1, D), or of all if there are fewer; best first."""
        vector = F.normalize(vector.float(), dim=1)
        if self.index is None:
            best = (self.vectors @ vector[0]).topk(min(k, len(self.vectors)))
            return best.values, best.indices
        cosines, places = (torch.from_numpy(found[0]) for found in self.index.search(vector.numpy(), k))
        return cosines[places >= 0], places[places >= 0]
