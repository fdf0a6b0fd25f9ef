"""Start a run from another run's weights: another resolution, another task's head, another top-down variant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlabs.checkpoints.checkpoint import check_header, find_checkpoint, history_of, read_tensors
from vlabs.checkpoints.pretrained import heads_of, is_pretrained
from vlabs.checkpoints.released import find_state, load_released, of_steervit, pictures_of, task_of
from vlabs.data.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.diversity import is_of_pool
from vlabs.models.heads import RankingHead, VQAHead
from vlabs.models.registry import build_shapes, class_of, is_finite
from vlabs.models.segmentation import Segmenter
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.vlm import VisionLanguageModel

_AGAIN = "model.vision.topdown.bias_again"
_LISTED = 20  # largest number of names of one kind in a report


@dataclass
class Initialized:
    """The origin of every parameter, by name.

    Attributes:
        source: the checkpoint.
        loaded: copied.
        resampled: interpolated to another resolution or patch size.
        left_out: in the checkpoint, but this model has no parameter of this name and shape.
        new: in this model, but not in the checkpoint; they keep their fresh values.
        kept: not in the checkpoint either; they keep their pre-trained values.
        derived: computed from others.
        arithmetic: what became of the `bias_again` of the checkpoint's decoders, if the config has another one.
        history: the trainings of these weights, oldest first: task and identity of the data.
    """

    source: Path
    loaded: list[str] = field(default_factory=list)
    resampled: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)
    arithmetic: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)

    def report(self) -> str:
        """A summary in a few lines: counts, and the names of parameters that were not copied, unless there are many."""
        lines = [f"init: {len(self.loaded)} parameters loaded from {self.source}"]
        for what, names in (
            ("resampled", self.resampled),
            ("left out", self.left_out),
            ("pre-trained, not in it", self.kept),
            ("new", self.new),
            ("derived from others", self.derived),
        ):
            if names:
                more = f", and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
                lines.append(f"  {what} ({len(names)}): {', '.join(names[:_LISTED])}{more}")
        if self.arithmetic:
            lines.append(f"  {self.arithmetic}")
        return "\n".join(lines)


def read_source(source: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file that `init=SOURCE` means, and its content.

    Raises:
        UserError: the checkpoint does not exist, or is neither one of vlabs nor a released one.
    """
    path = find_checkpoint(source)
    content = read_tensors(path)
    if "vlabs" in content:
        check_header(content["vlabs"], path)
    else:
        state = find_state(content, str(path))
        task = task_of(state)
        if (steered := of_steervit(state, f"init={source}")) is not None:
            header = {
                "released": "steervit",
                "task": "refer",
                "data": {"name": "SteerViT's"},
                "preprocessing": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
            }
            return path, {"vlabs": header, "state_dict": {f"model.{name}": value for name, value in steered.items()}}
        if task is None and "prompt" not in state:
            raise UserError(f"init={source}: {path} is neither a vlabs checkpoint nor one of the released code")
        released = load_released(state, task=task or "classification")
        header = {
            "task": task or "classify",
            "data": {"name": "" if task else "imagenet"},
            "preprocessing": pictures_of(released),
        }
        state = released.model.state_dict()
        content = {"vlabs": header, "state_dict": {f"model.{name}": value for name, value in state.items()}}
    return path, content


def _topdown_of(architecture: Any) -> dict[str, Any]:
    """The spec of an architecture's top-down variant; empty without one, or if a file has something else there."""

    def part(plain: Any, name: str) -> dict[str, Any]:
        found = plain.get(name) if isinstance(plain, dict) else None
        return found if isinstance(found, dict) else {}

    return part(part(architecture, "vision") or part(architecture, "encoder"), "topdown")


def initialize(
    model: VisionLanguageModel | AbSViTClassifier | Segmenter, source: str | Path, answers: Sequence[str] = ()
) -> Initialized:
    """Fill `model` in place with the weights of a vlabs checkpoint, export or run folder, as far as they fit.

    Args:
        answers: the answer vocabulary of `model`. The head's weights of an answer come from the same answer in the
            source, at any index; an answer that the source does not have keeps its fresh weights.

    Raises:
        UserError: the checkpoint does not exist, or none of its parameters fits; it is of SteerViT, and not all of its
            layers fit.
    """
    path, content = read_source(source)
    encoders = {"encoder.": "vision."} if hasattr(model, "vision") else {"vision.": "encoder."}
    # A checkpoint may say that only some of it is trained (`vlabs.tasks.naming`).
    trained = tuple(f"model.{part}." for part in content["vlabs"].get("trained", [])) or ("model.",)
    state = {
        name.removeprefix("model."): value for name, value in content["state_dict"].items() if name.startswith(trained)
    }
    # A classifier's encoder is what a vision-language model calls vision, and the other way round.
    state = {_renamed(name, encoders): value for name, value in state.items()}
    own: dict[str, Tensor] = dict(model.state_dict())
    result = Initialized(path, history=history_of(content["vlabs"]["task"], content["vlabs"]["data"]))
    chosen: dict[str, Tensor] = {}
    plain = content["vlabs"]["preprocessing"]
    known = plain.get("names", plain.get("answers", []))
    head = getattr(model, "head", None)
    if isinstance(head, VQAHead) and known:
        moved = _move_answers(state, own, known, answers)
        chosen |= moved
        state = {name: value for name, value in state.items() if name not in moved}
        result.derived += [
            f"{name}, the rows of the {len(set(known) & set(answers))} answers that both have" for name in moved
        ]
    theirs = content["vlabs"].get("architecture")  # files of others have none
    if theirs and _topdown_of(theirs).get("class") != _topdown_of(model.spec).get("class"):
        # Layers of another variant may have the same names and shapes, such as a gate, and mean something else.
        variants = tuple(name for name in state if name.startswith(("vision.topdown.", "encoder.topdown.")))
        result.left_out += variants
        state = {name: value for name, value in state.items() if name not in variants}
    for name, value in state.items():
        if name in own and own[name].is_floating_point() and (fault := _fault(value)):
            raise UserError(f"init={source}: the weights {name} are {fault}: they are damaged")
        if name in own and own[name].shape == value.shape:
            chosen[name] = value
            result.loaded.append(name)
        elif (
            name == "fusion.token_type.weight"
            and name in own
            and own[name].shape[1:] == value.shape[1:]
            and len(value) > 1
        ):
            # As in METER, the token type of a second image starts as that of the first. Surplus types are cut.
            more = len(own[name]) - len(value)
            chosen[name] = torch.cat([value, value[1:2].expand(more, -1)]) if more > 0 else value[: len(own[name])]
            result.derived.append(f"{name}, the types of text and image; a second image's is the first's")
        elif name in own and (resampled := _resample(name, value, own[name], model)) is not None:
            chosen[name] = resampled
            result.resampled.append(name)
        else:
            result.left_out.append(name)
    for name in (name for name in own if name not in chosen):
        (result.kept if is_pretrained(model, name) else result.new).append(name)
    if theirs:
        _check_heads(result, model, theirs, len(content["state_dict"]), encoders, f"init={source}")
    if content["vlabs"].get("released") == "steervit":
        _check_steering(result, _vision(model), state, f"init={source}")
    if not chosen:
        raise UserError(f"init={source}: no parameter of it fits this model")
    nn.Module.load_state_dict(model, chosen, strict=False)
    if any(".decoders." in name for name in chosen):
        again, topdown = _adds_bias_again(theirs), _vision(model).topdown
        if keep_arithmetic(model, theirs):
            result.arithmetic = f"its feedback keeps its own arithmetic, {_AGAIN}={str(again).lower()}"
        elif topdown is not None and topdown.bias_again != again:
            result.arithmetic = f"its feedback had {_AGAIN}={str(again).lower()}, and is now read in another arithmetic"
    if isinstance(head, RankingHead) and "head.match.weight" in chosen and "head.rank.weight" not in chosen:
        head.start_from_matching()
        result.derived.append("head.rank, the matching head's row of the pairs that match")
    return result


def _fault(value: Tensor) -> str:
    """What is wrong with float weights; empty if nothing is."""
    if not value.is_floating_point():
        return f"{value.dtype}"
    return "" if is_finite(value) else "not finite"


_HEADS = {
    "vision.vit": "model.vision.num_heads",
    "encoder.vit": "model.vision.num_heads",
    "vision.topdown": "model.vision.topdown.num_heads",
    "text": "model.text.num_attention_heads",
    "fusion": "model.fusion.num_heads",
    "pool": "model.pool_heads",
}


def _check_heads(
    result: Initialized, model: nn.Module, architecture: Any, weights: int, encoders: dict[str, str], name: str
) -> None:
    """Raise a UserError if attention that is loaded has another number of heads in the checkpoint, where the same
    weights mean something else.
    """
    try:
        there = heads_of(build_shapes(architecture, weights))
    except Exception:  # a class that is no longer there, or a spec that was tampered with: what fits is loaded
        return
    there = {_renamed(layer, encoders): count for layer, count in there.items()}
    for layer, count in heads_of(model).items():
        if there.get(layer, count) != count and any(one.startswith(f"{layer}.") for one in result.loaded):
            option = next((option for part, option in _HEADS.items() if layer.startswith(part)), "num_heads")
            raise UserError(
                f"{name}: the attention {layer} has {there[layer]} heads, and {count} in this model, to which its "
                f"weights mean something else: pass {option}={there[layer]}"
            )


_STEERING = re.compile(r"(vision|encoder)\.topdown\.")


def _check_steering(result: Initialized, vision: AbSViT, state: dict[str, Tensor], name: str) -> None:
    """Raise a UserError unless all layers of SteerViT are in the model, and none of the model's is new: a new gate is
    shut, so the text would steer nothing. Only a head that the file does not have may be new, and an encoder that it
    does not have at all may be a pre-trained one.
    """
    new = [one for one in result.new if _STEERING.match(one) and ".topdown.head." not in one]
    if wrong := [one for one in result.left_out if _STEERING.match(one)] + new:
        raise UserError(f"{name} is of SteerViT, and its {wrong[0]} does not fit: {_mended(vision, state)}")
    for part, option in (("vision.vit.", "model/vision"), ("text.", "model/text")):
        loaded = any(one.startswith(part) for one in result.loaded + result.resampled)
        lacking = result.new + (result.kept if loaded else [])
        if wrong := [one for one in lacking if one.startswith(part) and not is_of_pool(one)]:
            raise UserError(
                f"{name} is of SteerViT, and has no {wrong[0]} of this shape: download it again, or choose the "
                f"{option} that it was trained with"
            )


def _mended(vision: AbSViT, state: dict[str, Tensor]) -> str:
    """What to pass so that the layers of a file of SteerViT fit."""
    topdown = vision.topdown
    if not isinstance(topdown, CrossAttention):
        return "pass model/topdown=cross_attention"
    layers = sorted(
        int(found[1]) for one in state if (found := re.fullmatch(r"vision\.topdown\.layers\.(\d+)\.gate", one))
    )
    width, text = state["vision.topdown.connector.2.weight"].shape
    inner = len(state[f"vision.topdown.layers.{layers[0]}.q.weight"])
    if vision.width != width:
        return f"choose a model/vision of width {width}, not {vision.width}"
    if vision.start != layers[0] + 1:
        return f"pass model.vision.start={layers[0] + 1}"
    if (own := vision.backbone.depth) not in (layers[-1] + 1, layers[-1] + 2):
        return f"choose a model/vision with {layers[-1] + 1} or {layers[-1] + 2} blocks, not {own}"
    if (read := int(topdown.state_dict()["connector.0.weight"].shape[1])) != text:
        return f"choose a model/text of width {text}, not {read}"
    if "vision.topdown.head.weight" in state and not topdown.scores_patches:
        return "pass model.vision.topdown.points=head"
    heads = topdown.num_heads
    return (
        f"pass model.vision.topdown.head_dim={inner // heads}"
        if inner % heads == 0
        else (f"pass a model.vision.topdown.num_heads that divides {inner}")
    )


def keep_arithmetic(model: nn.Module, architecture: Any) -> bool:
    """Set `bias_again` of `model` as the decoders of another architecture need it; return whether it changed."""
    own = _vision(model).topdown
    return own is not None and own.add_bias_again(_adds_bias_again(architecture))


def _adds_bias_again(architecture: Any) -> bool:
    """The `bias_again` that the decoders of an architecture were trained with: that of its spec or of its class."""
    topdown = _topdown_of(architecture)
    if "bias_again" in topdown:
        return bool(topdown["bias_again"])
    try:
        return bool(getattr(class_of(topdown), "bias_again", True))
    except UserError:  # the released code's, or of a class that is no longer there
        return True


def _vision(model: nn.Module) -> AbSViT:
    return model.encoder if isinstance(model, AbSViTClassifier) else model.vision  # type: ignore[return-value]


def _renamed(name: str, parts: dict[str, str]) -> str:
    for old, new in parts.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _move_answers(
    state: dict[str, Tensor], own: dict[str, Tensor], known: Sequence[str], answers: Sequence[str]
) -> dict[str, Tensor]:
    """The last layer of a VQA head with its rows in the order of another vocabulary; empty if it is the same."""
    if list(known) == list(answers):
        return {}
    place = {answer: row for row, answer in enumerate(known)}
    both = [(row, place[answer]) for row, answer in enumerate(answers) if answer in place]
    moved: dict[str, Tensor] = {}
    for name in VQAHead.last_layer:
        if both and name in state and state[name].shape[1:] == own[name].shape[1:] and len(state[name]) == len(known):
            to, of = (list(rows) for rows in zip(*both, strict=True))
            # Answers that the source does not have keep the fresh rows.
            moved[name] = own[name].clone()
            moved[name][to] = state[name][of].to(own[name].dtype)
    return moved


def _resample(
    name: str, value: Tensor, target: Tensor, model: VisionLanguageModel | AbSViTClassifier | Segmenter
) -> Tensor | None:
    within = "encoder.vit." if isinstance(model, AbSViTClassifier) else "vision.vit."
    if not name.startswith(within):
        return None
    try:
        resampled = _vision(model).backbone.resample(name.removeprefix(within), value, target)
    except (ArithmeticError, IndexError, RuntimeError, ValueError):  # the tensor has no shape that can be resampled
        return None
    return None if resampled is None or resampled.shape != target.shape else resampled
