"""Masked language modeling: which tokens a model has to guess (Devlin et al., 2019, section 3.1)."""

from __future__ import annotations

import json

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vlabs.data.tokenizer import special_token
from vlabs.errors import UserError

IGNORED = -100  # cross_entropy's ignore_index


class TokenMasker:
    """Chooses tokens and masks them: 80% become `<mask>`, 10% a random token, 10% stay.

    Args:
        tokenizer: a `tokenizers` JSON.
        share: share of the tokens that are chosen, in (0, 1).
        whole_words: choose whole words; a word starts at a token that begins with a space, or not with `##`.

    Raises:
        UserError: the tokenizer has no mask token.
    """

    def __init__(self, tokenizer: str, share: float = 0.15, whole_words: bool = False) -> None:
        content = json.loads(tokenizer)
        special = [int(token["id"]) for token in content["added_tokens"]]
        vocabulary = Tokenizer.from_str(tokenizer).get_vocab()
        mask_id = special_token(tokenizer, "mask")
        if mask_id is None:
            raise UserError("the tokenizer has no mask token (<mask> or [MASK]): choose another")
        self.mask_id = mask_id
        self.size = max(*vocabulary.values(), *special) + 1
        self.special = torch.zeros(self.size, dtype=torch.bool)
        self.special[special] = True
        # Byte-level tokenizers and SentencePiece mark tokens that begin a word, WordPiece those that do not.
        marks_rest = content["model"].get("type") == "WordPiece"
        begins = [n for token, n in vocabulary.items() if token.startswith("##" if marks_rest else ("Ġ", "▁"))]
        self.starts_word = torch.full((self.size,), marks_rest)
        self.starts_word[begins] = not marks_rest
        self.ordinary = (~self.special).nonzero()[:, 0]
        self.share = share
        self.whole_words = whole_words

    def __call__(self, input_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mask token ids (n, T) on the CPU. Returns the model's input, and the targets (`IGNORED` elsewhere)."""
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
