"""Models as folders of plain data and safetensors, and on the Hugging Face hub, by huggingface_hub's own mixin.

A folder holds `config.json` (the architecture, and what else is known about the model), `model.safetensors` and, if it
is known how images and texts are read, `preprocessing.json` and `tokenizer.json`. Reading it executes nothing.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import safetensors.torch
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from torch import Tensor

from vlabs.errors import UserError, one_line
from vlabs.models.registry import restore
from vlabs.utils.hub import download
from vlabs.utils.plain import check_files, parse_json, read_text

CONFIG, WEIGHTS, PREPROCESSING, TOKENIZER = "config.json", "model.safetensors", "preprocessing.json", "tokenizer.json"
FILES = (CONFIG, WEIGHTS, PREPROCESSING, TOKENIZER, "README.md")


class Shareable(ModelHubMixin, library_name="vlabs", tags=["vlabs", "absvit"]):
    """Gives a registered model `from_pretrained`, `save_pretrained` and `push_to_hub`.

    Attributes:
        about: what is known about it beside the architecture, as plain data: task, training data, preprocessing. It is
            saved too; `vlabs.load` needs it.
    """

    spec: dict[str, Any]
    about: dict[str, Any]

    def _save_pretrained(self, save_directory: Path) -> None:
        about = getattr(self, "about", {})
        state = {name: value.contiguous() for name, value in self.state_dict().items()}  # type: ignore[attr-defined]
        write_folder(save_directory, {"architecture": self.spec} | about, state)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **unused: Any,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            options: dict[str, Any] = {
                "cache_dir": cache_dir,
                "force_download": force_download,
                "local_files_only": local_files_only,
            }
            folder = download(model_id, FILES, revision=revision, token=token, **options)
        header = read_header(folder)
        weights = read_weights(folder / WEIGHTS)
        try:
            model = restore(header["architecture"], weights)
        except UserError as error:
            raise UserError(f"{folder / CONFIG} does not fit {WEIGHTS}: {error}") from None
        if not isinstance(model, cls):
            raise UserError(f"{model_id} holds a {type(model).__name__}, not a {cls.__name__}")
        model.about = {name: value for name, value in header.items() if name != "architecture"}
        return model.eval()  # type: ignore[attr-defined,no-any-return]

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card of a model without a run; `vlabs export` writes a full one from a run."""
        card_data: ModelCardData = self._hub_mixin_info.model_card_data
        task = getattr(self, "about", {}).get("task")
        of = f", trained for the task `{task}`" if task else ""
        text = f"# {type(self).__name__}\n\nA model of vlabs{of}: `vlabs.load(NAME)`.\n"
        return ModelCard(f"---\n{card_data.to_yaml()}\n---\n\n{text}")


def write_folder(folder: Path, header: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Write a model's folder, without its card.

    Args:
        header: plain data; its `preprocessing`, if any, goes into files of its own.
        state: weights by the model's own names.
    """
    header = dict(header)
    preprocessing = header.pop("preprocessing", None)
    if preprocessing:
        rest = {name: value for name, value in preprocessing.items() if name != "tokenizer"}
        _write_json(folder / PREPROCESSING, rest)
        if preprocessing["tokenizer"]:
            (folder / TOKENIZER).write_text(preprocessing["tokenizer"], encoding="utf-8")
    _write_json(folder / CONFIG, header)
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def read_header(folder: Path) -> dict[str, Any]:
    """Read the plain data of a model's folder, including `preprocessing` with its tokenizer.

    Raises:
        UserError: it is not a folder of a model.
    """
    check_files(folder, FILES)
    header = _read_json(folder / CONFIG)
    if not isinstance(header, dict):
        raise UserError(f"{folder / CONFIG} is not of a model of vlabs: it is not a dictionary")
    if "architecture" not in header:
        looked = ": `vlabs look --model` shows where CLIP, SigLIP, BLIP and ViLT look" if "model_type" in header else ""
        of = "of a model of transformers, not of vlabs" if looked else "not of a model of vlabs"
        raise UserError(f"{folder / CONFIG} is {of}{looked or ': it does not say its architecture'}")
    if (folder / PREPROCESSING).exists():
        preprocessing = _read_json(folder / PREPROCESSING)
        if not isinstance(preprocessing, dict):
            raise UserError(f"{folder / PREPROCESSING} is damaged: it holds no preprocessing")
        text = read_text(folder / TOKENIZER) if (folder / TOKENIZER).exists() else ""
        header["preprocessing"] = preprocessing | {"tokenizer": text}
    return header


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # a damaged file makes the reader fail in every way there is
        with suppress(OSError), open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise UserError(f"{path} only says where its content is: fetch it with `git lfs pull`") from None
        raise UserError(f"{path} is not a whole safetensors file: {one_line(str(error))}") from None


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> Any:
    return parse_json(read_text(path), str(path))
