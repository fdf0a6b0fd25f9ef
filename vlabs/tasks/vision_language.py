"""The base of vision-language tasks: the losses of ξ, which compare pairs over all ranks."""

from __future__ import annotations

import re
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from torchmetrics import MeanMetric

from vlabs.data.images import ImageReader
from vlabs.data.loading import eval_loader
from vlabs.data.module import Wants
from vlabs.errors import UserError
from vlabs.models.prior import AlivePriorLoss, FocusPriorLoss, PriorLoss, RegionPriorLoss, TokenPriorLoss, overlap
from vlabs.models.topdown import whole
from vlabs.models.vlm import VisionLanguageModel, VLMOutput
from vlabs.ranking.passes import FirstPasses
from vlabs.tasks.base import Task, gather
from vlabs.utils.options import NonNegative, Positive, Share
from vlabs.utils.ranks import is_distributed, rank_and_world, say

_OF_LOSSES = {
    "region_prior_temperature": "region_prior_weight",
    "alive_prior_margin": "alive_prior_weight",
    "token_prior_temperature": "token_prior_weight",
    "focus_prior_floor": "focus_prior_weight",
}
"""Options of losses, and the weights of these."""


@dataclass(eq=False, repr=False)
class VisionLanguageTask(Task):
    """Total loss = task loss + w_rec · reconstruction + w_prior · prior (paper, Eq. 14).

    Args:
        reconstruction_weight: weight of the reconstruction loss of the feedback decoders (w_rec of Eq. 14).
        prior_weight: weight of the prior loss between ξ and the second pass's [cls] (w_prior of Eq. 14).
        prior_bottom_up_weight: weight of the prior loss between ξ and the first pass's [cls], which
            `ranker=shortlist` compares.
        prior_loss: form of the prior loss.
        region_prior_weight: weight of the region loss, which pulls ξ to the patches that a text is about; it has no
            effect if the data have no regions.
        region_prior_temperature: temperature τ of the region loss.
        alive_prior_weight: weight of the alive loss, which keeps ξ similar to at least one patch of its image, for
            texts without regions; None for 1 if no text has a region, else 0.
        alive_prior_margin: cosine up to which the alive loss pulls.
        token_prior_weight: weight of the token loss, which tells a text's image from the other images of the batch by
            the patches most similar to ξ.
        token_prior_temperature: temperature τ of the token loss.
        overlap_prior_weight: weight of the overlap of several ξ of a text (`model.prior_count`).
        pool_prior_weight: weight of FLAIR's loss on the patches that are pooled for ξ (`model.pool_heads`).
        focus_prior_weight: weight of the focus loss, FocusCLIP's third branch: ξ, image, and image through its region
            are contrasted, for texts with a region.
        focus_prior_floor: share of the brightness that is left outside the region.
        store: folder for the first passes of a frozen image encoder (`task.freeze=[vision]`), so that each image is
            read and encoded only once.
        store_gb: largest size of that folder in GB, counting what other runs have stored there.
    """

    model: VisionLanguageModel
    _: KW_ONLY
    reconstruction_weight: NonNegative = 0.3
    prior_weight: NonNegative = 0.1
    prior_bottom_up_weight: NonNegative = 0.0
    prior_loss: PriorLoss | None = field(default_factory=PriorLoss)
    region_prior_weight: NonNegative = 1.0
    region_prior_temperature: Positive = 0.1
    alive_prior_weight: NonNegative | None = None
    alive_prior_margin: Share = 0.1
    token_prior_weight: NonNegative = 0.0
    token_prior_temperature: Positive = 0.1
    overlap_prior_weight: NonNegative = 0.1
    pool_prior_weight: NonNegative = 1.0
    focus_prior_weight: NonNegative = 0.0
    focus_prior_floor: Share = 0.5
    store: str | None = None
    store_gb: Positive = 100.0

    of_all_ranks = ("prior", "prior_bottom_up")

    def __post_init__(self) -> None:
        super().__post_init__()
        model = self.model
        if model.prior is None:
            self.prior_bottom_up_weight = 0.0  # of every variant in configs of retrieval
        if self.focus_prior_weight and model.prior is None:
            raise UserError(
                f"task.focus_prior_weight={self.focus_prior_weight:g} teaches ξ, which this model/topdown does not "
                "have: pass 0, or model.unused_prior=true"
            )
        self.alive_by_data = self.alive_prior_weight is None
        self.without_effect = self._drop_idle_weights()
        if self.alive_prior_weight is None:
            self.alive_prior_weight = 1.0
        if self.prior_weight + self.prior_bottom_up_weight == 0:
            self.prior_loss = None
        else:
            self.prior_loss = self.prior_loss or PriorLoss()
            if "feedback" in self.freezes:
                self.prior_loss.requires_grad_(False)
        self.focus_prior_loss = FocusPriorLoss(self.focus_prior_floor) if self.focus_prior_weight else None
        self.region_prior_loss = RegionPriorLoss(self.region_prior_temperature)
        self.alive_prior_loss = AlivePriorLoss(self.alive_prior_margin)
        self.token_prior_loss = TokenPriorLoss(self.token_prior_temperature)
        self.dead = MeanMetric()
        self.has_warned = False
        self.stored: FirstPasses | None = None
        self._freeze_idle_prior()
        if model.pool is not None and not self.pool_prior_weight:
            model.pool.requires_grad_(False)

    def _drop_idle_weights(self) -> list[str]:
        """Set the weights of losses that this model does not have to 0; return what to say of those that were asked
        for, which are those that are not the default.
        """
        model = self.model
        idle = {
            "ξ steers nothing in this model/topdown": [] if model.vision.needs_prior else ["prior", "alive_prior"],
            "this model/topdown has no ξ": [] if model.prior is not None else ["region_prior", "token_prior"],
            "this model/topdown feeds nothing back": [] if model.vision.reconstructs else ["reconstruction"],
            "there is no pool (model.pool_heads=0)": [] if model.pool is not None else ["pool_prior"],
            "a text has one ξ (model.prior_count=1)": [] if model.prior_count > 1 else ["overlap_prior"],
        }
        defaults = {one.name: one.default for one in fields(self)}
        told = []
        for why, losses in idle.items():
            for name in (f"{loss}_weight" for loss in losses):
                weight = getattr(self, name)
                if weight and weight != defaults[name]:
                    told.append(f"task.{name}={weight:g} has no effect: {why}")
                setattr(self, name, 0.0)
        for name, loss in _OF_LOSSES.items():
            if (value := getattr(self, name)) != defaults[name] and getattr(self, loss) == 0:
                told.append(f"task.{name}={value:g} has no effect: task.{loss}=0")
        return told

    def _freeze_idle_prior(self) -> None:
        """Freeze ξ, and what points instead of it, if nothing reads them, neither a part of the model nor a loss: DDP
        would wait for their gradients.
        """
        model, topdown = self.model, self.model.vision.topdown
        pointer = None if topdown is None else topdown.pointer
        names = {one.name for one in fields(self) if re.fullmatch(r"(.+_)?prior_(.+_)?weight", one.name)}
        if pointer is not None:
            names.discard("region_prior_weight")  # it teaches what points
        weights = [getattr(self, name) for name in names]
        is_read = model.vision.learns_prior or model.prior_tokens is not None or any(weights)
        if model.prior is not None and not is_read:
            model.prior.requires_grad_(False)
        if pointer is not None and not self.region_prior_weight:
            pointer.requires_grad_(False)

    def wants(self, data: Any) -> Wants:
        """The regions of texts on the grid of patches, if a loss reads them and the data have regions, and the stored
        first passes.

        Raises:
            UserError: the focus loss is wanted, and the data have no regions; images that are augmented, or that it
                encodes again, have no first pass that could be stored.
        """
        if self.focus_prior_weight and not data.regions_known:
            raise UserError(f"task.focus_prior_weight needs regions, which {data.dir} does not have: pass 0")
        if self.store == "":
            raise UserError("task.store= is empty: name a folder, or pass task.store=null")
        if self.store is not None and self.focus_prior_weight:
            raise UserError("task.focus_prior_weight encodes images again, which task.store does not read: drop one")
        if self.store is not None and data.rand_augment is not None:
            raise UserError(
                f"task.store keeps one first pass per image, but data.rand_augment={data.rand_augment} changes images "
                "each time: pass data.rand_augment=null"
            )
        reads = self.region_prior_weight + self.focus_prior_weight > 0
        grid = self.model.vision.grid_size if reads and data.regions_known else None
        stored = None if self.store is None else self.first_passes
        return Wants(grid, self.model.prior_count, stored=stored)

    def setup(self, stage: str) -> None:
        """Choose between the region and the alive loss, by whether the data have regions; say what has no effect."""
        if stage != "fit":
            return
        for one in self.without_effect:
            say(one)
        if self.model.pool is not None and not self.pool_prior_weight:
            say("task.pool_prior_weight=0: the pool of model.pool_heads is not trained; if new, nothing ranks by it")
        if not self.region_prior_weight:
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        known, priors = data.regions_known, self.model.prior_count
        if known:
            # By default the alive loss is for data without regions, which keep ξ alive themselves.
            if self.alive_by_data:
                self.alive_prior_weight = 0.0
        else:
            self.region_prior_weight = 0.0
            self._freeze_idle_prior()
        if self.trainer.is_global_zero:
            what = f"{known:,} training texts have a region" if known else "the data have no regions"
            say(f"region prior loss: {what}, so its weight is {self.region_prior_weight:g}")
            if known and priors > 1 and not data.phrases_known:
                say(f"model.prior_count={priors}: no region tells the phrases of its text apart, so each ξ is taught "
                    "the whole region; data that name phrases must be prepared again with this version")  # fmt: skip

    def first_passes(self) -> FirstPasses:
        """The stored first passes. They are identified by the weights, which a resumed run has only when loaders are
        made.

        Raises:
            UserError: there is no first pass that could be stored.
        """
        if self.stored is None:
            assert self.store is not None
            self.stored = FirstPasses(Path(self.store), self.model.vision, self.preprocessing, training=True)
        return self.stored

    def on_fit_start(self) -> None:
        """See `Task`; also store the first passes that are not there yet."""
        super().on_fit_start()
        if self.store is None:
            return
        stored = self.first_passes()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rank, world = rank_and_world()
        for split in dict.fromkeys([data.train_split, data.val_split]):
            rows = data.rows(split)
            reader = ImageReader(rows, self.preprocessing, on_bad=data.on_bad, pictures=data.pictures, blind=data.blind)
            every = {reader.key(row, place): (row, place) for row in range(len(rows)) for place in range(data.pictures)}
            stored.check_size(len(stored.missing(every)), self.store_gb)
            mine = [every[key] for key in stored.missing(every, rank, world)]
            if mine:
                stored.fill(eval_loader(_Pictures(reader), mine, data), len(mine))
        self.trainer.strategy.barrier()
        store = stored.store
        store.refresh()
        say(f"first passes of {len(store.places):,} images, {store.bytes_each / 1e3:,.0f} kB each, in {store.folder}")

    def prior_losses(
        self, output: VLMOutput, input_ids: Tensor, image_ids: Tensor, pairs: Tensor | slice = slice(None)
    ) -> dict[str, Tensor]:
        """The prior losses of both passes that have a weight; in training over the pairs of all ranks.

        They train the map from text to ξ, but not the text encoder.

        Args:
            output: the model's output for n pairs of image and text.
            input_ids: (n, T), the texts of the pairs.
            image_ids: (n,), the images of the pairs.
            pairs: the pairs that belong together; all by default.
        """
        if self.prior_loss is None or self.model.prior is None:
            return {}
        prior = self.model.prior(output.text_states[pairs].detach(), input_ids[pairs], output.text_mask[pairs])
        image_ids = image_ids[pairs]
        seen = {}
        if self.prior_weight > 0:
            seen["prior"] = self.model.vision.backbone.pool(output.seen.tokens)[pairs]
        if self.prior_bottom_up_weight > 0:
            cls, index = output.bottom_up.cls, output.image_index
            seen["prior_bottom_up"] = (cls if index is None else cls[index])[pairs]
        if self.training and is_distributed():
            prior, image_ids = gather(prior), gather(image_ids)
            seen = {name: gather(state) for name, state in seen.items()}
        return {name: self.prior_loss(prior.float(), state.float(), image_ids) for name, state in seen.items()}

    def pointing_losses(
        self,
        output: VLMOutput,
        coverage: Tensor | None,
        pairs: Tensor | slice = slice(None),
        images: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The losses of ξ on patches that have a weight. They train both encoders and the map from text to ξ.

        The patches are those of the first pass, because their similarity to ξ steers the second. Texts are compared
        with the images of their own device only.

        Args:
            output: the model's output for n pairs of image and text.
            coverage: (n, patches), how much of each patch a text is about, only for `pairs`; (n, M, patches), a region
                for each of several ξ; None without regions.
            pairs: the pairs that belong together; all by default.
            images: (B, 3, H, W), of which `output.bottom_up` is the first pass; only read by the focus loss.
        """
        self.log_dead(output, pairs)
        if output.prior is None:
            return {}
        losses = {}
        prior = output.prior[pairs]
        image_index = None if output.image_index is None else output.image_index[pairs]
        patches = output.bottom_up.tokens[:, self.model.vision.num_prefix_tokens :]
        if self.region_prior_weight and coverage is not None:
            scores = None if output.seen.scores is None else output.seen.scores[pairs]
            losses["region_prior"] = self.region_prior_loss(prior, patches, image_index, coverage, scores)
        if self.alive_prior_weight:
            taught = coverage if self.region_prior_weight else None
            losses["alive_prior"] = self.alive_prior_loss(prior, patches, image_index, taught)
        if self.token_prior_weight:
            losses["token_prior"] = self.token_prior_loss(prior, patches, image_index)
        if self.overlap_prior_weight and prior.ndim == 3:
            losses["overlap_prior"] = overlap(prior)
        if self.pool_prior_weight and self.model.pool is not None:
            losses["pool_prior"] = self.model.pool.loss(output.bottom_up.cls, patches, whole(prior), image_index)
        if self.focus_prior_loss is not None and self.training and coverage is not None and images is not None:
            whole_region = coverage if coverage.ndim == 2 else coverage.amax(dim=1)
            losses["focus_prior"] = self._focus_loss(output, whole_region, whole(prior), image_index, images)
        return losses

    def _focus_loss(
        self, output: VLMOutput, coverage: Tensor, prior: Tensor, image_index: Tensor | None, images: Tensor
    ) -> Tensor:
        loss, vision, shown = self.focus_prior_loss, self.model.vision, self.preprocessing
        assert loss is not None
        known = coverage.sum(dim=1).nonzero()[:, 0]
        index = known if image_index is None else image_index[known]
        # Without a region all three inputs of the loss are empty, and it is 0.
        cls = focused = output.bottom_up.cls[index]
        if len(known):
            seen = loss.mask(images[index], coverage[known], vision.grid_size, shown.mean, shown.std)
            focused = vision.encode(seen).cls
        value: Tensor = loss(prior[known].float(), cls.float(), focused.float(), index)
        return value

    def log_dead(self, output: VLMOutput, pairs: Tensor | slice = slice(None)) -> None:
        """Log `prior_dead`: the percentage of texts whose ξ is not similar to any patch, so nothing is fed back."""
        steers = self.model.vision.steers(output.seen)
        if steers is None or not len(dead := ~steers[pairs]):
            return
        percent = 100 * dead.float()
        if self.training:
            self.dead.update(percent)
        name = "train/prior_dead" if self.training else "val/prior_dead"
        self.log(name, percent.mean(), batch_size=len(dead), sync_dist=not self.training)

    def on_train_epoch_end(self) -> None:
        """Warn once if ξ was dead for most texts of an epoch."""
        if self.dead.update_called and (percent := float(self.dead.compute())) > 50 and not self.has_warned:
            self.has_warned = True
            say(
                f"warning: for {percent:.0f}% of this epoch's texts ξ is not similar to any patch and steers nothing "
                f"(train/prior_dead): raise task.alive_prior_weight, which is {self.alive_prior_weight:g}, or "
                "task.token_prior_weight, or prepare data with regions"
            )
        self.dead.reset()


class _Pictures(Dataset[tuple[str, Tensor | None]]):
    """Keys and images (1, 3, H, W), indexed by row and place in the row."""

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader

    def __getitem__(self, which: tuple[int, int]) -> tuple[str, Tensor | None]:
        row, place = which
        return self.reader.key(row, place), self.reader.read(row, 0, place)[1]
