"""A matrix of scores on disk: images by captions, filled part by part, by several processes, over several runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from vlabs.errors import UserError
from vlabs.utils.files import locked, replacing, write_json


class ScoreMatrix:
    """`NAME.npy`, float32 (images, captions), NaN where no score is known yet, and `NAME.json`, its identity.

    Several processes of one machine may write different parts. A process that is killed leaves what it wrote.

    Args:
        directory: where the files are, or will be.
        name: the name of the two files.
        shape: numbers of images and captions.
        identity: plain data that identifies the scores: checkpoint, data, split, precision.

    Raises:
        UserError: the files hold scores with another identity.
    """

    def __init__(self, directory: str | Path, name: str, shape: tuple[int, int], identity: dict[str, Any]) -> None:
        self.path = Path(directory) / f"{name}.npy"
        header = self.path.with_suffix(".json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path.parent, "", wait=True):
            if self.path.is_file() and header.is_file():
                found = _read(header)
                different = [key for key, value in identity.items() if found.get(key) != value]
                if different:
                    raise UserError(
                        f"{self.path} holds the scores of another {', '.join(different)}: "
                        "pass another ranker.scores, or remove it"
                    )
            else:
                with replacing(self.path) as partial:
                    matrix = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
                    # Row by row: a whole matrix of NaN may not fit in memory.
                    for row in matrix:
                        row[:] = np.nan
                    matrix.flush()
                    del matrix
                    # Before the matrix is renamed to its place: it is never there without its identity.
                    write_json(header, identity)
        self.values: np.ndarray = self._open(shape)

    def _open(self, shape: tuple[int, int]) -> np.ndarray:
        try:
            values = np.load(self.path, mmap_mode="r+", allow_pickle=False)
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path} is damaged ({error}): remove it and rank again") from None
        if values.shape != shape or values.dtype != np.float32:
            raise UserError(f"{self.path} is {values.dtype} {values.shape} and not float32 {shape}: remove it")
        return values  # type: ignore[no-any-return]

    def done(self, image: int, captions: np.ndarray | slice) -> bool:
        """Whether all scores of an image with some captions are known."""
        return not bool(np.isnan(self.values[image, captions]).any())


def _read(header: Path) -> dict[str, Any]:
    try:
        content = json.loads(header.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{header} is damaged ({error}): remove it and the scores beside it") from None
    return content if isinstance(content, dict) else {}
