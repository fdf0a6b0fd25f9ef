"""Encoders from pre-trained weights: timm and the Hugging Face hub, or local files."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import timm
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import cached_file

from vlabs.checkpoints.checkpoint import read_tensors
from vlabs.checkpoints.released import find_state
from vlabs.errors import UserError, one_line
from vlabs.models.absvit import AbSViT
from vlabs.models.film import FiLMViT
from vlabs.models.hub import read_weights
from vlabs.models.registry import restore
from vlabs.models.text import OPTIONS, OTHER_TYPES, RobertaEncoder, TextEncoder
from vlabs.models.topdown import TopDown
from vlabs.utils.plain import check_files, parse_json, read_text

_ROBERTA_SIZES = inspect.signature(RobertaEncoder.__init__).parameters.keys() - {"self"}


def vit_from_timm(
    weights: str | None,
    architecture: str | None = None,
    img_size: int = 224,
    patch_size: int = 16,
    topdown: TopDown | None = None,
    encoder_class: type[AbSViT] = AbSViT,
    **vit_options: Any,
) -> AbSViT:
    """An AbSViT that starts from a pre-trained ViT; position and patch embeddings are resampled to the sizes given.

    Args:
        weights: a timm tag such as `vit_base_patch16_224.augreg_in21k_ft_in1k`, or a local `.safetensors` or `.pth`
            file with timm's parameter names or those of the released RVT or FAN (then `architecture` says which model
            it is); None for fresh weights.
        architecture: as in `AbSViT`; the tag's own if not given.
        img_size, patch_size, topdown, vit_options: as for `AbSViT`. With a `depth` below that of the weights, the last
            blocks are left out, as METER leaves CLIP's last one out.
        encoder_class: what is built around the ViT.

    Raises:
        UserError: feedback cannot be added to the architecture, or the weights cannot be had.
    """
    if weights is None:
        if architecture is None:
            raise UserError("model.vision.architecture must be given, e.g. vit_base_patch16_224")
        return encoder_class(architecture, img_size=img_size, patch_size=patch_size, topdown=topdown, **vit_options)
    local = Path(weights)
    is_file = local.suffix in (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
    if is_file and not local.is_file():
        raise UserError(f"model.vision.weights={weights} does not exist")
    if is_file and architecture is None:
        raise UserError(f"model.vision.weights={weights} is a file: say what it holds with model.vision.architecture")
    name = architecture or weights.split(".")[0]
    if not is_file and weights.split(".")[0] not in timm.list_models():
        raise UserError(f"model.vision.weights={weights} is no tag of timm, and no .safetensors or .pth file")
    encoder = encoder_class(name, img_size=img_size, patch_size=patch_size, topdown=topdown, **vit_options)
    state = find_state(read_tensors(local), weights) if is_file else _tag_state(weights, **vit_options)
    try:
        state = encoder.backbone.convert(state)
        kept = {
            key: value
            for key, value in state.items()
            if not key.startswith(("head.", "fc_norm.")) and not _is_left_out(key, vit_options.get("depth"))
        }
        missing, unexpected = encoder.vit.load_state_dict(kept, strict=False)
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{weights} does not fit {name}: {error}") from None
    missing = [key for key in missing if not key.startswith(("head.", "fc_norm."))]
    if missing or unexpected:
        raise UserError(
            f"{weights} does not fit {name}: missing {missing or 'none'}, unexpected {unexpected or 'none'}"
        )
    return encoder


def film_vit(weights: str | None = None, architecture: str | None = None, **options: Any) -> AbSViT:
    """A ViT whose norms ξ scales and shifts, fresh or from a timm ViT; arguments as in `vit_from_timm`."""
    return vit_from_timm(weights, architecture, encoder_class=FiLMViT, **options)


def _is_left_out(key: str, depth: int | None) -> bool:
    block = re.match(r"blocks\.(\d+)\.", key)
    return depth is not None and block is not None and int(block[1]) >= depth


def _tag_state(tag: str, **vit_options: Any) -> dict[str, Tensor]:
    options = {name: value for name, value in vit_options.items() if value is not None and name != "depth"}
    try:
        source = timm.create_model(tag, pretrained=True, **options | {"num_classes": 0})
    except Exception as error:
        # timm raises whatever its download layer does: a missing tag and a missing network look alike.
        known = timm.list_pretrained(tag.split(".")[0] + "*")
        if tag not in known and known:
            raise UserError(f"timm has no weights '{tag}': choose one of {', '.join(known)}") from None
        raise UserError(
            f"the weights of {tag} are neither in the local cache nor to be had from the Hugging Face hub "
            f"({type(error).__name__}): download them where there is a network, with `hf download timm/{tag} "
            "model.safetensors --local-dir DIR`, and pass model.vision.weights=DIR/model.safetensors"
        ) from None
    return dict(source.state_dict())


def text_from_pretrained(name_or_path: str) -> TextEncoder:
    """A text encoder by hub name (`FacebookAI/roberta-base`, `answerdotai/ModernBERT-base`) or from a local folder.

    Its `config.json` says the type and the sizes; what else it says (code, quantization, dtype) is not followed.

    Raises:
        UserError: it cannot be had (the message says which local folder to pass), or it is of another type.
    """
    config = parse_json(read_text(_part_of(name_or_path, "config.json")), f"{name_or_path}: config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in ("roberta", *OTHER_TYPES):
        raise UserError(f"{name_or_path} is a {kind}: a text encoder is one of roberta, {', '.join(OTHER_TYPES)}")
    weights = _part_of(name_or_path, "model.safetensors", needed=False)
    if weights is not None:
        state = read_weights(weights)
    else:
        state = find_state(read_tensors(_part_of(name_or_path, "pytorch_model.bin")), name_or_path)
    spec: dict[str, Any] = {"class": "RobertaEncoder"} if kind == "roberta" else {"class": "OtherEncoder"}
    part = "roberta" if kind == "roberta" else "encoder"
    prefix = "model." if kind == "modernbert" else f"{kind.partition('-')[0]}."
    try:
        # transformers' own defaults for what its config leaves out, and not ours.
        known = AutoConfig.for_model(kind, **{name: config[name] for name in config.keys() & OPTIONS}).to_dict()
        if kind == "roberta":
            spec |= {name: known[name] for name in _ROBERTA_SIZES}
        else:
            spec |= {"model_type": kind} | {name: known[name] for name in known.keys() & OPTIONS}
        named = {f"{part}.{_today(name.removeprefix(prefix))}": value for name, value in state.items()}
        encoder = restore(spec, named, left_over=True)
    except Exception as error:  # whatever a config that was tampered with makes of transformers
        raise UserError(f"{name_or_path} holds no text encoder that can be loaded: {one_line(str(error))}") from None
    assert isinstance(encoder, TextEncoder)
    return encoder


def _today(name: str) -> str:
    """A parameter's name as it is called today; BERT's files are from before."""
    return re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name))


def _part_of(name_or_path: str, file: str, needed: bool = True) -> Any:
    """The local path of a file of a text encoder, in its folder, the local cache or from the hub.

    Raises:
        UserError: it is needed and cannot be had.
    """
    if (folder := Path(name_or_path)).is_dir():
        check_files(folder, (file,))
    try:
        found = cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise _not_there(name_or_path, error) from None
    if found is None and needed:
        raise _not_there(name_or_path, FileNotFoundError(f"there is no {file}"))
    return None if found is None else Path(found)


roberta_from_pretrained = text_from_pretrained  # what the configs of earlier runs call it


def _not_there(name_or_path: str, error: Exception) -> UserError:
    if Path(name_or_path).is_dir():
        return UserError(f"{name_or_path} holds no text encoder that transformers can load: {one_line(str(error))}")
    return UserError(
        f"{name_or_path} is neither in the local cache nor to be had from the Hugging Face hub: download it where "
        f"there is a network, with `hf download {name_or_path} --local-dir DIR`, "
        "and pass model.text.name_or_path=DIR"
    )
