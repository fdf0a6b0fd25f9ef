"""Captions on the way to the prepared form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_prep.engine.index import Index
from data_prep.engine.pipeline import Kind
from vlabs.data.prepared import CAPTION_FEATURES


class CaptionIndex(Index):
    """The captions of all splits, on disk, each id once in all splits together. Bad ones are noted, and stay out.

    Args:
        path: sqlite file to make.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "caption", "UNIQUE (item_id),")

    def add_caption(
        self,
        where: str,
        *,
        split: str,
        image_id: int,
        image_name: str,
        caption_id: int,
        caption: str,
        target_instances: Sequence[int] = (),
        regions: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Add one caption; `where` names its place in the raw data, `regions` are as in `data_prep.engine.regions`.

        Raises:
            UserError: a value is of the wrong kind.
        """
        self._add(
            where,
            split=split,
            image_id=image_id,
            image_name=image_name,
            item_id=caption_id,
            text=caption,
            target_instances=target_instances,
            regions=regions,
        )


class CaptionRows:
    """Makes rows of an image and its captions.

    Args:
        prepared: the folder that they are for; nothing in it matters here.
    """

    features = CAPTION_FEATURES
    columns: tuple[str, ...] = ("item_id", "text", "target_instances", "regions")

    def __init__(self, prepared: Path) -> None:
        pass

    def entry(self, values: Sequence[Any]) -> dict[str, Any]:
        """Return a caption's entry in every list of its image's row."""
        caption_id, caption, targets, regions = values
        return {
            "caption_id": caption_id,
            "caption": caption,
            "target_instances": json.loads(targets) if targets else [],
            "region": json.loads(regions) if regions else [],
        }

    def count(self, row: dict[str, Any]) -> dict[str, int]:
        """Return what a row adds to the counts of its split."""
        return {"captions": len(row["caption_id"]), "captions_with_region": sum(map(bool, row["region"]))}

    def summary(self) -> dict[str, Any]:
        """Return what the manifest says of the whole folder."""
        return {}


CAPTIONS = Kind("captions", CaptionIndex, CaptionRows, unused_options=("min_answer_count",))
