"""What the evaluations share: files written whole, and a progress bar where it is wanted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, TQDMProgressBar


def write_json(path: Path, content: Any) -> Path:
    """Write JSON under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return partial.replace(path)


def progress_bar(config: DictConfig) -> list[Callback] | None:
    """Lightning's progress bar, with the time left, unless it is switched off."""
    return (
        [TQDMProgressBar(refresh_rate=1 if sys.stderr.isatty() else 50)] if config.trainer.enable_progress_bar else None
    )
