"""What is kept of pictures between searches: their bottom-up [cls], by what is in the file and not by its name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from tqdm import tqdm

from vlabs.errors import UserError
from vlabs.utils.files import locked, replacing

# Pictures between two saves, so that a search that is stopped goes on.
_SAVE_EVERY = 200


class ImageIndex:
    """Vectors of pictures of one checkpoint, in one safetensors file.

    Args:
        path: of the file; made when the first pictures are added.

    Raises:
        UserError: the file is not an index.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.vectors = self._read()

    def _read(self) -> dict[str, Tensor]:
        if not self.path.is_file():
            return {}
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                names = json.loads((file.metadata() or {})["sha256"])
                return dict(zip(names, file.get_tensor("cls"), strict=True))
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise UserError(f"{self.path} is not a search index ({error}): remove it") from None

    def add(self, contents: Iterable[tuple[str, Path]], encode: Callable[[Path], Tensor]) -> None:
        """Encode the pictures that are not there yet, with a progress bar.

        Args:
            contents: SHA-256 and path of each picture.
            encode: gives the vector (D,) of a picture.
        """
        missing = {digest: path for digest, path in contents if digest not in self.vectors}
        for n, (digest, path) in enumerate(tqdm(missing.items(), desc="indexing", unit="image", disable=not missing)):
            self.vectors[digest] = encode(path)
            if (n + 1) % _SAVE_EVERY == 0:
                self.save()
        if missing:
            self.save()

    def save(self) -> None:
        """Write the file, whole or not at all, with what other searches added meanwhile."""
        with replacing(self.path) as partial, locked(self.path.parent, "", wait=True):
            self.vectors = self._read() | self.vectors
            tensors = {"cls": torch.stack(list(self.vectors.values()))}
            safetensors.torch.save_file(tensors, partial, metadata={"sha256": json.dumps(list(self.vectors))})
