"""Scores of many texts with one image; what depends only on the text is computed once per text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlabs.data.preprocessing import Preprocessing
from vlabs.models.absvit import BottomUp
from vlabs.models.topdown import whole
from vlabs.models.vlm import VisionLanguageModel


@dataclass
class EncodedTexts:
    """M encoded texts.

    Attributes:
        states: (Σ lengths, D), the concatenated states of all texts, without padding.
        starts, lengths: (M,), the position of each text in `states`.
        prior: ξ, (M, D_vision); None without feedback.
    """

    states: Tensor
    starts: Tensor
    lengths: Tensor
    prior: Tensor | None

    def __len__(self) -> int:
        return len(self.lengths)

    def padded(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """States (n, T, D) and mask (n, T) of some texts; padding is zeros and masked."""
        lengths = self.lengths[which]
        offset = torch.arange(int(lengths.max()), device=lengths.device)
        mask = offset < lengths[:, None]
        # Past the end of a text lies the next one; the mask sets that to 0.
        position = (self.starts[which][:, None] + offset).clamp(max=len(self.states) - 1)
        return self.states[position] * mask.unsqueeze(-1), mask


@torch.inference_mode()
def encode_texts(
    model: VisionLanguageModel, preprocessing: Preprocessing, texts: Sequence[str], batch_size: int = 256
) -> EncodedTexts:
    """Run the text encoder and the ξ map once per text, with texts of similar length in one batch.

    Args:
        model: the model, on the device where the texts will be.
        batch_size: texts per batch.
    """
    lengths = [0] * len(texts)
    states: list[Tensor] = [torch.empty(0)] * len(texts)
    priors: list[Tensor] = [torch.empty(0)] * len(texts)
    for which, length, encoded, prior in _in_batches(model, preprocessing, texts, batch_size):
        for row, n in enumerate(which):
            lengths[n] = length[row]
            states[n] = encoded[row, : length[row]]
            if prior is not None:
                priors[n] = prior[row]
    # Starts are the sums of the lengths before.
    ends = torch.tensor(lengths, device=states[0].device)
    return EncodedTexts(
        torch.cat(states), ends.cumsum(0) - ends, ends, torch.stack(priors) if model.prior is not None else None
    )


@torch.inference_mode()
def encode_priors(
    model: VisionLanguageModel, preprocessing: Preprocessing, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """ξ of M texts, (M, D_vision), float32 on the CPU; only one batch of states is in memory.

    Args:
        model: a model with a prior.
        batch_size: texts per batch.
    """
    priors = torch.empty(len(texts), model.vision.width)  # of several ξ the mean
    for which, _, _, prior in _in_batches(model, preprocessing, texts, batch_size):
        assert prior is not None
        priors[which] = whole(prior).float().cpu()
    return priors


def _in_batches(
    model: VisionLanguageModel, preprocessing: Preprocessing, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], list[int], Tensor, Tensor | None]]:
    """Batches of texts of similar length: their positions, lengths, states and ξ."""
    device = next(model.parameters()).device
    ids = preprocessing.token_ids(texts)
    order = sorted(range(len(ids)), key=lambda n: len(ids[n]))
    for start in range(0, len(order), batch_size):
        which = order[start : start + batch_size]
        input_ids, attention_mask = (t.to(device) for t in preprocessing.pad([ids[n] for n in which]))
        states = model.text(input_ids, attention_mask)
        yield which, [len(ids[n]) for n in which], states, model.prior_of(states, input_ids, attention_mask)


@torch.inference_mode()
def score_texts(
    model: VisionLanguageModel, bottom_up: BottomUp, texts: EncodedTexts, which: Tensor, batch_size: int = 64
) -> Tensor:
    """The ranking score of one image with some texts; every pair goes through the second pass and the fusion.

    Args:
        model: a model whose head has a `score`.
        bottom_up: the first pass over the image.
        which: (n,) indices of the texts.
        batch_size: pairs per batch.

    Returns:
        (n,), float32.
    """
    order = texts.lengths[which].argsort(stable=True)
    scores = torch.empty(len(which), device=which.device, dtype=torch.float32)
    for part in order.split(batch_size):
        chosen = which[part]
        states, mask = texts.padded(chosen)
        prior = texts.prior[chosen] if texts.prior is not None else None
        output = model.join(bottom_up, prior, states, mask)
        scores[part] = model.head.score(output.pooled_features).float()  # type: ignore[operator]
    return scores
