"""The base of tasks on image-caption pairs: false partners, logging, and a small ranking in validation."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from vlabs.data.captions import CaptionBatch, CaptionDataModule
from vlabs.data.images import ImageReader
from vlabs.errors import UserError
from vlabs.metrics.retrieval import retrieval_ranks
from vlabs.models.absvit import BottomUp
from vlabs.models.topdown import whole
from vlabs.ranking.texts import encode_texts, score_texts
from vlabs.tasks.negatives import gather_captions
from vlabs.tasks.vision_language import VisionLanguageTask
from vlabs.utils.options import Count, Positive, Seed
from vlabs.utils.ranks import rank_and_world


@dataclass(eq=False, repr=False)
class CaptionTask(VisionLanguageTask):
    """A task on image-caption pairs.

    Args:
        negatives: where false partners come from. `dataset` draws any image or caption of the data, as METER does;
            `batch` draws captions of other images in the batches of all ranks; `hard` draws them by the similarity of ξ
            and the first pass's [cls].
        hard_temperature: temperature of the softmax that hard negatives are drawn by.
        ranking_images: images of the validation split that are ranked against all their captions after each validation;
            0 for none.
        seed: seed of the negatives.
    """

    reads = CaptionDataModule

    _: KW_ONLY
    negatives: Literal["dataset", "batch", "hard"] = "dataset"
    hard_temperature: Positive = 0.1
    ranking_images: Count = 100
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.negatives == "hard" and self.model.prior is None:
            raise UserError("task.negatives=hard draws by the prior ξ, which model/topdown=none does not have")

    def sample_ids(self, batch: CaptionBatch) -> list[Any]:
        """The captions' ids."""
        return batch.caption_ids

    def shorten_validation(self) -> None:
        """Leave out the ranking."""
        self.ranking_images = 0

    def generator(self, batch: CaptionBatch) -> torch.Generator:
        """A generator seeded by the seed, the epoch and the batch's number in it."""
        return torch.Generator().manual_seed(hash((self.seed, batch.epoch, batch.number)) % 2**63)

    def caption_pool(self, batch: CaptionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (P, T), masks and image ids (P,) that false captions can be drawn from: in training, all ranks'.

        In validation ranks may have different numbers of batches, so gathering could wait forever.
        """
        own = batch.input_ids, batch.attention_mask, batch.image_ids
        return gather_captions(*own, self.preprocessing.pad_token_id) if self.training else own

    @torch.no_grad()
    def pool_similarity(
        self, pool_ids: Tensor, pool_mask: Tensor, bottom_up: BottomUp, image_index: Tensor
    ) -> Tensor | None:
        """Logits for drawing hard negatives, (n, P): cosines of bottom-up [cls] and ξ of P texts, over temperature."""
        if self.negatives != "hard" or self.model.prior is None:
            return None
        cls = bottom_up.cls[image_index]
        prior = whole(self.model.prior(self.model.text(pool_ids, pool_mask), pool_ids, pool_mask))
        return (
            torch.nn.functional.normalize(cls, dim=1)
            @ torch.nn.functional.normalize(prior, dim=1).T
            / (self.hard_temperature)
        )

    def on_validation_epoch_end(self) -> None:
        """Log the recalls of a small ranking."""
        if self.ranking_images:
            for name, value in self.rank_some().items():
                self.log(f"val/{name}", value, prog_bar=name == "ir@1", sync_dist=False)

    def rank_some(self) -> dict[str, float]:
        """Recalls over the first images of the validation split; ranks share the work."""
        data: CaptionDataModule = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = data.rows(data.val_split)
        rows = rows.select(range(min(self.ranking_images, len(rows))))
        texts = [caption for captions in rows["caption"] for caption in captions]
        image_of_caption = torch.tensor([n for n, captions in enumerate(rows["caption"]) for _ in captions])
        encoded = encode_texts(self.model, self.preprocessing, texts)
        images = ImageReader(data.rows(data.val_split), self.preprocessing, stored=self.stored, blind=data.blind)
        everything = torch.arange(len(texts), device=self.device)
        scores = torch.zeros(len(rows), len(texts), device=self.device)
        rank, world = rank_and_world()
        for n in range(rank, len(rows), world):
            _, image = images.read(n, 0)
            assert image is not None
            bottom_up = self.model.vision.encode(self.transfer_batch_to_device(image, self.device, 0))
            scores[n] = score_texts(self.model, bottom_up, encoded, everything)
        if world > 1:
            dist.all_reduce(scores)
        metrics = retrieval_ranks(scores.cpu().numpy(), image_of_caption.numpy()).metrics()
        return {name: value for name, value in metrics.items() if name[-1] != "k" and int(name[3:]) < len(rows)}
