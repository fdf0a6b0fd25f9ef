"""Load a model of transformers from a folder or the hub: weights and plain data, and no code of others."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import logging

from vlabs.checkpoints.checkpoint import packaged_starts
from vlabs.checkpoints.pretrained import find_folder, read_config, read_folder
from vlabs.data.tokenizer import TOKENIZER_FILES, VOCABULARIES
from vlabs.errors import UserError, one_line
from vlabs.look.looker import Looker
from vlabs.look.models import KINDS, Lookable, SigLIP2
from vlabs.models.registry import no_more_parameters_than
from vlabs.utils.device import find_device
from vlabs.utils.plain import check_files, parse_json, read_text
from vlabs.utils.tokenizer import check_tokenizer

_IMAGES, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_INSTEAD = "--model DIR"
_OF_VLABS = "{} is of vlabs, not of transformers: pass it to `vlabs attention --ckpt` or `vlabs predict --ckpt`"
_GENERATORS = ("llava", "qwen", "internvl", "paligemma", "gemma", "idefics", "mllama", "instructblip", "blip2")
"""How the names of classes begin that write text about an image with a language model."""
_LARGEST = 1024
"""The largest side of an input, in pixels, and the largest number of patches of SigLIP 2."""
_ARCHITECTURES = {"clip": "CLIPModel", "siglip": "SiglipModel", "siglip2": "Siglip2Model"}
"""For types of configs that mean one class: other names in such a config are of parts of it."""
_READ = (
    "do_resize", "size", "default_to_square", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_convert_rgb", "do_pad", "size_divisor", "max_num_patches",
)  # fmt: skip
"""What an image processor takes of its config; SigLIP 2 takes the size of its patches from the model."""
_NAMES = ("id2label", "label2id", "num_labels")


class _Kind(NamedTuple):
    """The classes of transformers for a kind of model."""

    model: Any
    images: Any
    looks: type[Lookable]


def load(name_or_path: str, device: str | None = None) -> Looker:
    """Load a model of transformers, with how it reads images and texts.

    Args:
        name_or_path: name on the Hugging Face hub, or a local folder as `save_pretrained` writes it.
        device: `cpu` or `cuda`; the GPU if there is one.

    Raises:
        UserError: it is of another kind, not available, not whole, or damaged; the message says what to do.
    """
    device = find_device(device)
    path = Path(name_or_path)
    if (path / "checkpoints").is_dir() or path.is_file() or (str(path) in packaged_starts() and not path.exists()):
        raise UserError(_OF_VLABS.format(name_or_path))
    folder = find_folder(name_or_path, _INSTEAD, (_IMAGES, _PROCESSOR, *TOKENIZER_FILES))
    check_files(folder, [path.name for path in folder.iterdir()])
    config = read_config(folder, name_or_path)
    kind = _kind_of(config, name_or_path)
    images = _read_images(folder, name_or_path, kind)
    with _quietly():
        model = _read_model(folder, name_or_path, config, kind)
        tokenizer = _read_tokenizer(folder, name_or_path, model.config)

    def decode(ids: Tensor) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()

    try:
        looks = kind.looks(model.to(device), decode)
    except UserError as error:
        raise UserError(f"{name_or_path}: {error}") from None
    if isinstance(looks, SigLIP2):
        images.patch_size = looks.patch
    return Looker(looks, images, tokenizer, name_or_path, device)


def _kind_of(config: dict[str, Any], name: str) -> _Kind:
    if "architecture" in config:
        raise UserError(_OF_VLABS.format(name))
    kind = config.get("model_type")
    listed = config.get("architectures")
    architecture = _ARCHITECTURES.get(str(kind)) or (str(listed[0]) if isinstance(listed, list) and listed else None)
    if str(architecture).lower().startswith(_GENERATORS):
        raise UserError(
            f"{name} is a {architecture}, which writes text with a language model: `vlabs look` does not read such "
            f"models yet, only {', '.join(KINDS)}"
        )
    if architecture not in KINDS:
        raise UserError(f"{name} is a {architecture or kind}: name a model of one of the kinds {', '.join(KINDS)}")
    family = architecture.split("For")[0].removesuffix("Model")
    images = getattr(transformers, f"{family}ImageProcessor")
    return _Kind(getattr(transformers, architecture), images, KINDS[architecture])


def _read_images(folder: Path, name: str, kind: _Kind) -> Any:
    """The image processor, which resizes and normalizes."""
    file = next((file for file in (_IMAGES, _PROCESSOR) if (folder / file).is_file()), None)
    if file is None:
        raise UserError(
            f"{name} has no {_IMAGES}, which says how images are read: download all of the model, with `hf download "
            f"NAME --local-dir DIR`, and pass {_INSTEAD}"
        )
    plain = parse_json(read_text(folder / file), f"{name}: {file}")
    if isinstance(plain, dict) and file == _PROCESSOR:
        plain = plain.get("image_processor")
    if not isinstance(plain, dict):
        raise UserError(f"{name}: {file} does not say how images are read")
    try:
        images = kind.images(**{key: value for key, value in plain.items() if key in _READ})
        sizes = [side for size in (images.size, images.crop_size) if size is not None for side in dict(size).values()]
        sizes += [getattr(images, "max_num_patches", 1)]
        if not all(isinstance(size, int) and 0 < size <= _LARGEST for size in sizes):
            raise ValueError(f"sizes are from 1 to {_LARGEST}, not {sizes}")
    except Exception as error:  # wrong values make transformers fail with any kind of error
        raise UserError(f"{name}: {file} is damaged: {one_line(str(error))}") from None
    return images


def _read_tokenizer(folder: Path, name: str, config: Any) -> Any:
    if not any((folder / file).is_file() for file in VOCABULARIES):  # transformers would make an empty tokenizer
        raise UserError(
            f"{name} has no tokenizer.json or other vocabulary: download all of the model, with `hf download NAME "
            f"--local-dir DIR`, and pass {_INSTEAD}"
        )
    if (folder / VOCABULARIES[0]).is_file():
        check_tokenizer(read_text(folder / VOCABULARIES[0]), f"{name}: {VOCABULARIES[0]}")
    try:
        if named := [key for key in get_tokenizer_config(folder) if key.endswith("_file")]:
            # transformers would read any path that the config names, also outside the folder.
            raise UserError(f"{name}: the tokenizer names a file path ({named[0]}), which is not allowed")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, config=config, trust_remote_code=False, local_files_only=True
        )
        tokenizer("a")
    except UserError:
        raise
    except ImportError as error:
        said = one_line(str(error)).split(". ")[0]
        raise UserError(f"{name}: {said}: pip install 'vlabs[deberta]', which has sentencepiece") from None
    except Exception as error:  # damaged files raise many kinds of errors
        raise UserError(f"{name} holds no tokenizer that can be read: {one_line(str(error))}") from None
    return tokenizer


def _read_model(folder: Path, name: str, config: dict[str, Any], kind: _Kind) -> Any:
    """The model, with all of its weights, in float32."""
    state = read_folder(folder, name)
    try:
        architecture = _architecture(config, kind.model.config_class)
        _check_size(kind, architecture, state)
        model, info = kind.model.from_pretrained(
            None, config=architecture, state_dict=state, dtype=torch.float32, attn_implementation="eager",
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    except Exception as error:  # a manipulated config makes transformers fail with any kind of error
        raise UserError(f"{name} holds no model that can be loaded: {one_line(str(error))[:300]}") from None
    if unlike := sorted(info["mismatched_keys"]):
        weight, there, wanted = unlike[0]
        raise UserError(
            f"{name}: {weight} is {tuple(there)}, but its config.json asks for {tuple(wanted)}: config and weights are "
            "of different models"
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{name} has no {missing[0]} ({len(missing)} weights are missing): name a complete model")
    return model


def _architecture(plain: dict[str, Any], kind: Any) -> Any:
    """A config of a class of transformers, with the values that it declares and nothing else (code, quantization)."""
    declared = {*inspect.get_annotations(kind), *_NAMES}
    values = {key: value for key, value in plain.items() if key in declared}
    for key, part in kind.sub_configs.items():
        # In some older configs of CLIP, transformers lets these win.
        older = plain.get(f"{key}_dict") if kind.model_type == "clip" else None
        values[key] = _architecture(older or values.get(key) or {}, part).to_dict()
    return kind(**values)


def _check_size(kind: _Kind, config: Any, state: dict[str, Tensor]) -> None:
    """Raise a UserError if a config asks for much more memory than its weights justify."""
    with torch.device("meta"), no_more_parameters_than(4 * len(state) + 100):
        model = kind.model(config)
    if sum(one.nbytes for one in model.state_dict().values()) > 2**28 + 4 * sum(one.nbytes for one in state.values()):
        raise UserError("its config asks for many times the memory of its weights")


@contextmanager
def _quietly() -> Iterator[None]:
    """Context manager: transformers says nothing; what is wrong is an error here."""
    loud, shows = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(loud)
        if shows:
            logging.enable_progress_bar()
