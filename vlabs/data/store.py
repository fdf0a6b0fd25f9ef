"""Tensors of images on disk, in shards that are never changed once written and are read by memory map."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from vlabs.errors import UserError
from vlabs.utils.files import remove_leftovers, replacing, size

_SHARD = 128 * 2**20  # approximate bytes per shard; a killed process loses at most this much


class TensorStore:
    """Tensors per image, by key, in a folder of safetensors files.

    Several processes may add to it at the same time, because each writes its own files. A process that is killed loses
    only what it has not written yet.

    Args:
        folder: the folder; it is made with the first shard.
        identity: a string that says what the tensors are; a shard with another identity is an error.
        layout: name, shape and type of each tensor of an image. An int8 tensor is stored with a scale for each vector
            of its last dimension.

    Attributes:
        bytes_each: bytes per image.

    Raises:
        UserError: a file in the folder is not a shard of this store.
    """

    def __init__(self, folder: Path, identity: str, layout: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        self.folder = folder
        self.identity = identity
        self.layout = layout
        self.bytes_each = sum(
            one.nbytes
            for shape, dtype in layout.values()
            for one in _packed("", torch.empty(shape, device="meta"), dtype).values()  # sizes without memory
        )
        self.shards: dict[str, dict[str, Tensor]] = {}
        self.places: dict[str, tuple[str, int]] = {}
        self.waiting: dict[str, dict[str, Tensor]] = {}
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self.waiting

    def refresh(self) -> None:
        """Open the shards that other processes have written in the meantime."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name not in self.shards:
                self._open(path)

    def _open(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, "pt") as file:
                said = file.metadata() or {}
                keys = json.loads(said["keys"])
                if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                    raise ValueError("its keys are no list of names")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it") from None
        wanted: dict[str, Tensor] = {}
        for name, (shape, dtype) in self.layout.items():
            wanted |= _packed(name, torch.empty(len(keys), *shape, device="meta"), dtype)
        found, due = ({name: (t.shape, t.dtype) for name, t in one.items()} for one in (tensors, wanted))
        if said.get("identity") != self.identity or found != due:
            raise UserError(f"{path} holds no images as this model sees them: remove it")
        self.shards[path.name] = tensors
        self.places |= {key: (path.name, n) for n, key in enumerate(keys)}

    def check_room(self, pictures: int) -> None:
        """Raise a UserError if this number of additional images cannot be written to the folder, or is too much."""
        place = self.folder
        while not place.exists():
            place = place.parent
        if not place.is_dir():
            raise UserError(f"{place} is a file, and no folder for first passes: name another folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"{place} cannot be written to: name another folder")
        need, free = pictures * self.bytes_each, shutil.disk_usage(place).free
        if need > free:
            raise UserError(
                f"{self.folder} would take {size(need)} for {pictures:,} images ({self.bytes_each / 1e3:,.0f} kB "
                f"each), but the disk has {size(free)}: name a folder on another disk"
            )

    def add(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Add the tensors of an image. They are in a file after `flush` at the latest."""
        packed: dict[str, Tensor] = {}
        for name, (_, dtype) in self.layout.items():
            packed |= _packed(name, tensors[name].detach().cpu(), dtype)
        self.waiting[key] = packed
        if len(self.waiting) * self.bytes_each >= _SHARD:
            self.flush()

    def flush(self) -> None:
        """Write the tensors that are not in a file yet."""
        if not self.waiting:
            return
        remove_leftovers(self.folder)
        path = self.folder / f"{secrets.token_hex(8)}.safetensors"
        rows = list(self.waiting.values())
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        metadata = {"identity": self.identity, "keys": json.dumps(list(self.waiting))}
        with replacing(path) as partial:
            safetensors.torch.save_file(tensors, partial, metadata=metadata)
        self.waiting = {}
        self._open(path)

    def read(self, keys: Sequence[str], names: Sequence[str] | None = None, scaled: bool = True) -> dict[str, Tensor]:
        """Read the tensors of n images by name, each (n, …); int8 tensors become float32.

        Args:
            keys: keys of the images.
            names: names of the tensors; None for all.
            scaled: if False, int8 tensors stay so, without their scales.

        Raises:
            UserError: a number is not finite.
        """
        rows = [self.waiting.get(key) or self._row(key) for key in keys]
        found = {}
        for name in self.layout if names is None else names:
            tensor = torch.stack([row[name] for row in rows])
            if scaled and f"{name}.scale" in rows[0]:
                tensor = tensor.float() * torch.stack([row[f"{name}.scale"] for row in rows])
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UserError(f"{self.folder} holds numbers that are not finite: remove it")
            found[name] = tensor
        return found

    def _row(self, key: str) -> dict[str, Tensor]:
        shard, n = self.places[key]
        return {name: tensor[n] for name, tensor in self.shards[shard].items()}


def _packed(name: str, tensor: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """A tensor in its stored form. int8: rounded to 127 steps of the largest absolute value of each vector."""
    if dtype != torch.int8:
        return {name: tensor.to(dtype)}
    largest = tensor.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12)
    return {name: (tensor * (127 / largest)).round().to(torch.int8), f"{name}.scale": largest / 127}
