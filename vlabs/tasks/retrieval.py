"""Fine-tuning for retrieval, as METER's `irtr`: the true caption of an image against false ones."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.data.captions import CaptionBatch, CaptionDataModule
from vlabs.data.module import Wants
from vlabs.errors import UserError
from vlabs.models.absvit import BottomUp
from vlabs.models.heads import RankingHead
from vlabs.tasks.base import Losses
from vlabs.tasks.captions import CaptionTask
from vlabs.tasks.negatives import draw_false
from vlabs.utils.options import Pairs, Size


@dataclass(eq=False, repr=False)
class RetrievalTask(CaptionTask):
    """Cross-entropy over the ranking scores of one true and m false captions per image.

    Args:
        num_false: largest number of false captions per image; a small batch may have fewer.
        ranking_images: images of the validation split that are ranked against all their captions after each validation,
            by which the best checkpoint is chosen.
    """

    name = "retrieval"
    monitor = "val/ir@1"

    _: KW_ONLY
    num_false: Size = 15
    ranking_images: Pairs = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.model.head, RankingHead)
        self.model.head.match.requires_grad_(False)  # kept from pre-training; this task does not use it

    def wants(self, data: CaptionDataModule) -> Wants:
        """See `VisionLanguageTask`; also false captions, if they are drawn from the dataset as in METER.

        Raises:
            UserError: the validation split is too small for a ranking.
        """
        if len(data.rows(data.val_split)) < 2:
            raise UserError(f"data.val_split={data.val_split} has one image, but ranking needs at least 2")
        return replace(super().wants(data), false_captions=self.num_false if self.negatives == "dataset" else 0)

    def losses(self, batch: CaptionBatch) -> Losses:
        """The loss of ranking the candidates of each image; the first candidate is the true one."""
        bottom_up = self.model.vision.encode(batch.images)
        input_ids, attention_mask, which, real = self._candidates(batch, bottom_up)
        n, candidates = which.shape
        used, position = which.flatten().unique(return_inverse=True)
        output = self.model(
            bottom_up,
            input_ids[used],
            attention_mask[used],
            batch.image_index.repeat_interleave(candidates),
            position,
            reconstruct=self.reconstruction_weight > 0,
        )
        scores = output.logits.float().view(n, candidates).masked_fill(~real, float("-inf"))
        loss = F.cross_entropy(scores, torch.zeros(n, dtype=torch.int64, device=scores.device))
        true = slice(None, None, candidates)
        image_ids = batch.image_ids.repeat_interleave(candidates)
        others = output.losses | self.prior_losses(output, input_ids[which.flatten()], image_ids, true)
        others |= self.pointing_losses(output, batch.coverage, true, batch.images)
        return Losses({"ranking": loss}, n, others, {"ranking": scores.argmax(dim=1) == 0})

    def _candidates(self, batch: CaptionBatch, bottom_up: BottomUp) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Texts and masks (P, T); positions (n, 1 + m) of each caption and m false ones; which of these are real."""
        n = len(batch.caption_ids)
        own = torch.arange(n, device=batch.input_ids.device)[:, None]
        if batch.false_input_ids is not None and batch.false_attention_mask is not None:
            false_ids, false_mask = batch.false_input_ids.flatten(0, 1), batch.false_attention_mask.flatten(0, 1)
            ids, masks = self._stack(batch.input_ids, batch.attention_mask, false_ids, false_mask)
            m = batch.false_input_ids.shape[1]
            which = torch.cat([own, n + torch.arange(n * m, device=own.device).view(n, m)], dim=1)
            return ids, masks, which, torch.ones_like(which, dtype=torch.bool)
        pool_ids, pool_mask, pool_images = self.caption_pool(batch)
        similarity = self.pool_similarity(pool_ids, pool_mask, bottom_up, batch.image_index)
        others, real = draw_false(batch.image_ids, pool_images, self.num_false, self.generator(batch), similarity)
        ids, masks = self._stack(batch.input_ids, batch.attention_mask, pool_ids, pool_mask)
        keep = real.any(dim=0)  # leave out columns without a real candidate
        return ids, masks, torch.cat([own, n + others[:, keep]], 1), torch.cat([own >= 0, real[:, keep]], 1)

    def _stack(self, ids: Tensor, mask: Tensor, other_ids: Tensor, other_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and masks of two batches of texts, padded to one length."""
        length = max(ids.shape[1], other_ids.shape[1])
        padding = self.preprocessing.pad_token_id
        return (
            torch.cat([F.pad(t, (0, length - t.shape[1]), value=padding) for t in (ids, other_ids)]),
            torch.cat([F.pad(t, (0, length - t.shape[1])) for t in (mask, other_mask)]),
        )
