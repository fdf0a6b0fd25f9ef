"""The naming task: each patch predicts the words of what lies on it, which teaches an encoder words and places."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class WordHead(nn.Module):
    """A linear map from patch tokens to words, which are the tokens of the text encoder's vocabulary.

    Args:
        width: D of the patch tokens.
        vocab_size: words.
        unspoken: token ids that are not words: padding, and the beginning and the end of a text.
    """

    def __init__(self, width: int, vocab_size: int, unspoken: tuple[int, ...] = (0, 1, 2)) -> None:
        super().__init__()
        self.words = nn.Linear(width, vocab_size)
        # Most words are wrong for most patches: do not begin with learning that.
        nn.init.constant_(self.words.bias, -math.log(max(1, vocab_size - 1)))
        self.register_buffer("unspoken", torch.tensor(unspoken), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (…, vocabulary) of tokens (…, D)."""
        logits: Tensor = self.words(tokens)
        return logits

    def loss(self, tokens: Tensor, input_ids: Tensor, image_index: Tensor, coverage: Tensor) -> Tensor:
        """Binary cross-entropy of every patch and every word of the batch, summed over words, mean over patches.

        The target of a word and a patch is the share of the patch that texts with the word are about. Words of other
        images in the batch are negatives. Words in no text of the batch do not count, whatever the size of the
        vocabulary. A patch that no text is about has no words.

        Args:
            tokens: (B, N, D).
            input_ids: (n, T), texts.
            image_index: (n,), the image of each text.
            coverage: (n, N) in [0, 1], how much of every patch a text is about.
        """
        words, place = input_ids.unique(return_inverse=True)
        # (n, T) pairs of text and word, without padding and its like.
        spoken = ~torch.isin(input_ids, self.unspoken)  # type: ignore[arg-type]
        text, word = spoken.nonzero()[:, 0], place[spoken]
        target = tokens.new_zeros(len(tokens) * len(words), tokens.shape[1], dtype=torch.float32)
        # A row per pair of image and word; of several texts with the word, the largest share counts.
        row = image_index[text] * len(words) + word
        target.scatter_reduce_(0, row[:, None].expand(-1, tokens.shape[1]), coverage[text], "amax")
        target = target.view(len(tokens), len(words), -1).transpose(1, 2)
        logits = F.linear(tokens, self.words.weight[words], self.words.bias[words]).float()
        said = ~torch.isin(words, self.unspoken)  # type: ignore[arg-type]
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return losses[..., said].sum() / max(1, len(tokens) * tokens.shape[1])

    def precision(self, tokens: Tensor, input_ids: Tensor, image_index: Tensor, coverage: Tensor) -> Tensor:
        """R-precision of every text that is about something, in [0, 1].

        Of the k different words of a text, how many are among the k best of the whole vocabulary in the patch that the
        text covers most; a text of one word is right or wrong.

        Args:
            tokens, input_ids, image_index, coverage: as in `loss`.

        Returns:
            (m,) for the m texts that cover anything.
        """
        known = coverage.amax(dim=1) > 0
        input_ids, image_index, coverage = input_ids[known], image_index[known], coverage[known]
        patch = tokens[image_index, coverage.argmax(dim=1)]
        logits = self.words(patch).float()
        logits[:, self.unspoken] = float("-inf")  # type: ignore[index]
        right = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, input_ids, True)
        right[:, self.unspoken] = False  # type: ignore[index]
        count = right.sum(dim=1)
        place = logits.argsort(dim=1, descending=True).argsort(dim=1)  # the rank of every word, from 0
        found = (right & (place < count[:, None])).sum(dim=1)
        return found / count.clamp_min(1)
