"""Masked language modelling: which tokens a model has to guess (Devlin et al., 2019, section 3.1)."""

from __future__ import annotations

import json

import torch
from torch import Tensor

IGNORED = -100  # cross_entropy's ignore_index


class TokenMasker:
    """Chooses tokens and hides them: 80% become `<mask>`, 10% a random token, 10% stay.

    Args:
        tokenizer: the `tokenizers` JSON of a byte-level tokenizer with `<mask>`.
        share: of the tokens that are chosen, in (0, 1).
        whole_words: choose whole words; a word starts at a token that begins with a space.
    """

    def __init__(self, tokenizer: str, share: float = 0.15, whole_words: bool = False) -> None:
        content = json.loads(tokenizer)
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        vocabulary: dict[str, int] = content["model"]["vocab"]
        self.mask_id: int = special["<mask>"]
        self.size = max(max(vocabulary.values()), max(special.values())) + 1
        self.special = torch.zeros(self.size, dtype=torch.bool)
        self.special[list(special.values())] = True
        self.starts_word = torch.zeros(self.size, dtype=torch.bool)
        self.starts_word[[n for token, n in vocabulary.items() if token.startswith("Ġ")]] = True
        self.ordinary = (~self.special).nonzero()[:, 0]
        self.share = share
        self.whole_words = whole_words

    def __call__(self, input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mask token ids (n, T) on the CPU: what the model reads, and what it has to guess (IGNORED elsewhere)."""
        maskable = ~self.special[input_ids]
        draw = torch.rand(input_ids.shape, generator=generator)
        if self.whole_words:
            # The first ordinary token starts a word too; all tokens of a word take the draw of its first.
            starts = maskable & (self.starts_word[input_ids] | ~torch.roll(maskable, 1, dims=1))
            word = starts.cumsum(dim=1)
            first = torch.zeros(len(input_ids), int(word.max()) + 1 if word.numel() else 1)
            rows, columns = starts.nonzero(as_tuple=True)
            first[rows, word[rows, columns]] = draw[rows, columns]
            draw = first.gather(1, word)
        chosen = maskable & (draw < self.share)
        labels = torch.where(chosen, input_ids, IGNORED)
        fate = torch.rand(input_ids.shape, generator=generator)
        drawn = self.ordinary[torch.randint(len(self.ordinary), input_ids.shape, generator=generator)]
        masked = torch.where(chosen & (fate < 0.8), self.mask_id, input_ids)
        return torch.where(chosen & (fate >= 0.9), drawn, masked), labels
