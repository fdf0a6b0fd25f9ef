"""Checkpoint files: read without executing code, and rebuilt from the plain data that they contain.

A vlabs checkpoint is Lightning's, with one more entry, `"vlabs"`: format, task, architecture (a spec of
`vlabs.models.registry`), preprocessing, and where it comes from. An export (`.safetensors`) carries it as metadata.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import vlabs.models  # noqa: F401  (fills the registry)
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.words import words_in
from vlabs.errors import UserError, one_line, printable, show
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.heads import LabelHead, PretrainHead, RankingHead, VQAHead
from vlabs.models.hub import CONFIG, FILES, WEIGHTS, read_header, read_weights
from vlabs.models.lora import merge_adapters
from vlabs.models.registry import restore
from vlabs.models.segmentation import Segmenter
from vlabs.models.vlm import VisionLanguageModel
from vlabs.utils.files import check_absent, replacing
from vlabs.utils.hub import download
from vlabs.utils.plain import check_plain, parse_json
from vlabs.utils.tokenizer import check_tokenizer

FORMAT = 1
_COUNTED = ("questions", "captions", "statements", "images")
_WITHOUT_TEXT = ("classify", "segment")
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?")


@dataclass
class Checkpoint:
    """A trained model with what is needed to use it.

    Attributes:
        network: in eval mode, on the CPU: a vision-language model (`model`) or a classifier (`classifier`).
        preprocessing: images and texts to tensors, and the answer vocabulary.
        task: the task it was trained for, e.g. `vqa`.
        data: the prepared folder it was trained on and the hash of its manifest; under `history`, the earlier trainings
            of its weights.
        path: the file it was read from.
        released: whether it is one of the released METER code.
    """

    network: nn.Module
    preprocessing: Preprocessing
    task: str
    data: dict[str, Any]
    path: Path
    released: bool = False

    @property
    def model(self) -> VisionLanguageModel:
        """The vision-language model, for every task with images and texts."""
        assert isinstance(self.network, VisionLanguageModel)
        return self.network

    @property
    def classifier(self) -> AbSViTClassifier:
        """The classifier, for `task=classify`."""
        assert isinstance(self.network, AbSViTClassifier)
        return self.network

    @property
    def segmenter(self) -> Segmenter:
        """The segmenter, for `task=segment` and `task=refer`."""
        assert isinstance(self.network, Segmenter)
        return self.network

    @property
    def vision(self) -> AbSViT:
        """The image encoder, for every task."""
        return next(one for one in self.network.modules() if isinstance(one, AbSViT))

    @property
    def keep(self) -> float:
        """Share of the patches in the second pass; 1 for a network of your own that has none."""
        return next((float(one.keep) for one in self.network.modules() if isinstance(one, AbSViT)), 1.0)

    @property
    def training(self) -> str:
        """What it was trained on, e.g. `vqa on scenes (160,000 questions, 20,000 images)`."""
        return trainings_in_words(history_of(self.task, self.data))

    def use_share(self, keep: float | None) -> None:
        """Set the share of the patches in the second pass (see `AbSViT`), and say so if it was never trained with it.

        Args:
            keep: the share; None for the model's own.

        Raises:
            UserError: this is no share that the encoder can keep, or the network has no second pass.
        """
        if keep is None:
            return
        if not any(isinstance(one, AbSViT) for one in self.network.modules()):
            raise UserError(f"keep={keep:g}: a {type(self.network).__name__} has no second pass: leave it out")
        self.vision.keep = keep
        shares = self.vision.shares
        if not min(shares) <= keep <= max(shares):
            trained = " and ".join(f"{share:g}" for share in sorted({*shares}))
            show(
                f"keep={keep:g}: the model was trained with {trained}, and may be worse with this; to train it with "
                f"several: model.vision.keep=[{keep:g},{','.join(f'{share:g}' for share in sorted({*shares}))}]",
                file=sys.stderr,
            )

    def new_words(self, text: str) -> list[str]:
        """The words of a text that occur in no text of its training data; empty if these are unknown."""
        known = words_of(history_of(self.task, self.data))
        return [] if known is None else sorted(words_in([text]) - known)


def packaged_starts() -> dict[str, Path]:
    """The trained models that come with vlabs, by name; each has a model card (`.md`) beside it."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "starts").glob("*.safetensors"))}


def find_checkpoint(path: str | Path) -> Path:
    """Find the file that a path refers to: itself, a run folder's best or last checkpoint, or a model of vlabs.

    Args:
        path: a file, a run folder or a folder in the hub's layout; if there is no such file or folder, a name in
            `packaged_starts`, or `user/name` or `user/name@revision` on the hub.

    Raises:
        UserError: there is nothing there.
    """
    starts = packaged_starts()
    if str(path) in starts and not Path(path).exists():
        return starts[str(path)]
    path = Path(path)
    if path.is_dir():
        for name in ("best.ckpt", "last.ckpt"):
            if (path / "checkpoints" / name).is_file():
                return path / "checkpoints" / name
        if (path / WEIGHTS).is_file():
            return path / WEIGHTS
        if (path / CONFIG).is_file() and not (path / "checkpoints").is_dir():
            read_header(path)  # a model of transformers whose weights have another name is an error that says so
        raise UserError(f"{path} holds no checkpoints/best.ckpt or last.ckpt: name a run folder or a checkpoint file")
    on_hub = _HUB_NAME.fullmatch(str(path))
    # If there is a local folder of the first name, a path was meant, and it does not exist.
    if on_hub and not path.exists() and not path.parent.exists():
        return download(on_hub[1], FILES, revision=on_hub[2]) / WEIGHTS
    if not path.is_file():
        named = f" (with vlabs come: {', '.join(starts)})" if starts else ""
        raise UserError(f"checkpoint {path} does not exist{named}")
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Rebuild the model of a vlabs checkpoint or export.

    Raises:
        UserError: the file does not exist, is not a checkpoint, or not one of vlabs.
    """
    path = find_checkpoint(path)
    content = read_tensors(path)
    if "vlabs" not in content:
        raise UserError(f"{path} is not a vlabs checkpoint: it does not say its architecture")
    return rebuild(content["vlabs"], content["state_dict"], path)


def rebuild(header: dict[str, Any], state: dict[str, Tensor], path: Path) -> Checkpoint:
    """Build the model that a checkpoint's `"vlabs"` entry describes and fill it with `state` (names under `model.`)."""
    if header.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has checkpoint format {header.get('format')}; this vlabs reads format {FORMAT}")
    preprocessing = check_header(header, path)
    weights = {name.removeprefix("model."): value for name, value in state.items() if name.startswith("model.")}
    try:
        model = restore(header.get("architecture"), weights)
        if not isinstance(model, VisionLanguageModel | AbSViTClassifier | Segmenter):
            raise UserError(f"it holds a {type(model).__name__}, not a whole model")
        _check_fit(model, preprocessing, header["task"], header["data"])
    except UserError as error:
        raise UserError(f"{path} does not fit the architecture that it names: {error}") from None
    checkpoint = Checkpoint(model.eval(), preprocessing, header["task"], header["data"], path)
    # The model may be saved again and shared, so local paths of data are reduced to names.
    shared = _with_relative_folders(header["data"], outside=False)
    model.about = {name: header[name] for name in ("format", "task", "preprocessing")} | {"data": shared}
    return checkpoint


def check_header(header: dict[str, Any], path: Path) -> Preprocessing:
    """Check the header of a checkpoint, and return its preprocessing.

    Raises:
        UserError: the header does not have the form that `header_of` writes.
    """
    if missing := [name for name in ("task", "preprocessing", "data", "format") if name not in header]:
        raise UserError(
            f"{path} holds only a network, without its {missing[0]}; vlabs.VisionLanguageModel.from_pretrained loads it"
        )
    data, history, trained = header.get("data"), [], header.get("trained", [])
    if isinstance(data, dict):
        history = data.get("history", [])
    items = [{"task": header.get("task"), "data": data}, *(history if isinstance(history, list) else [None])]
    whole = all(
        isinstance(item, dict) and isinstance(item.get("task"), str) and isinstance(item.get("data"), dict)
        for item in items
    )
    named = whole and all(isinstance(item["data"].get("name") or "", str) for item in items)
    if not named or not isinstance(trained, list) or not isinstance(header.get("preprocessing"), dict):
        raise UserError(f"{path} is damaged or not vlabs': its task, data or preprocessing is not as vlabs writes it")
    try:
        if isinstance(tokenizer := header["preprocessing"].get("tokenizer"), str) and tokenizer:
            check_tokenizer(tokenizer, "its tokenizer")
        made = Preprocessing.from_plain(header["preprocessing"])
        if made.tokenizer and (length := len(made.token_ids(["a"])[0])) > made.max_length:
            raise UserError(f"its tokenizer makes {length} tokens of a text, but max_length is {made.max_length}")
        return made
    except UserError as error:
        raise UserError(f"{path} is damaged or not vlabs': {error}") from None


_LONGEST = 8192  # tokens; attention needs the square of it
_OF_TEXTS = ("vqa", "snli_ve", "nlvr2", "retrieval", "pretrain", "naming")
_NETWORKS: dict[str, type[nn.Module]] = {
    **dict.fromkeys(_OF_TEXTS, VisionLanguageModel),
    "classify": AbSViTClassifier,
    "segment": Segmenter,
    "refer": Segmenter,
}
_HEADS: dict[str, type[nn.Module]] = {
    "vqa": VQAHead,
    "snli_ve": LabelHead,
    "nlvr2": LabelHead,
    "retrieval": RankingHead,
    "pretrain": PretrainHead,
}


def _check_fit(
    model: VisionLanguageModel | AbSViTClassifier | Segmenter,
    preprocessing: Preprocessing,
    task: str,
    data: dict[str, Any],
) -> None:
    """Raise a UserError if a model does not fit its task, or does not accept the output of its preprocessing."""
    head = getattr(model, "head", None)
    others = tuple(kind for kind in _HEADS.values() if kind is not _HEADS.get(task, type(head)))
    # A user's own task may have any model and head.
    if not isinstance(model, _NETWORKS.get(task, type(model))) or (task in _NETWORKS and isinstance(head, others)):
        kind = type(model).__name__ if head is None else f"{type(model).__name__} with a {type(head).__name__}"
        raise UserError(f"it says that it was trained for the task '{task}', but holds a {kind}")
    if task == "segment" and getattr(model, "text", None) is not None:
        raise UserError("it says that it was trained for the task 'segment', but reads texts")
    if not isinstance(model, Segmenter):
        vision = model.encoder if isinstance(model, AbSViTClassifier) else model.vision
        if (side := vision.spec.get("img_size")) != preprocessing.image_size:
            raise UserError(f"it reads images of {side} px, but its preprocessing makes {preprocessing.image_size}")
    # task=refer has two classes without names, also if no text is read (the control).
    known, wanted = len(preprocessing.names), None if task == "refer" else _answers_of(model)
    if wanted is not None and known != wanted:
        raise UserError(f"it has {wanted} answers, but its preprocessing names {known}")
    short = data.get("short_side")
    if short is not None and not (type(short) is int and 1 <= short <= 8192):
        raise UserError(f"its data's short_side={short!r} must be a whole number of pixels")
    text = getattr(model, "text", None)
    if text is None:
        return
    if not preprocessing.tokenizer:
        raise UserError("it reads texts, but has no tokenizer")
    largest = max(preprocessing.largest_token_id, preprocessing.pad_token_id)
    if largest >= text.vocab_size:
        raise UserError(f"its tokenizer makes the token {largest}, but its text encoder knows {text.vocab_size}")
    if preprocessing.max_length > _LONGEST:
        raise UserError(
            f"its preprocessing makes {preprocessing.max_length} tokens, but at most {_LONGEST} are allowed"
        )
    if preprocessing.max_length > text.max_length:
        raise UserError(
            f"its preprocessing makes {preprocessing.max_length} tokens, but its text encoder takes {text.max_length}"
        )


def _answers_of(model: VisionLanguageModel | AbSViTClassifier | Segmenter) -> int | None:
    """The number of answers, labels or classes of a model; None if they have no names."""
    if isinstance(model, Segmenter):
        return int(model.decoder.spec["num_classes"]) if model.text is None else None
    if isinstance(model, AbSViTClassifier):
        return int(model.encoder.spec["num_classes"])
    if isinstance(model.head, VQAHead | LabelHead):
        spec = cast(dict[str, Any], model.head.spec)
        return int(spec["num_answers" if isinstance(model.head, VQAHead) else "num_labels"])
    return None


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a `.ckpt`, `.pth` or `.safetensors` file as plain data and tensors, without executing code.

    Safetensors are returned in the form of a checkpoint: `state_dict`, and `vlabs` if it is an export of vlabs. The
    tensors of a `.ckpt` may stay in the file until they are used.

    Raises:
        UserError: the file is damaged, not a checkpoint, holds pickled objects that are not inert, or needs more memory
            than it has bytes.
    """
    content = _read_safetensors(path) if _is_safetensors(path) else _read_pickled(path)
    if "vlabs" in content:
        header, state = content["vlabs"], content.get("state_dict")
        if not isinstance(header, dict) or not isinstance(state, dict):
            raise UserError(f"{path} is not a vlabs checkpoint: its header or its weights are not a dictionary")
        if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()):
            raise UserError(f"{path} is damaged: its weights are not tensors by name")
        check_plain(header, f"{path}: its header")
        if "lora" in header:
            # Only training knows adapters. All other readers get weights with the adapters merged.
            try:
                content["state_dict"] = merge_adapters(state, float(header["lora"]["scale"]))
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise UserError(f"{path} has adapters that do not fit its weights: {one_line(str(error))}") from None
            content["vlabs"] = {key: value for key, value in header.items() if key != "lora"}
    return content


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its name or its start: eight bytes with the header's length, then JSON."""
    if path.suffix.lower() == ".safetensors":
        return True
    with suppress(OSError), open(path, "rb") as file:
        return file.read(9)[8:] == b"{"
    return False


def _read_safetensors(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = {"state_dict": read_weights(path)}
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "vlabs" in metadata:
        content["vlabs"] = parse_json(metadata["vlabs"], f"{path}: its header")
    elif path.name == WEIGHTS and os.path.lexists(path.parent / CONFIG):
        # A folder as on the hub: weights by the model's own names.
        content["vlabs"] = read_header(path.parent)
        content["state_dict"] = {f"model.{name}": value for name, value in content["state_dict"].items()}
    return content


def _read_pickled(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
            if start.startswith(b"{"):
                raise UserError(f"{path} is JSON, not weights: name the weights, or the folder that they are in")
            is_archive = start == b"PK\x03\x04"
            if is_archive:
                _check_archive(path)
            else:
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                    _check_pickle(content)
        with _inert_globals(path):
            # With a mapped file torch checks that each tensor stays within its record, whatever the pickle says.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
        if not isinstance(loaded, dict):
            raise UserError(f"{path} is not a checkpoint: it holds a {type(loaded).__name__}")
        _check_sizes(loaded, path.stat().st_size)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0] or "its pickle is damaged"
        if "GLOBAL" in str(error):
            reason = next((line for line in str(error).split("\n") if "GLOBAL" in line), reason)
            raise UserError(
                f"{path} holds pickled code, which vlabs never runs: if you trust it, save only its weights, with "
                f"safetensors.torch.save_file(model.state_dict(), FILE) ({reason.strip()[:200]})"
            ) from None
        raise UserError(f"{path} is not a checkpoint: {reason}") from None
    except Exception as error:  # a damaged file makes the unpickler fail with any kind of error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged or not a checkpoint: {reason}") from None
    return loaded


def _check_archive(path: Path) -> None:
    """Raise an error if a record of a checkpoint's archive is damaged, or larger than the file."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        compressed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if compressed or sum(record.file_size for record in records) > path.stat().st_size:
            raise ValueError("its records are larger than the file")
        if bad := archive.testzip():
            raise ValueError(f"the bytes of {bad} have changed since they were written (CRC)")
        for record in records:
            if record.filename.endswith("data.pkl"):
                _check_pickle(archive.read(record))


def _check_pickle(content: bytes | mmap.mmap) -> None:
    """Raise an error if a pickle builds a `bytearray`: torch allows it, with any size."""
    if content.find(b"\nbytearray\n") >= 0:
        raise ValueError("it makes a bytearray, which checkpoints of vlabs do not have")


def _check_sizes(content: dict[str, Any], size: int) -> None:
    """Raise an error if any tensor is not plain, or is larger than its data in a file of `size` bytes."""
    left, seen, total = [content], set(), 0
    while left:
        one: Any = left.pop()
        if isinstance(one, dict | list | tuple):
            if id(one) not in seen:
                left += one.values() if isinstance(one, dict) else one
            seen.add(id(one))
        elif isinstance(one, Tensor):
            if one.layout is not torch.strided or one.is_quantized or one.device.type != "cpu":
                raise ValueError(f"a tensor in it is {one.layout} on {one.device.type}, not plain")
            # A few bytes can be shown as a huge tensor (strides of 0), which a copy would make real.
            if one.nbytes > one.untyped_storage().nbytes():
                raise ValueError(f"a tensor of the shape {list(one.shape)} repeats the few bytes that it has")
            total += one.nbytes
    if total > 4 * size + 2**20:
        raise ValueError("its tensors repeat the same bytes many times")


class _Inert:
    """Replaces a class that another library's checkpoint names, such as a callback, and ignores its arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_INERT_MODULES = ("pytorch_lightning.", "lightning.", "lightning_fabric.")


@contextmanager
def _inert_globals(path: Path) -> Iterator[None]:
    """Allow only `argparse.Namespace`, and inert replacements for the Lightning classes that the file names."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a zip file: torch.load will report what is wrong
        named = []
    stand_ins: list[Any] = [(_Inert, name) for name in named if name.startswith(_INERT_MODULES)]
    with torch.serialization.safe_globals([argparse.Namespace, *stand_ins]):
        yield


def header_of(
    model: VisionLanguageModel | AbSViTClassifier | Segmenter,
    preprocessing: Preprocessing,
    task: str,
    data: dict[str, Any],
) -> dict[str, Any]:
    """The `"vlabs"` entry of a checkpoint."""
    return {
        "format": FORMAT,
        "task": task,
        "architecture": model.spec,
        "preprocessing": preprocessing.to_plain(),
        "data": data,
    }


def history_of(task: str, data: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings of a checkpoint's weights, oldest first, its own last.

    Args:
        task, data: those of the checkpoint.
    """
    own = {name: value for name, value in data.items() if name != "history"}
    return [*data.get("history", []), {"task": task, "data": own}]


def words_of(history: list[dict[str, Any]]) -> set[str] | None:
    """All words of the texts of these trainings, of `history_of`; None if they are unknown."""
    known = [one["data"].get("words") for one in history if one["task"] not in _WITHOUT_TEXT]
    if not all(isinstance(words, str) for words in known):
        return None
    return {word for words in known for word in words.split()}


def trainings_in_words(history: list[dict[str, Any]]) -> str:
    """Describe the trainings of `history_of`, e.g. `vqa on scenes (160,000 questions, 20,000 images)`.

    Trainings that follow each other with one task and one dataset are named once, with the amount of each.
    """
    steps = []
    for name, trainings in groupby(map(_in_words, history), key=itemgetter(0)):
        amounts = [amount for _, amount in trainings]
        if len(set(amounts)) > 1:
            counted, often = "; then ".join(amount or "an unknown amount" for amount in amounts), ""
        else:
            often = {1: "", 2: ", twice"}.get(len(amounts), f", {len(amounts)} times")
            counted = amounts[0]
        steps.append(name + (f" ({counted})" if counted else "") + often)
    return printable(", then ".join(steps))


def _in_words(training: dict[str, Any]) -> tuple[str, str]:
    """A training's task and data, and their amount."""
    data = training["data"]
    sets = data["sets"] if isinstance(data.get("sets"), list) else [data]
    names = dict.fromkeys(str(part.get("name") or "?") for part in sets if isinstance(part, dict))
    counts = [f"{data[name]:,} {name}" for name in _COUNTED if type(data.get(name)) is int]
    return f"{training['task']} on {' and '.join(names)}", ", ".join(counts)


def export_safetensors(checkpoint: str | Path, out: str | Path, overwrite: bool = False) -> Path:
    """Write the model of a checkpoint as one safetensors file that `evaluate`, `predict` and `init=` read.

    Data folders inside the current folder are named relative to it, because an export may be shared.

    Args:
        checkpoint: a checkpoint or run folder.
        out: the new file.
        overwrite: whether `out` may exist.

    Raises:
        UserError: the checkpoint does not exist, or `out` exists.
    """
    check_absent(out, "--out", overwrite)
    path, out = find_checkpoint(checkpoint), Path(out)
    content = read_tensors(path)
    if "vlabs" not in content:
        raise UserError(f"{path} is not a vlabs checkpoint: it does not say its architecture")
    check_header(content["vlabs"], path)
    header = content["vlabs"] | {"data": _with_relative_folders(content["vlabs"]["data"])}
    tensors = {name: value.contiguous() for name, value in content["state_dict"].items() if name.startswith("model.")}
    with replacing(out) as partial:
        try:
            safetensors.torch.save_file(tensors, partial, metadata={"vlabs": json.dumps(header)})
        except RuntimeError as error:  # tensors that share memory
            raise UserError(f"{path} cannot be exported: {one_line(str(error))}") from None
    return out


def _with_relative_folders(data: Any, outside: bool = True) -> Any:
    """A checkpoint's `data`, with each `dir` inside the current folder made relative to it.

    Args:
        outside: keep the paths of other folders; otherwise only their names.
    """
    if isinstance(data, list):
        return [_with_relative_folders(item, outside) for item in data]
    if not isinstance(data, dict):
        return data
    return {
        key: _relative(Path(value), outside)
        if key == "dir" and isinstance(value, str)
        else _with_relative_folders(value, outside)
        for key, value in data.items()
    }


def _relative(folder: Path, outside: bool) -> str:
    if folder.is_relative_to(Path.cwd()):
        return str(folder.relative_to(Path.cwd()))
    return str(folder) if outside or not folder.is_absolute() else folder.name
