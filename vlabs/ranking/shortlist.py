"""Which pairs get an exact score: those whose images are most similar to ξ, as a whole and in some patch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.models.flair import TextPool


def best_both_ways(blocks: Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """The k best of every row and of every column of a matrix, of which only one block is in memory.

    Args:
        blocks: rows (n, M) of the matrix, from the first to the last.
        k: at least 1; fewer are returned if there are fewer.

    Returns:
        Columns (N, k) of every row's best, and rows (k, M) of every column's best, best first.
    """
    of_row: list[Tensor] = []
    best = place = None
    first = 0
    for block in blocks:
        of_row.append(block.topk(min(k, block.shape[1]), dim=1).indices.cpu())
        block = block.cpu()
        rows = torch.arange(first, first + len(block))[:, None].expand_as(block)
        first += len(block)
        # Of every column, the best so far compete with this block; `place` has the rows that they come from.
        together = block if best is None else torch.cat([best, block])
        rows = rows if place is None else torch.cat([place, rows])
        best, order = together.topk(min(k, len(together)), dim=0)
        place = rows.gather(0, order)
    assert place is not None
    return torch.cat(of_row), place


_TEMPERATURE = 0.1  # at which patches are counted, by how like ξ they are


def similarities(cls: Tensor, patches: Tensor, prior: Tensor, pool: TextPool | None = None) -> tuple[Tensor, Tensor]:
    """Similarities of n images and m texts: the cosine of ξ and the bottom-up [cls], and of ξ and the patches.

    The latter is `logsumexp_i(cos(ξ, z_i) / 0.1)` over the patches; of a model with a `pool` that is trained, the
    cosine of ξ and the patches that it pools for ξ. Their sum, each divided by its standard deviation, finds more of
    the exact best than either.

    Args:
        cls: (n, D).
        patches: z of the patches, (n, P, D), each at any scale.
        prior: ξ, (m, D).
        pool: see `VisionLanguageModel`.

    Returns:
        Two of (n, m), float32.
    """
    raw, prior = prior, F.normalize(prior.float(), dim=1).T
    patches = patches.float()
    if pool is not None and not pool.is_new:
        pooled = pool(patches.to(pool.bias), raw.to(pool.bias))
        return F.normalize(cls.float(), dim=1) @ prior, pooled.float()
    lengths = torch.linalg.vector_norm(patches, dim=2, keepdim=True).clamp(min=1e-12)
    # (n, P, m). Divided after the product, so that no normalized copy of all patches is made.
    like = patches @ prior / lengths
    return F.normalize(cls.float(), dim=1) @ prior, (like / _TEMPERATURE).logsumexp(dim=1)


class Similarity:
    """The sum of `similarities`, each over its standard deviation, of many images and captions, by blocks of rows.

    Args:
        cls, patches: (N, M); they may be memory-mapped.
    """

    def __init__(self, cls: np.ndarray, patches: np.ndarray) -> None:
        self.parts = cls, patches
        # A sample, because the matrices may be larger than memory.
        some = np.linspace(0, len(cls) - 1, num=min(len(cls), 256), dtype=int)
        self.deviations = [max(float(part[some].std()), 1e-6) for part in self.parts]

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, images: int | slice) -> Tensor:
        """The row of one image (M,), or of several (n, M)."""
        summands = (part[images] / by for part, by in zip(self.parts, self.deviations, strict=True))
        return torch.from_numpy(sum(summands))

    def blocks(self, images_at_once: int = 256) -> Iterator[Tensor]:
        """All rows, in blocks."""
        for first in range(0, len(self), images_at_once):
            yield self[first : first + images_at_once]


def shortlist(blocks: Iterable[Tensor], k: int) -> list[np.ndarray]:
    """The k best captions of every image and every caption for which the image is among the k best.

    Args:
        blocks: similarities of images and captions, as in `best_both_ways`.
        k: at least 1.

    Returns:
        The captions of each image, ascending.
    """
    captions, images = best_both_ways(blocks, k)
    pairs = torch.cat(
        [
            torch.stack([torch.arange(len(captions))[:, None].expand_as(captions).flatten(), captions.flatten()]),
            torch.stack([images.flatten(), torch.arange(images.shape[1]).expand_as(images).flatten()]),
        ],
        dim=1,
    ).unique(dim=1)  # sorted by image, then caption
    counts = torch.bincount(pairs[0], minlength=len(captions))
    return [part.numpy() for part in pairs[1].split(counts.tolist())]


def share_kept(wanted: list[np.ndarray], exact: np.ndarray, k: int = 10, images_at_once: int = 256) -> dict[str, float]:
    """The share of the exact top k in a shortlist, in percent: for the `texts` of an image, and the `images` of a text.

    Args:
        wanted: the output of `shortlist`.
        exact: (N, M), images by captions; read `images_at_once` rows at a time.
    """
    starts = range(0, len(exact), images_at_once)
    texts, images = best_both_ways((torch.from_numpy(exact[n : n + images_at_once].copy()) for n in starts), k)
    width = exact.shape[1]
    # A pair as one number, image · M + caption, so that `np.isin` can compare.
    listed = np.concatenate([image * width + captions for image, captions in enumerate(wanted)])
    of_images = np.arange(len(texts))[:, None] * width + texts.numpy()
    of_texts = images.numpy() * width + np.arange(width)
    return {
        "texts": 100 * float(np.isin(of_images, listed).mean()),
        "images": 100 * float(np.isin(of_texts, listed).mean()),
    }
