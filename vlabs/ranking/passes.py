"""First passes of an image encoder, stored on disk, so that no image is decoded or encoded twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vlabs.data.preprocessing import PICTURE_OPTIONS, Preprocessing
from vlabs.data.store import TensorStore
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, StoredPass
from vlabs.utils.files import size

_AT_ONCE = 16  # images that are encoded together


class FirstPasses:
    """A store of first passes, by the keys of the images, for second passes and shortlists.

    Passes with other weights, or of images that are read differently, are in other folders beside each other.

    Args:
        folder: the folder of all stores.
        vision: the encoder, on the device where it encodes.
        preprocessing: how images are read, as in evaluation.
        dtype: how tokens are stored: half precision, or int8 with a scale per token.
        training: store only what does not depend on trained parameters; if False, no parameter changes.

    Attributes:
        store: where the tensors are.

    Raises:
        UserError: the whole pass depends on trained parameters; and see `TensorStore`.
    """

    def __init__(
        self,
        folder: Path,
        vision: AbSViT,
        preprocessing: Preprocessing,
        dtype: torch.dtype = torch.float16,
        training: bool = False,
    ) -> None:
        self.vision = vision
        with torch.set_grad_enabled(training), _evaluating(vision):
            side = preprocessing.image_size
            # One empty image shows the shapes, and by `requires_grad` what still depends on trained weights.
            probe = vision.encode(torch.zeros(1, 3, side, side).to(next(vision.parameters())))
        layout = {"embedded": (probe.embedded.shape[1:], dtype)} if vision.looks_twice else {}
        if not probe.tokens.requires_grad:
            layout |= {"tokens": (probe.tokens.shape[1:], dtype), "cls": (probe.cls.shape[1:], torch.float16)}
        if probe.read is not None and "tokens" in layout:
            layout["read"] = (probe.read.shape[1:], torch.float32)
        if not layout or (vision.looks_twice and probe.embedded.requires_grad):
            raise UserError(
                "task.store keeps the first pass of an image encoder that is not trained: pass task.freeze=[vision], "
                "or task.store=null"
            )
        identity = {
            "weights": _digest(vision, training),
            "architecture": {name: value for name, value in vision.spec.items() if name not in ("topdown", "keep")},
            "pictures": {name: getattr(preprocessing, name) for name in ("image_size", *PICTURE_OPTIONS)},
            "tensors": {name: str(of) for name, of in layout.items()},
        }
        said = json.dumps(identity, sort_keys=True)
        key = hashlib.sha256(said.encode()).hexdigest()[:16]
        self.store = TensorStore(folder.expanduser() / key, said, layout)

    def __contains__(self, key: str) -> bool:
        return key in self.store

    def missing(self, keys: Iterable[str], rank: int = 0, world: int = 1) -> list[str]:
        """A process's part of the keys that are not stored yet, each once.

        The parts have all of them whatever each process has seen of what the others write: all keys are shared out.
        """
        return [key for key in list(dict.fromkeys(keys))[rank::world] if key not in self.store]

    def check_size(self, images: int, most: float) -> None:
        """Raise a UserError if, with this many additional images, the folder of all stores held more than `most` GB."""
        folder = self.store.folder.parent
        total = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) + images * self.store.bytes_each
        if total > most * 1e9:
            raise UserError(
                f"{folder} would hold {size(total)} of first passes, more than task.store_gb={most:g}: remove folders "
                "in it that are no longer needed, or raise task.store_gb"
            )

    @torch.inference_mode()
    def fill(self, pictures: Iterable[tuple[str, Tensor | None]], count: int) -> None:
        """Encode images, with a progress bar. What was encoded before a stop is kept.

        Args:
            pictures: key and normalized image (1, 3, H, W) of each; None for one that is left out.
            count: the number of images.

        Raises:
            UserError: the disk has no space for them.
        """
        self.store.check_room(count)
        waiting: list[tuple[str, Tensor]] = []
        try:
            for key, image in tqdm(pictures, desc="indexing", unit="image", total=count, disable=not count):
                waiting += [] if image is None else [(key, image)]
                if len(waiting) == _AT_ONCE:
                    self.add(waiting)
                    waiting = []
            self.add(waiting)
        finally:
            self.store.flush()

    @torch.inference_mode()
    def add(self, pictures: Sequence[tuple[str, Tensor]]) -> None:
        """Encode some images together; they are stored after enough have come."""
        if not pictures:
            return
        weight = next(self.vision.parameters())
        images = torch.cat([image for _, image in pictures]).to(weight)
        with _evaluating(self.vision):
            bottom_up = self.vision.encode(images)
        for n, (key, _) in enumerate(pictures):
            self.store.add(key, {name: getattr(bottom_up, name)[n] for name in self.store.layout})

    def seen(self, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
        """What a shortlist reads from some images: [cls] (n, D), and z of the patches (n, P, D), each at some scale."""
        found = self.store.read(keys, ["cls", "tokens"], scaled=False)  # a cosine does not depend on it
        return found["cls"], found["tokens"][:, self.vision.num_prefix_tokens :]

    def read(self, keys: Sequence[str]) -> StoredPass:
        """The passes over some images, together, on the CPU."""
        names = [name for name in self.store.layout if name != "cls"]
        found = self.store.read(keys, names)
        return StoredPass(found.get("embedded"), found.get("tokens"), found.get("read"))


def _digest(vision: AbSViT, training: bool) -> str:
    """SHA-256 of the weights of the first pass, without the trained ones."""
    trained = {name for name, value in vision.named_parameters() if value.requires_grad and training}
    digest = hashlib.sha256()
    for name, value in sorted(vision.state_dict().items()):
        if name.startswith("vit.") and name not in trained:
            digest.update(name.encode())
            # As bytes, because numpy has no bfloat16.
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def _evaluating(vision: AbSViT) -> Iterator[None]:
    """Context manager: eval mode, with `read` computed for every share that may be kept."""
    modes = {module: module.training for module in vision.modules()}
    vision.eval()
    try:
        with vision.keeping(min(vision.keep, *vision.shares)):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode  # `train(mode)` would set the modules inside too
