"""Encoders from pre-trained weights: timm and the Hugging Face hub, or local files and folders."""

from __future__ import annotations

import inspect
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from vlabs.checkpoints.checkpoint import read_tensors
from vlabs.checkpoints.released import State, find_state
from vlabs.data.tokenizer import read_tokenizer
from vlabs.errors import UserError, one_line
from vlabs.models import backbones
from vlabs.models.absvit import AbSViT
from vlabs.models.backbones.vit import AttentiveProbe
from vlabs.models.diversity import is_of_pool
from vlabs.models.hub import CONFIG, WEIGHTS, read_weights
from vlabs.models.registry import is_finite, no_more_parameters_than, restore
from vlabs.models.text import OPTIONS, OTHER_TYPES, RobertaEncoder, TextEncoder
from vlabs.models.topdown import TopDown
from vlabs.utils.hub import download
from vlabs.utils.options import Count, Part, Size
from vlabs.utils.plain import check_files, parse_json, read_text

_ROBERTA_SIZES = inspect.signature(RobertaEncoder.__init__).parameters.keys() - {"self"}
_INDEX, _SHARDS, _PICKLED = "model.safetensors.index.json", "model-*-of-*.safetensors", "pytorch_model.bin"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WORDS = re.compile(r"(?<![^.])embeddings\.(word|tok)_embeddings\.weight$")
_LISTED = 3  # largest number of names of one kind in a message


@dataclass
class _Source:
    """Weights of an image encoder.

    Attributes:
        label: their name in messages.
        state: tensors by name.
        architecture: the architecture, if the source names it.
        options: options of the architecture, if the source names them.
    """

    label: str
    state: State
    architecture: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def vit_from_timm(
    weights: str | None,
    architecture: str | None = None,
    img_size: Size = 224,
    patch_size: Size | None = None,
    topdown: TopDown | None = None,
    start: Size = 1,
    keep: Part | Sequence[Part] = 1.0,
    tap: Count = 0,
    **vit_options: Any,
) -> AbSViT:
    """An AbSViT that starts from a pre-trained ViT; position and patch embeddings are resampled to the given sizes.

    Args:
        weights: timm tag, local folder, or local file of the pre-trained weights; None for random weights. A folder has
            timm's config.json and weights, as `hf download timm/TAG --local-dir` makes it; a `.safetensors` or `.pth`
            file has timm's parameter names or those of the released RVT or FAN.
        architecture: as in `AbSViT`, for a file or random weights. Tags and folders have their own.
        img_size, topdown, start, keep, tap, vit_options: as for `AbSViT`. With a `depth` below that of the weights,
            the last blocks are left out, as METER leaves CLIP's last one out.
        patch_size: side of a patch in pixels; None for the architecture's own.

    Returns:
        The encoder; its `origin` says how many of the weights it uses.

    Raises:
        UserError: feedback cannot be added to the architecture, or the weights are not available or do not fit.
    """
    source = None if weights is None else _find_weights(weights)
    name = (source and source.architecture) or architecture
    if name is None:
        of = f"model.vision.weights={weights} does not name its architecture: " if weights else ""
        raise UserError(f"{of}model.vision.architecture must be given, e.g. vit_base_patch16_224")
    if source is not None:
        given = {option: value for option, value in vit_options.items() if value is not None}
        if source.architecture and "num_heads" in given and "embed_dim" not in given:  # else they are of another size
            _check_heads(name, given["num_heads"], source)
        vit_options = source.options | given
        own_patch = vit_options.pop("patch_size", None)
        patch_size = patch_size or own_patch
        if source.options:
            _check_size(name, vit_options, source)
    patch_size = patch_size or backbones.patch_size_of(name)
    encoder = AbSViT(
        name, img_size=img_size, patch_size=patch_size, topdown=topdown, start=start, keep=keep, tap=tap, **vit_options
    )
    if source is not None:
        encoder.origin = _fill(encoder, source, name, vit_options.get("depth"))
    return encoder


def check_there(vision: str | None, text: str | None, tokenizer: str | None = None) -> None:
    """Check that the weights of a run are available, before minutes are spent on its data.

    Args:
        vision, text: arguments of `vit_from_timm` and `text_from_pretrained`.
        tokenizer: as in `read_tokenizer`; None for that of the data.

    Raises:
        UserError: something is not available; the message says what to pass.
    """
    wanted: dict[str | None, Callable[[str], Path]] = {
        vision: _located,
        text: partial(find_folder, instead="model.text.name_or_path=DIR"),
    }
    missing = []
    for name, locate in wanted.items():
        try:
            if name and (folder := locate(name)).is_dir() and _weights_of(folder) is None:
                read_folder(folder, name)
        except UserError as error:
            missing.append(str(error))
    if tokenizer and not (missing and tokenizer == text):  # then the message about its folder is enough
        try:
            read_tokenizer(tokenizer, Path())
        except UserError as error:
            missing.append(str(error))
    if missing:
        raise UserError("; ".join(missing))


def _located(weights: str) -> Path:
    """The file or folder that `model.vision.weights` refers to; for a tag, that in the cache."""
    path = Path(weights)
    if path.exists():
        return path
    if path.suffix.lower() in _SUFFIXES:
        raise UserError(f"model.vision.weights={weights} does not exist")
    architecture = weights.split(".")[0]
    if architecture not in timm.list_models():
        tag = weights.rpartition("timm/")[2]  # as the hub names it
        instead = f": pass model.vision.weights={tag}" if tag.split(".")[0] in timm.list_models() else ""
        raise UserError(
            f"model.vision.weights={weights} is not a tag of timm, and there is no such file or folder{instead}"
        )
    if weights != architecture and weights not in (known := timm.list_pretrained(f"{architecture}*")):
        raise UserError(f"timm has no weights '{weights}': choose one of {', '.join(known) or 'another model'}")
    config = timm.get_pretrained_cfg(weights)
    if config is None or not config.hf_hub_id:
        raise UserError(f"timm has no weights of {weights} on the Hugging Face hub: choose another")
    return find_folder(config.hf_hub_id, "model.vision.weights=DIR")


def _find_weights(weights: str) -> _Source:
    path = _located(weights)
    if path != Path(weights):
        return _Source(weights, read_folder(path, weights), weights.split(".")[0])
    if path.is_dir():
        return _of_folder(path)
    return _Source(weights, _in_full(_read_file(path, weights), weights))


def _of_folder(folder: Path) -> _Source:
    """Read a folder of timm's, whose config names the architecture; without a config, only the weights."""
    architecture: Any = None
    options: Any = {}
    if os.path.lexists(folder / CONFIG):
        config = read_config(folder, str(folder))
        architecture, options = config.get("architecture"), config.get("model_args") or {}
        if isinstance(architecture, dict):
            raise UserError(f"model.vision.weights={folder} is a model of vlabs: start from it with init={folder}")
        if not isinstance(architecture, str) or not isinstance(options, dict):
            kind = f" (it is a {config['model_type']} of transformers)" if "model_type" in config else ""
            raise UserError(
                f"model.vision.weights={folder}: its {CONFIG} names no architecture of timm{kind}: name a folder of "
                "`hf download timm/TAG --local-dir DIR`, or a file of weights with timm's names"
            )
    ours = {name: value for name, value in options.items() if name not in ("img_size", "num_classes")}
    return _Source(str(folder), read_folder(folder, str(folder)), architecture, ours)


def _check_size(name: str, options: dict[str, Any], source: _Source) -> None:
    """Raise a UserError if a folder's config asks for much more memory or time than its weights justify."""
    with torch.device("meta"), no_more_parameters_than(4 * len(source.state) + 100):
        network = backbones.create(name, **options).network
    if sum(one.nbytes for one in network.state_dict().values()) > 2**28 + 4 * sum(
        one.nbytes for one in source.state.values()
    ):
        raise UserError(f"{source.label} does not fit {name}: its config asks for many times the memory of its weights")


def heads_of(module: nn.Module) -> dict[str, int]:
    """The number of heads of every attention layer, by name, which weights do not tell."""
    found = {
        name: getattr(layer, "num_heads", getattr(layer, "num_attention_heads", None))
        for name, layer in module.named_modules()
    }
    counts = {name: count for name, count in found.items() if isinstance(count, int)}
    # Not of a module that only hands its number on to layers.
    return {name: count for name, count in counts.items() if not any(one.startswith(f"{name}.") for one in counts)}


def _check_heads(name: str, given: Any, source: _Source) -> None:
    """Raise a UserError if weights, whose architecture is known, were trained with another number of heads."""
    with torch.device("meta"):
        known = {*heads_of(backbones.create(name, **source.options).network).values()}
    if len(known) == 1 and {given} != known:
        (trained,) = known
        raise UserError(f"model.vision.num_heads={given}: {source.label} was trained with {trained}: leave it out")


def _fill(encoder: AbSViT, source: _Source, name: str, depth: int | None) -> str:
    """Load weights into an encoder, and return a description of which and how many.

    Raises:
        UserError: the weights belong to another architecture.
    """
    own = encoder.vit.state_dict()
    failed = ""
    state, prefix = _without_prefix(source.state, own, source.label)
    notes = [f"the part {prefix.removesuffix('.')}"] if prefix else []
    notes += [f"{others} tensors of others left out"] if (others := len(source.state) - len(state)) else []
    try:
        converted = encoder.backbone.convert(dict(state))
    except Exception as error:  # tensors of other shapes make timm fail with any kind of error
        converted, failed = dict(state), one_line(str(error)) or type(error).__name__
    converted = _without_head(converted, own)
    if isinstance(getattr(encoder.vit, "attn_pool", None), AttentiveProbe):  # new, whatever the weights pool by
        own, converted = ({k: v for k, v in of.items() if not k.startswith("attn_pool.")} for of in (own, converted))
    own = {key: value for key, value in own.items() if not is_of_pool(key)}  # new too
    kept = {key: value for key, value in converted.items() if depth is None or _block_of(key) < depth}
    reshaped = [key for key in own if key in kept and _kind(kept[key]) != _kind(own[key])]
    missing = [key for key in own if key not in kept and not _is_of_head(key)]
    unknown = [key for key in kept if key not in own]
    if failed or reshaped or missing or unknown:
        said = (
            [f"{len(reshaped)} of its tensors have another shape ({_both(reshaped[0], kept, own)})"] if reshaped else []
        )
        said += [f"it has no {_listed(missing)}"] if missing else []
        said += [f"the encoder has no {_listed(unknown)}"] if unknown else []
        raise UserError(f"{source.label} does not fit {name}: {'; '.join(said) or failed}")
    encoder.vit.load_state_dict(kept, strict=False)
    if left := {_block_of(key) for key in converted.keys() - kept.keys()}:
        notes.append(f"the last {len(left)} of {max(left) + 1} blocks left out")
    changed = {key for key in kept if key in state and state[key].shape != kept[key].shape}
    if what := sorted({"patches" if key.startswith("patch_embed.") else "positions" for key in changed}):
        notes.append(f"{' and '.join(what)} resampled")
    return f"{len(kept)} of {len(converted)} tensors of {name} from {source.label}{_in_brackets(notes)}"


def _without_prefix(state: State, own: Iterable[str], label: str) -> tuple[State, str]:
    """The tensors of an encoder that is a part of a larger model or wrapped, by its own names, and their prefix.

    Args:
        state: tensors of a file.
        own: names of the encoder's tensors.
        label: the file, for messages.

    Returns:
        `state` and "" if most of these names are there without a prefix, or with none.

    Raises:
        UserError: there are several such parts.
    """
    names = set(own)
    found: Counter[str] = Counter()
    for key in state:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
        found.update(key[:start] for start in starts if key[start:] in names)
    most = max(found.values(), default=0)
    parts = [prefix for prefix, count in found.items() if count == most]
    if 2 * most < len(names) or "" in parts:
        return state, ""
    if len(parts) > 1:
        raise UserError(
            f"{label} has the encoder {len(parts)} times, in {_listed(sorted(one[:-1] for one in parts))}: save one of "
            "them as safetensors, and name that file"
        )
    (prefix,) = parts
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}, prefix


def _without_head(state: State, own: State) -> State:
    """Remove the head's weights, and name the last norm as in the model: `fc_norm` if the mean token is classified."""
    for there, here in (("norm.", "fc_norm."), ("fc_norm.", "norm.")):
        if f"{there}weight" in state.keys() - own.keys() and f"{here}weight" in own.keys() - state.keys():
            state = {re.sub(rf"^{there}", here, key): value for key, value in state.items()}
    return {
        key: value
        for key, value in state.items()
        if not _is_of_head(key) or (key in own and key.startswith("fc_norm."))
    }


def _both(key: str, there: State, here: State) -> str:
    return f"{key} is {_shape(there[key])} there and {_shape(here[key])} here"


def _is_of_head(key: str) -> bool:
    return key.startswith(("head.", "fc_norm."))


def _block_of(key: str) -> int:
    """The block of a tensor, from 0; -1 if it belongs to none."""
    found = re.match(r"blocks\.(\d+)\.", key)
    return int(found[1]) if found else -1


def _kind(value: Tensor) -> tuple[torch.Size, bool]:
    return value.shape, value.is_floating_point()


def _shape(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) + ("" if value.is_floating_point() else f" {value.dtype}")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _in_brackets(said: list[str]) -> str:
    return f" ({'; '.join(said)})" if said else ""


def text_from_pretrained(name_or_path: str) -> TextEncoder:
    """A text encoder by hub name (`FacebookAI/roberta-base`, `answerdotai/ModernBERT-base`) or from a local folder.

    Its `config.json` gives the type and the sizes; anything else in it (code, quantization, dtype) is ignored.

    Args:
        name_or_path: hub name or local folder of the text encoder.

    Returns:
        The encoder; its `origin` says how many of the weights it uses.

    Raises:
        UserError: it is not available (the message says which local folder to pass), or has another type.
    """
    folder = find_folder(name_or_path, "model.text.name_or_path=DIR")
    config = read_config(folder, name_or_path)
    kind = config.get("model_type")
    if kind not in ("roberta", *OTHER_TYPES):
        raise UserError(f"{name_or_path} is a {kind}: a text encoder is one of roberta, {', '.join(OTHER_TYPES)}")
    state = read_folder(folder, name_or_path)
    spec: dict[str, Any] = {"class": "RobertaEncoder"} if kind == "roberta" else {"class": "OtherEncoder"}
    part = "roberta" if kind == "roberta" else "encoder"
    words = [key for key in state if _WORDS.search(key)]
    prefix = _WORDS.sub("", words[0]) if len(words) == 1 else ""  # of a model that the encoder is a part of
    try:
        # For values that its config leaves out, use transformers' defaults, not ours.
        known = AutoConfig.for_model(kind, **{name: config[name] for name in config.keys() & OPTIONS}).to_dict()
        if kind == "roberta":
            spec |= {name: known[name] for name in _ROBERTA_SIZES}
        else:
            spec |= {"model_type": kind} | {name: known[name] for name in known.keys() & OPTIONS}
        named = {f"{part}.{_today(name.removeprefix(prefix))}": value for name, value in state.items()}
        encoder = restore(spec, named, left_over=True)
    except Exception as error:  # a manipulated config makes transformers fail with any kind of error
        raise UserError(f"{name_or_path} holds no text encoder that can be loaded: {one_line(str(error))}") from None
    assert isinstance(encoder, TextEncoder)
    own = encoder.state_dict()
    rooms = tuple({f"{key.split('.')[0]}.{key.split('.')[1]}." for key in own})  # other tensors belong to heads
    left = [key for key in named.keys() - own.keys() if key.startswith(rooms) and not key.endswith("_ids")]
    said = [f"left out: {_listed(sorted(left))}"] if left else []
    encoder.origin = f"{len(own)} of {len(own) + len(left)} tensors from {name_or_path}{_in_brackets(said)}"
    return encoder


roberta_from_pretrained = text_from_pretrained  # its name in configs of earlier runs


def _today(name: str) -> str:
    """The current name of a parameter; BERT's files use old names."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def is_pretrained(model: nn.Module, name: str) -> bool:
    """Whether a parameter of a new model, by name, has pre-trained weights."""
    part, _, inner = name.partition(".")
    if getattr(getattr(model, part), "origin", None) is None:
        return False
    is_image_encoder = isinstance(getattr(model, part), AbSViT)
    is_new = _is_of_head(inner.removeprefix("vit.")) or is_of_pool(inner)
    return not is_image_encoder or inner.startswith("vit.") and not is_new


def report(model: nn.Module, starts: bool = False) -> str | None:
    """Say which parts of a new model are pre-trained, with how many weights, and which are new; None if all are new.

    Args:
        model: the model.
        starts: it starts from a checkpoint, which says what is new.
    """
    old, new = [], []
    for name, part in model.named_children():
        inner = {key for key, _ in part.named_parameters()}
        if (origin := getattr(part, "origin", None)) is None:
            new += [name] if inner else []
            continue
        old.append(f"{'vision' if isinstance(part, AbSViT) else name}: {origin}")
        if isinstance(part, AbSViT):
            new += ["feedback"] if any(not key.startswith("vit.") for key in inner) else []
            new += ["head"] if any(_is_of_head(key.removeprefix("vit.")) for key in inner) else []
            new += ["tap"] if any(map(is_of_pool, inner)) else []
    new += ["prior"] if "prompt" in dict(model.named_parameters(recurse=False)) else []
    if not old:
        return None
    return "pre-trained: " + "; ".join([*old, *([f"new: {', '.join(new)}"] if new and not starts else [])])


# Folders of weights


def find_folder(name_or_path: str, instead: str, more: Sequence[str] = ()) -> Path:
    """A local folder, or the cache folder of a model on the hub with its config and weights.

    Args:
        name_or_path: hub name or local folder.
        instead: the option to pass with a local folder DIR, for messages.
        more: other files of it.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    folder = download(name_or_path, (CONFIG, WEIGHTS, _INDEX, _SHARDS, *more), instead)
    if not any((folder / file).is_file() for file in (WEIGHTS, _INDEX)):
        folder = download(name_or_path, (CONFIG, _PICKLED), instead)
    return folder


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """The config of a folder, as plain data.

    Raises:
        UserError: it is not there, or not a config.
    """
    check_files(folder, (CONFIG,))
    if not (folder / CONFIG).is_file():
        raise _not_whole(folder, name, [CONFIG, *([] if _weights_of(folder) else [WEIGHTS])])
    config = parse_json(read_text(folder / CONFIG), f"{name}: {CONFIG}")
    if not isinstance(config, dict):
        raise UserError(f"{name}: {CONFIG} is not the config of a model")
    return config


def _weights_of(folder: Path) -> str | None:
    return next((file for file in (WEIGHTS, _INDEX, _PICKLED) if (folder / file).is_file()), None)


def read_folder(folder: Path, name: str) -> State:
    """The weights of a folder, in one file or several, in float32.

    Raises:
        UserError: it has no weights, weights in an unsupported form, or only some of them.
    """
    check_files(folder, (WEIGHTS, _INDEX, _PICKLED))
    file = _weights_of(folder)
    if file is None:
        raise _not_whole(folder, name, [WEIGHTS])
    return _in_full(_read_shards(folder, name) if file == _INDEX else _read_file(folder / file, name), name)


def _read_file(file: Path, name: str) -> State:
    """The tensors of a file, whatever config lies beside it."""
    return read_weights(file) if file.name == WEIGHTS else find_state(read_tensors(file), name)


def _read_shards(folder: Path, name: str) -> State:
    index = parse_json(read_text(folder / _INDEX), f"{name}: {_INDEX}")
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise UserError(f"{folder / _INDEX} is damaged: it does not say which tensor is in which file (weight_map)")
    files = sorted(set(places.values()))
    if outside := [file for file in files if Path(file).name != file or not file.endswith(".safetensors")]:
        raise UserError(f"{folder / _INDEX} names {outside[0]!r}, which is not a .safetensors file in its folder")
    if missing := sorted(set(files) - {path.name for path in folder.iterdir() if path.is_file()}):
        raise _not_whole(folder, name, missing)
    check_files(folder, files)
    state: State = {}
    for file in files:
        found = read_weights(folder / file)
        wanted = [key for key, place in places.items() if place == file]
        if absent := [key for key in wanted if key not in found]:
            raise UserError(f"{folder / file} has no {_listed(absent)}, but {_INDEX} says so")
        state |= {key: found[key] for key in wanted}
    return state


def _in_full(state: State, name: str) -> State:
    """Convert floats to float32, which represents half precision exactly.

    Raises:
        UserError: they have another type (e.g. int8), or are not finite.
    """
    for key, value in state.items():
        if value.is_floating_point() and value.dtype not in _FLOATS:
            raise UserError(f"{name}: {key} is {value.dtype}: save it as float32, float16 or bfloat16")
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if wrong := [key for key, value in state.items() if value.is_floating_point() and not is_finite(value)]:
        raise UserError(f"{name}: {_listed(wrong)} is not finite: the training failed, or the file is damaged")
    return state


def _not_whole(folder: Path, name: str, missing: Iterable[str]) -> UserError:
    """The error for an incomplete folder of a model: what is missing, and what there is instead."""
    there = sorted(path.name for path in folder.iterdir() if path.is_file())
    lacks = [f"{file} (a broken link)" if os.path.islink(folder / file) else file for file in missing]
    of = f"{name} has no {_listed(lacks)}"
    if folder != Path(name):
        return UserError(
            f"{of} in the local cache, {folder}, which is incomplete: download it where there is a network, with "
            f"`hf download {name}` or `--local-dir DIR`, and pass DIR"
        )
    if missing == [WEIGHTS] and len(others := [file for file in there if file.endswith(".safetensors")]) == 1:
        return UserError(f"{of}: if {others[0]} has all of its weights, rename it to {WEIGHTS}")
    if lacks[0].startswith(WEIGHTS) and there and (others := [file for file in there if _OTHER_WEIGHTS.search(file)]):
        return UserError(
            f"{of}, and {_listed(others)} cannot be read: load it with the library that wrote it and save it as "
            "safetensors, with transformers' model.save_pretrained(DIR) or timm.models.save_for_hf(model, DIR)"
        )
    return UserError(f"{of}: it has {_listed(there) or 'no files'}; name the folder of a complete model")


_OTHER_WEIGHTS = re.compile(r"\.(bin|bin\.index\.json|h5|msgpack|onnx|gguf|pth|pt|ckpt|npz|safetensors|ot)$")
