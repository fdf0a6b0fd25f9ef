"""A model as programs that run without vlabs: ONNX, or torch.export. ξ is an input of the second pass.

    text.onnx           input_ids, attention_mask            ->  text_states, prior
    first_pass.onnx     images                               ->  what the second pass reads of them
    second_pass.onnx    that, prior, text_states, …, image_index  ->  logits, token_weights, seen_tokens

An image is encoded once for all questions, a text once for all images, and ξ may come from anywhere. The numbers of
images, texts and tokens are free. A classifier has no text; its second pass takes only images and ξ.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from vlabs.checkpoints.abilities import pictures_per_text
from vlabs.checkpoints.checkpoint import Checkpoint, load_checkpoint
from vlabs.checkpoints.share import PROGRAMS, is_export
from vlabs.errors import UserError, one_line
from vlabs.models.absvit import AbSViT, AbSViTClassifier, BottomUp
from vlabs.models.hub import PREPROCESSING, TOKENIZER
from vlabs.models.vlm import VisionLanguageModel
from vlabs.utils.files import new_folder

FORMATS = ("onnx", "torch")
_SUFFIX = {"onnx": "onnx", "torch": "pt2"}
_LARGE = 1.5e9  # bytes; an ONNX file holds at most 2 GB, so larger weights go into a file beside it
_IMAGES = ("tokens", "hidden", "embedded", "first_qkv", "cls")


class TextPass(nn.Module):
    """Token ids (n, T) and their mask to text states (n, T, D_text) and ξ (n, D_vision), if there is one."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        states = self.model.text(input_ids, attention_mask)
        prior = self.model.prior_of(states, input_ids, attention_mask)
        return (states,) if prior is None else (states, prior)


class FirstPass(nn.Module):
    """Images (B, 3, H, W) to the tensors of `BottomUp`; those of the variant come last."""

    def __init__(self, encoder: AbSViT) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """See the class."""
        out, topdown = self.encoder.encode(images), self.encoder.topdown
        prepared = out.prepared
        if topdown is not None and not prepared:  # where few patches are kept, `encode` leaves it to the second pass
            prepared = topdown.prepare(out.tokens, self.encoder.feedback)
        return (*(getattr(out, name) for name in _of_images(self.encoder)), *prepared)


class SecondPass(nn.Module):
    """The outputs of `FirstPass` and `TextPass`, and the image of each text, to logits and token weights.

    Args:
        model: the model.
        pictures: p, the images per text: `image_index` is (n, p).
    """

    def __init__(self, model: VisionLanguageModel, pictures: int) -> None:
        super().__init__()
        self.model = model
        self.pictures = pictures

    def forward(
        self, images: list[Tensor], texts: list[Tensor], attention_mask: Tensor, image_index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of B images and n texts: logits (n, answers), token weights (n p, N) and tokens (n p, N, D)."""
        p = self.pictures
        states, prior = texts[0], texts[1] if len(texts) > 1 else None
        if p > 1:
            states, attention_mask = (t.repeat_interleave(p, dim=0) for t in (states, attention_mask))
            prior = None if prior is None else prior.repeat_interleave(p, dim=0)
        out = self.model.join(
            _bottom_up(self.model.vision, images), prior, states, attention_mask, image_index.flatten(), p
        )
        weights = out.seen.token_weights
        return out.logits, torch.zeros_like(out.seen.tokens[..., 0]) if weights is None else weights, out.seen.tokens


class ClassifierSecondPass(nn.Module):
    """The output of `FirstPass` and ξ (B, D) to logits of both passes, (B, K) each, and token weights (B, N)."""

    def __init__(self, model: AbSViTClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: list[Tensor], prior: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        encoder = self.model.encoder
        bottom_up = _bottom_up(encoder, images)
        seen = encoder.attend(bottom_up, prior)
        weights = seen.token_weights
        classify = encoder.backbone.classify
        none = torch.zeros_like(seen.tokens[..., 0])
        return classify(seen.tokens), classify(bottom_up.tokens), none if weights is None else weights


def _of_images(encoder: AbSViT) -> list[str]:
    """What the second pass reads of images, beside the variant's own part."""
    return [*_IMAGES, "read"] if encoder.keep < 1 and encoder.keeps_what_is_read else [*_IMAGES]


def _bottom_up(encoder: AbSViT, images: Sequence[Tensor]) -> BottomUp:
    names = _of_images(encoder)
    known = dict(zip(names, images, strict=False))
    return BottomUp(prepared=list(images[len(names) :]), **known)  # type: ignore[arg-type]


def export_programs(ckpt: str | Path, out: str | Path, form: str = "onnx", overwrite: bool = False) -> Path:
    """Write the programs of a run folder or checkpoint, see `write_programs`.

    Raises:
        UserError: the checkpoint does not exist; and as in `write_programs`.
    """
    return write_programs(load_checkpoint(ckpt), out, form, overwrite)


def write_programs(checkpoint: Checkpoint, out: str | Path, form: str = "onnx", overwrite: bool = False) -> Path:
    """Write the programs of a model with `preprocessing.json` and `tokenizer.json`, completely or not at all.

    Args:
        checkpoint: the model.
        out: the new folder.
        form: `onnx` or `torch`.
        overwrite: `out` may be an earlier export.

    Raises:
        UserError: `out` exists, a package is missing, or a part of the model cannot be exported.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form}: choose one of {', '.join(FORMATS)}")
    if form == "onnx":
        try:
            import onnxscript  # noqa: F401
        except ImportError:
            raise UserError("--format onnx needs the package onnxscript: pip install 'vlabs[onnx]'") from None
    out = Path(out)
    with new_folder(out, "--out", replaces=is_export, overwrite=overwrite) as partial:
        described = {
            _write_part(name, part, partial, form): {"inputs": part.given, "outputs": part.gives}
            for name, part in parts_of(checkpoint).items()
        }
        _write_rest(checkpoint, described, partial)
    return out


class Part(NamedTuple):
    """A part of a model before its export.

    Attributes:
        module, inputs, shapes: arguments of `torch.export.export`.
        given, gives: names of the input and output tensors.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    shapes: tuple[Any, ...]
    given: list[str]
    gives: list[str]


def parts_of(checkpoint: Checkpoint) -> dict[str, Part]:
    """The parts of a model by name, in the order in which they run."""
    if isinstance(checkpoint.network, AbSViTClassifier):
        return _parts_of_classifier(checkpoint)
    if not isinstance(checkpoint.network, VisionLanguageModel):
        raise UserError(
            f"{checkpoint.path} was trained for task={checkpoint.task}, which has no programs: export it as weights"
        )
    model = checkpoint.model
    pictures = pictures_per_text(model)
    images, ids, mask = example_inputs(checkpoint)
    index = torch.tensor([[0, 1], [1, 0], [1, 1]])[:, :pictures]
    index = index[:, 0] if pictures == 1 else index
    of_text, tokens, of_image = Dim("texts"), Dim("tokens"), Dim("images")
    text, first, second = TextPass(model), FirstPass(model.vision), SecondPass(model, pictures)
    with torch.no_grad():
        texts, seen = list(text(ids, mask)), list(first(images))
    made, names = ["text_states", "prior"][: len(texts)], _names(model.vision, seen)
    words = {0: of_text, 1: tokens}
    shapes = [{0: of_image}] * len(seen), [words, {0: of_text}][: len(texts)], words, {0: of_text}
    given, gives = [*names, *made, "attention_mask", "image_index"], ["logits", "token_weights", "seen_tokens"]
    return {
        "text": Part(text, (ids, mask), (words, words), ["input_ids", "attention_mask"], made),
        "first_pass": Part(first, (images,), ({0: of_image},), ["images"], names),
        "second_pass": Part(second, (seen, texts, mask, index), shapes, given, gives),
    }


def _parts_of_classifier(checkpoint: Checkpoint) -> dict[str, Part]:
    model = checkpoint.classifier
    images = example_inputs(checkpoint)[0]
    first, second = FirstPass(model.encoder), ClassifierSecondPass(model)
    with torch.no_grad():
        seen = list(first(images))
    of_image, names = Dim("images"), _names(model.encoder, seen)
    prior = model.prompt.detach().expand(len(images), -1).contiguous()
    gives = ["logits", "bottom_up_logits", "token_weights"]
    shapes = [{0: of_image}] * len(seen), {0: of_image}
    return {
        "first_pass": Part(first, (images,), ({0: of_image},), ["images"], names),
        "second_pass": Part(second, (seen, prior), shapes, [*names, "prior"], gives),
    }


def example_inputs(checkpoint: Checkpoint) -> tuple[Tensor, Tensor, Tensor]:
    """Two images, and three texts of which two are padded: `images`, `input_ids`, `attention_mask`."""
    preprocessing = checkpoint.preprocessing
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, preprocessing.image_size, preprocessing.image_size, generator=generator)
    if not preprocessing.tokenizer:
        return images, torch.zeros(0), torch.zeros(0)
    ids, mask = preprocessing.pad(preprocessing.token_ids(["what is it", "what color is the left one", "is it red"]))
    return images, ids, mask


def _names(encoder: AbSViT, seen: Sequence[Tensor]) -> list[str]:
    names = _of_images(encoder)
    return [*names, *(f"prepared_{n}" for n in range(len(seen) - len(names)))]


def trace(part: Part) -> torch.export.ExportedProgram:
    """Trace a part with torch.export."""
    with torch.no_grad():
        return torch.export.export(part.module.eval(), part.inputs, dynamic_shapes=part.shapes, strict=False)


def _write_part(name: str, part: Part, folder: Path, form: str) -> str:
    """Write a part, and return its file's name."""
    file = folder / f"{name}.{_SUFFIX[form]}"
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = trace(part)
            if form == "torch":
                torch.export.save(program, file)
            else:
                size = sum(value.numel() * value.element_size() for value in part.module.state_dict().values())
                torch.onnx.export(
                    program, (), file, input_names=part.given, output_names=part.gives, dynamo=True, verbose=False,
                    external_data=size > _LARGE,
                )  # fmt: skip
    except Exception as error:  # operations that the format lacks raise many kinds of errors
        raise UserError(f"the part {name} cannot be exported as {form}: {one_line(str(error))[:300]}") from None
    return file.name


def _write_rest(checkpoint: Checkpoint, described: dict[str, Any], folder: Path) -> None:
    plain = checkpoint.preprocessing.to_plain()
    if plain["tokenizer"]:
        (folder / TOKENIZER).write_text(plain["tokenizer"], encoding="utf-8")
    rest = {name: value for name, value in plain.items() if name != "tokenizer"}
    programs: dict[str, Any] = {"task": checkpoint.task, "programs": described}
    if isinstance(checkpoint.network, AbSViTClassifier):
        programs["prior"] = [float(value) for value in checkpoint.network.prompt.detach()]
    for name, content in ((PREPROCESSING, rest), (PROGRAMS, programs)):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
