"""Pre-training on captions as METER does: masked language modeling and image-text matching, with the prior loss."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.data.captions import CaptionBatch, CaptionDataModule
from vlabs.data.module import Wants
from vlabs.models.absvit import BottomUp
from vlabs.models.heads import PretrainHead
from vlabs.tasks.base import Losses
from vlabs.tasks.captions import CaptionTask
from vlabs.tasks.masking import IGNORED, TokenMasker
from vlabs.tasks.negatives import draw_false
from vlabs.utils.options import OpenShare


@dataclass(eq=False, repr=False)
class PretrainTask(CaptionTask):
    """Masked language modeling (MLM) and image-text matching (ITM), with the other losses of `VisionLanguageTask`.

    For MLM each caption is masked and read with its own image. For ITM each pair is false with probability 1/2;
    `negatives` chooses the false partner. The prior loss is over the pairs that match.

    Args:
        mlm_probability: share of the tokens that are masked.
        whole_words: mask whole words.
    """

    name = "pretrain"
    monitor = "val/match_accuracy"

    _: KW_ONLY
    mlm_probability: OpenShare = 0.15
    whole_words: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.model.head, PretrainHead)
        self.masker = TokenMasker(self.preprocessing.tokenizer, self.mlm_probability, self.whole_words)

    def wants(self, data: CaptionDataModule) -> Wants:
        """See `VisionLanguageTask`; also false images, if they are drawn from the dataset as in METER."""
        return replace(super().wants(data), false_images=self.negatives == "dataset")

    def losses(self, batch: CaptionBatch) -> Losses:
        """The losses of MLM and ITM, which share the first pass over the images."""
        head = self.model.head
        assert isinstance(head, PretrainHead)
        generator = self.generator(batch)
        bottom_up = self.model.vision.encode(batch.images)
        reconstruct = self.reconstruction_weight > 0

        masked, labels = (t.to(batch.input_ids.device) for t in self.masker(batch.input_ids.cpu(), generator))
        guessed = self.model(
            bottom_up, masked, batch.attention_mask, batch.image_index, reconstruct=reconstruct, all_features=True
        )
        hidden = labels != IGNORED
        token_logits = head.token_logits(guessed.text_features[hidden]).float()
        # If no token was chosen, an empty sum keeps the head in the graph, as DDP needs.
        mlm = F.cross_entropy(token_logits, labels[hidden]) if hidden.any() else token_logits.sum()

        input_ids, attention_mask, image_index, matches = self._pairs(batch, bottom_up, generator)
        joined = self.model(bottom_up, input_ids, attention_mask, image_index, reconstruct=reconstruct)
        match_logits = joined.logits.float()
        itm = F.cross_entropy(match_logits, matches.long())

        others = self.prior_losses(joined, input_ids, batch.image_ids, matches)
        # From MLM, where each caption is read with its own image; some pairs of ITM are false.
        others |= self.pointing_losses(guessed, batch.coverage, images=batch.images)
        if "reconstruction" in joined.losses:
            others["reconstruction"] = (guessed.losses["reconstruction"] + joined.losses["reconstruction"]) / 2
        right = {
            "match": match_logits.argmax(dim=1) == matches,
            "mlm": token_logits.argmax(dim=1) == labels[hidden],
        }
        return Losses({"mlm": mlm, "itm": itm}, len(batch.caption_ids), others, right)

    def _pairs(
        self, batch: CaptionBatch, bottom_up: BottomUp, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The pairs of ITM: token ids, masks, image index, and which of them match (n,)."""
        n = len(batch.caption_ids)
        matches = (torch.rand(n, generator=generator) < 0.5).to(batch.input_ids.device)
        if batch.false_image_index is not None:
            index = torch.where(matches, batch.image_index, batch.false_image_index)
            return batch.input_ids, batch.attention_mask, index, matches
        pool_ids, pool_mask, pool_images = self.caption_pool(batch)
        similarity = self.pool_similarity(pool_ids, pool_mask, bottom_up, batch.image_index)
        which, real = draw_false(batch.image_ids, pool_images, 1, generator, similarity)
        matches = matches | ~real[:, 0]
        extra = pool_ids.shape[1] - batch.input_ids.shape[1]
        own_ids = F.pad(batch.input_ids, (0, extra), value=self.preprocessing.pad_token_id)
        own_mask = F.pad(batch.attention_mask, (0, extra))
        chosen = which[:, 0]
        return (
            torch.where(matches[:, None], own_ids, pool_ids[chosen]),
            torch.where(matches[:, None], own_mask, pool_mask[chosen]),
            batch.image_index,
            matches,
        )
