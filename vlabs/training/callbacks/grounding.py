"""Measure grounding during training."""

from __future__ import annotations

import pytorch_lightning as pl

from vlabs.attention import Maps
from vlabs.data.module import PreparedDataModule
from vlabs.evaluation.grounding import Targets, find_targets, measure
from vlabs.tasks.vision_language import VisionLanguageTask
from vlabs.training.callbacks.schedule import EveryNValidations
from vlabs.utils.options import Count


class GroundingCurve(EveryNValidations):
    """Every N validations, measure whether the model looks at what the texts are about: `val/grounding/MAP_energy`.

    This is the share of a map's energy inside the region, in percent. `val/grounding/area` is the same for a uniform
    map. Measured on texts of the validation split with a region, evenly spread; if there are none, nothing is logged.

    Args:
        every_n_validations: number of validations between two measurements; 0 for never.
        num_texts: number of texts to measure.
        maps: maps to measure.
        instances: COCO's instances; None for the regions in the prepared data.
    """

    def __init__(
        self,
        every_n_validations: Count = 1,
        num_texts: Count = 100,
        maps: Maps = ("norm", "fusion"),
        instances: str | None = None,
    ) -> None:
        super().__init__(every_n_validations)
        self.num_texts = num_texts
        self.maps: list[str] = list(maps)
        self.instances = instances
        self.targets: Targets | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Read the targets once."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        looks = isinstance(pl_module, VisionLanguageTask) and isinstance(data, PreparedDataModule)
        if self.every and self.targets is None and looks:
            self.targets = find_targets(data.rows(data.val_split), data.dir, self.instances, self.num_texts)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure and log."""
        if not self.is_due(trainer) or self.targets is None:
            return
        assert isinstance(pl_module, VisionLanguageTask)
        values: dict[str, list[float]] = {}
        if trainer.is_global_zero:
            for record in measure(pl_module.model, pl_module.preprocessing, self.targets, self.maps):
                if record is not None:
                    values.setdefault("area", []).append(record["area"])
                    for name in self.maps:
                        values.setdefault(f"{name}_energy", []).append(record["maps"][name]["energy"])
        for measured, shares in values.items():
            pl_module.log(f"val/grounding/{measured}", 100 * sum(shares) / len(shares), rank_zero_only=True)
