"""Checkpoints of the released AbSViT, METER and SteerViT code, loaded into vlabs' own modules with the same outputs.

Released networks differ from the paper (see `ReleasedTopDown` and `PriorMap`); sizes are read from the tensor shapes.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlabs.checkpoints.checkpoint import read_tensors
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, IMAGENET_MEAN, IMAGENET_STD
from vlabs.errors import UserError, one_line
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.backbones.swin import Swin
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import LabelHead, PretrainHead, RankingHead, VQAHead
from vlabs.models.prior import PriorMap
from vlabs.models.text import OtherEncoder, RobertaEncoder, TextEncoder
from vlabs.models.topdown import AbSTopDown, ReleasedTopDown, TopDown
from vlabs.models.vlm import VisionLanguageModel

State = dict[str, Tensor]

# The tasks of METER's checkpoints, and the last layer of the head that identifies each. Pre-training comes last,
# because fine-tuned checkpoints keep its heads.
TASKS = {
    "vqa": "vqa_classifier.3.weight",
    "nlvr2": "nlvr2_classifier.3.weight",
    "snli_ve": "snli_classifier.3.weight",
    "retrieval": "rank_output.weight",
    "pretrain": "mlm_score.decoder.weight",
}

# In the files, but not used by the released forward pass (except itm_score in retrieval, if the file has it).
_UNUSED = re.compile(
    r"^vit_model\.head\.|^text_transformer\.pooler\.|(^|\.)(position|token_type)_ids$|^mlm_score\.|^itm_score\."
)

# From a parameter's name here to its name in the released files, applied in order.
_RELEASED_NAMES = [
    (r"^encoder\.(vit\.)?", ""),
    (r"^prior\.project\.", "vit_model.prompt_decoder."),
    (r"^vision\.decoders\.", "vit_model.decoders."),
    (r"^vision\.vit\.", "vit_model."),
    (r"^text\.(roberta|encoder)\.", "text_transformer."),
    (r"^fusion\.(text|image)_map\.", r"cross_modal_\1_transform."),
    (r"^fusion\.(text|image)_pooler\.", r"cross_modal_\1_pooler.dense."),
    (r"^fusion\.token_type\.", "token_type_embeddings."),
    (r"^fusion\.(text|image)_layers\.", r"cross_modal_\1_layers."),
    (r"\.self_attention\.", ".attention."),
    (r"\.cross_attention\.", ".crossattention."),
    (r"(attention)\.(query|key|value)\.", r"\1.self.\2."),
    (r"(attention)\.out\.", r"\1.output.dense."),
    (r"(attention)\.norm\.", r"\1.output.LayerNorm."),
    (r"^(cross_modal_\w+_layers\.\d+)\.expand\.", r"\1.intermediate.dense."),
    (r"^(cross_modal_\w+_layers\.\d+)\.contract\.", r"\1.output.dense."),
    (r"^(cross_modal_\w+_layers\.\d+)\.norm\.", r"\1.output.LayerNorm."),
    (r"^head\.mlm\.0\.", "mlm_score.transform.dense."),
    (r"^head\.mlm\.2\.", "mlm_score.transform.LayerNorm."),
    (r"^head\.mlm\.3\.weight", "mlm_score.decoder.weight"),
    (r"^head\.mlm\.3\.bias", "mlm_score.bias"),
    (r"^head\.rank\.", "rank_output."),
    (r"^head\.match\.", "itm_score.fc."),
]


@dataclass
class ReleasedOutput:
    """The output of a released network.

    Attributes:
        logits: (n, classes), (n, answers), or the ranking score (n,).
        losses: `reconstruction`, unweighted, summed over blocks; empty for the plain ViT.
        logits_bottom_up: (n, classes) from the first pass, classification only.
        text_features, image_features, pooled_features: from the fusion, vision-language only.
        matching_logits: (n, 2), retrieval and pre-training only.
    """

    logits: Tensor
    losses: dict[str, Tensor]
    logits_bottom_up: Tensor | None = None
    text_features: Tensor | None = None
    image_features: Tensor | None = None
    pooled_features: Tensor | None = None
    matching_logits: Tensor | None = None


class ReleasedClassifier(nn.Module):
    """A released ImageNet AbSViT: `module(image) -> ReleasedOutput`."""

    def __init__(self, model: AbSViTClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> ReleasedOutput:
        """Classify images (B, 3, H, W)."""
        logits, bottom_up, seen = self.model(image)
        assert seen.reconstruction is not None
        return ReleasedOutput(logits, {"reconstruction": seen.reconstruction}, logits_bottom_up=bottom_up)


class ReleasedVLM(nn.Module):
    """A released METER network: `module(image, input_ids, attention_mask) -> ReleasedOutput`."""

    def __init__(self, model: VisionLanguageModel, has_matching: bool) -> None:
        super().__init__()
        self.model = model
        self.has_matching = has_matching

    def forward(
        self, image: Tensor, input_ids: Tensor, attention_mask: Tensor, image_index: Tensor | None = None
    ) -> ReleasedOutput:
        """Images (n, 3, H, W) with texts (n, T); the released ξ depends on T, so pad as the released code does.

        `image_index` is (n, 2) for pairs of images, as in `VisionLanguageModel.forward`.
        """
        out = self.model(image, input_ids, attention_mask, image_index, reconstruct=True, all_features=True)
        head = self.model.head
        return ReleasedOutput(
            out.logits,
            out.losses,
            text_features=out.text_features,
            image_features=out.image_features,
            pooled_features=out.pooled_features,
            matching_logits=head.match(out.pooled_features)
            if isinstance(head, RankingHead | PretrainHead) and self.has_matching
            else None,
        )


def load_released(
    source: str | Path | State,
    *,
    task: str,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    fusion_heads: int | None = None,
    alpha: float = 1.0,
) -> ReleasedClassifier | ReleasedVLM:
    """Load a checkpoint of the released AbSViT code.

    Args:
        source: a `.pth`, `.ckpt` or `.safetensors` file, or its state dict.
        task: `classification`, or one of `TASKS`; METER calls them vqa, irtr, nlvr2, snli and mlm_itm.
        vision_heads, text_heads, fusion_heads: numbers of attention heads, which tensors do not show; width / 64 if
            not given.
        alpha: α of the classifier (the vision-language code has 5 built in).

    Returns:
        A module in eval mode: `module(image)` for classification, else `module(image, input_ids, attention_mask)`.

    Raises:
        UserError: the file holds something else, an encoder that vlabs does not have, or keys are missing or
            unexpected.
    """
    name = "the state dict" if isinstance(source, dict) else str(source)
    state = find_state(source if isinstance(source, dict) else read_tensors(_existing(Path(source))), name)
    if task not in ("classification", *TASKS):
        raise UserError(f"task '{task}': choose one of classification, {', '.join(TASKS)}")

    def load(state: State) -> ReleasedClassifier | ReleasedVLM:
        if task == "classification":
            return _load_classifier(state, name, vision_heads, alpha)
        return _load_vlm(state, name, task, vision_heads, text_heads, fusion_heads)

    try:
        with torch.device("meta"):
            # First with shapes only: a damaged file must not make a huge network before it is refused.
            load({key: value.to("meta") for key, value in state.items()})
        return load(state)
    except UserError:
        raise
    except Exception as error:  # tensors of other shapes make the parts fail with any kind of error
        raise UserError(f"{name} is not a checkpoint of this kind: {one_line(str(error))}") from None


def pictures_of(module: ReleasedClassifier | ReleasedVLM) -> dict[str, Any]:
    """How the released code reads images for a model, by the names of `Preprocessing`."""
    if isinstance(module, ReleasedClassifier):
        return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop": 0.875}
    as_imagenet = isinstance(module.model.vision.backbone, Swin)
    return {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if as_imagenet else {"mean": IMAGE_MEAN, "std": IMAGE_STD}


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    return path


def find_state(content: dict[str, Any], name: str) -> State:
    """The tensors of a checkpoint, wherever the released scripts put them, without a DataParallel prefix.

    If they are in several dictionaries (DINO's teacher and student), those are their prefixes.
    """
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    if not any(isinstance(value, Tensor) for value in content.values()):
        parts = {name: part for name, part in content.items() if isinstance(part, dict)}
        content = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{name} has no tensors by name, so it is not a checkpoint")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _load_classifier(state: State, name: str, heads: int | None, alpha: float) -> ReleasedClassifier:
    if "prompt" not in state:
        raise UserError(f"{name} is not an AbSViT classifier: 'prompt' is missing (for a METER file, pass task='vqa')")
    pool = "avg" if "fc_norm.weight" in state else "token"
    topdown = AbSTopDown(alpha, bias_again=True)
    encoder = _vision(state, "", name, heads, topdown, pool, num_classes=_need(state, "head.weight", name)[0])
    model = AbSViTClassifier(encoder)
    _fill(model, state, name)
    return ReleasedClassifier(model).eval()


def _load_vlm(
    state: State, name: str, task: str, vision_heads: int | None, text_heads: int | None, fusion_heads: int | None
) -> ReleasedVLM:
    _refuse_other_encoders(state, name)
    steered = any(key.startswith("vit_model.decoders.") for key in state)
    if "vit_model.visual.conv1.weight" in state:
        vision, state = _clip(state, name, vision_heads)
    elif "vit_model.layers.0.blocks.0.norm1.weight" in state:
        vision, state = _swin(state, name)
    else:
        vision = _vision(state, "vit_model.", name, vision_heads, ReleasedTopDown() if steered else None, "token")
    text = _text(state, name, text_heads)
    width = _need(state, "cross_modal_text_transform.weight", name)[0]
    pictures = _need(state, "token_type_embeddings.weight", name)[0] - 1
    fusion = CoAttentionFusion(
        text.width,
        vision.width,
        width=width,
        depth=_depth(state, "cross_modal_text_layers."),
        num_heads=fusion_heads or _default_heads(width),
        mlp_ratio=_need(state, "cross_modal_text_layers.0.intermediate.dense.weight", name)[0] / width,
        image_pool="first" if vision.has_cls else "mean",
        pictures=pictures,
    )
    rows = _need(state, TASKS[task], name)[0]
    head: nn.Module
    if task == "vqa":
        head = VQAHead(2 * width, rows)
    elif task == "retrieval":
        head = RankingHead(2 * width)
    elif task == "pretrain":
        head = PretrainHead(2 * width, rows)
    else:
        head = LabelHead(2 * width, rows, pictures)
    prior = PriorMap(text.width, vision.width, "mean" if task == "vqa" else "eos") if steered else None
    model = VisionLanguageModel(vision, text, fusion, head, prior)
    has_matching = "itm_score.fc.weight" in state
    _fill(model, state, name, task)
    return ReleasedVLM(model, has_matching).eval()


def _refuse_other_encoders(state: State, name: str) -> None:
    others = {
        r"^vit_model\.blocks\..*(relative_position|gamma_1)": "a BEiT or CaiT",
        r"^text_transformer\.(encoder\.albert|embeddings_project|.*deberta|.*rel_embeddings)": "an ALBERT or DeBERTa",
    }
    for pattern, encoder in others.items():
        if any(re.search(pattern, key) for key in state):
            raise UserError(
                f"{name} holds {encoder}: of METER's encoders vlabs loads ViT, CLIP, Swin, AbSViT, RoBERTa and BERT"
            )


# From a parameter's name in SteerViT's files to its name here, applied in order.
_STEERVIT_NAMES = [
    (r"^vision_model\.trunk\.blocks\.(\d+)\.gated_cross_attn\.", r"vision.topdown.layers.\1."),
    (r"\.cross_attn\.(norm|to_q|to_out)\.", r".\1."),
    (r"\.to_(q|out)\.", r".\1."),
    (r"\.attn_gate$", ".gate"),
    (r"^vision_model\.trunk\.", "vision.vit."),
    (r"^text_model\.", "text.roberta."),
    (r"^connector\.mlp\.", "vision.topdown.connector."),
    (r"^lin_seg_head\.", "vision.topdown.head."),
]
_STEERVIT_LAYER = {"attn_gate", "cross_attn.norm.weight", "cross_attn.norm.bias"} | {
    f"cross_attn.to_{part}.weight" for part in ("q", "kv", "out")
}


def of_steervit(state: State, name: str) -> State | None:
    """The tensors of a file of SteerViT under the names of a model with `CrossAttention`; None for other files.

    Keys and values are one map there. The model has `points=head`, and as `start` the first block that reads words,
    counted from 1; `initialize` refuses others.

    Raises:
        UserError: its layers are not before every second block, have feed-forward layers, or are not whole, or their
            shapes do not fit each other.
    """
    if "connector.mlp.0.weight" not in state and not any(".gated_cross_attn." in key for key in state):
        return None
    found: dict[int, set[str]] = defaultdict(set)
    for key in state:
        if match := re.match(r"vision_model\.trunk\.blocks\.(\d+)\.gated_cross_attn\.(.+)", key):
            found[int(match[1])].add(match[2])
    layers = sorted(found)
    if any(part.startswith("ff") for parts in found.values() for part in parts):
        raise UserError(f"{name}: its cross-attention has feed-forward layers (use_ffn), which vlabs' does not have")
    blocks = [int(match[1]) for key in state if (match := re.match(r"vision_model\.trunk\.blocks\.(\d+)\.", key))]
    if not layers:
        raise UserError(f"{name}: all cross-attention layers of SteerViT are missing: download it again")
    if layers != list(range(layers[0], max(blocks) + 1, 2)):
        raise UserError(f"{name}: it reads words before the blocks {layers}, and vlabs before every second one")
    maps = ["connector.mlp.0", "connector.mlp.2", *["lin_seg_head"] * any("lin_seg_head." in key for key in state)]
    if lacking := [key for one in maps for key in (f"{one}.weight", f"{one}.bias") if key not in state]:
        raise UserError(f"{name}: {lacking[0]} of SteerViT is missing: download it again")
    for block, parts in found.items():
        _check_steervit_layer(state, block, parts, name)
    _check_steervit_shapes(state, layers, name)
    converted: State = {}
    for key, value in state.items():
        ours = key
        for pattern, replacement in _STEERVIT_NAMES:
            ours = re.sub(pattern, replacement, ours)
        if ".cross_attn.to_kv." in ours:
            for part, letter in zip(value.chunk(2), "kv", strict=True):
                converted[ours.replace(".cross_attn.to_kv.", f".{letter}.")] = part
        else:
            converted[ours] = value.reshape(()) if ours.endswith(".gate") and value.numel() == 1 else value
    return converted


def _check_steervit_layer(state: State, block: int, parts: set[str], name: str) -> None:
    """Raise a UserError unless a layer is whole; what it lacked would be left as new, and a new gate is shut."""
    before = f"{name}: its cross-attention before block {block}"
    if wrong := sorted(parts ^ _STEERVIT_LAYER):
        what = "has" if wrong[0] in parts else "lacks"
        raise UserError(f"{before} {what} {wrong[0]}, unlike SteerViT's: download it again")


def _check_steervit_shapes(state: State, blocks: list[int], name: str) -> None:
    """Raise a UserError for a tensor of the layers before `blocks`, or of the maps, whose shape is not by the widths
    that the file itself has: of text, tokens and attention.
    """
    shape = state["connector.mlp.2.weight"].shape
    width, text = shape if len(shape) == 2 else (0, 0)
    wanted: dict[str, tuple[int, ...]] = {
        "connector.mlp.2.weight": (width, text),
        "connector.mlp.2.bias": (width,),
        "connector.mlp.0.weight": (text, text),
        "connector.mlp.0.bias": (text,),
    }
    if "lin_seg_head.weight" in state:
        wanted |= {"lin_seg_head.weight": (1, width), "lin_seg_head.bias": (1,)}
    for block in blocks:
        of = f"vision_model.trunk.blocks.{block}.gated_cross_attn"
        inner = state[f"{of}.cross_attn.to_q.weight"].numel() // max(1, width)
        wanted |= {f"{of}.cross_attn.norm.{part}": (width,) for part in ("weight", "bias")}
        shapes = {"q": (inner, width), "kv": (2 * inner, width), "out": (width, inner)}
        wanted |= {f"{of}.cross_attn.to_{part}.weight": one for part, one in shapes.items()}
        if (gate := state[f"{of}.attn_gate"]).numel() != 1:
            raise UserError(f"{name}: {of}.attn_gate has the shape {tuple(gate.shape)}, not (1,): download it again")
    for key, expected in wanted.items():
        if (found := tuple(state[key].shape)) != expected:
            raise UserError(f"{name}: {key} has the shape {found}, not {expected}: download it again")


def task_of(state: State) -> str | None:
    """The task of a METER checkpoint by its head; None for other files. Fine-tuned ones keep heads of pre-training."""
    if "cross_modal_text_transform.weight" not in state:
        return None
    return next((task for task, key in TASKS.items() if key in state), None)


def _clip(state: State, name: str, heads: int | None) -> tuple[AbSViT, State]:
    """METER's CLIP ViT, and the checkpoint with its weights under timm's names."""
    prefix = "vit_model.visual."
    width, _, patch, _ = _need(state, f"{prefix}conv1.weight", name)
    side = math.isqrt(_need(state, f"{prefix}positional_embedding", name)[0] - 1)  # without [cls]
    blocks = f"{prefix}transformer.resblocks."
    vision = AbSViT(
        "vit_base_patch16_clip_quickgelu_224",
        img_size=side * patch,
        patch_size=patch,
        embed_dim=width,
        depth=_depth(state, blocks),
        num_heads=heads or _default_heads(width),
        mlp_ratio=_need(state, f"{blocks}0.mlp.c_fc.weight", name)[0] / width,
    )
    return vision, _with_timm_names(vision, state, name)


def _swin(state: State, name: str) -> tuple[AbSViT, State]:
    """METER's Swin, and the checkpoint with its weights under timm's names. In the last stage a window is the image."""
    prefix = "vit_model."
    width, _, patch, _ = _need(state, f"{prefix}patch_embed.proj.weight", name)
    stages = range(_depth(state, f"{prefix}layers."))
    tables = [
        _need(state, f"{prefix}layers.{stage}.blocks.0.attn.relative_position_bias_table", name) for stage in stages
    ]
    # A window of w × w has (2w - 1)² offsets. The last of s stages has one window, and each stage before twice the
    # side.
    window = (math.isqrt(tables[0][0]) + 1) // 2
    vision = AbSViT(
        "swin_base_patch4_window12_384",
        img_size=window * patch * 2 ** (len(stages) - 1),
        patch_size=patch,
        embed_dim=width,
        depths=[_depth(state, f"{prefix}layers.{stage}.blocks.") for stage in stages],
        num_heads=[heads for _, heads in tables],
        window_size=window,
        mlp_ratio=_need(state, f"{prefix}layers.0.blocks.0.mlp.fc1.weight", name)[0] / width,
    )
    return vision, _with_timm_names(vision, state, name)


def _with_timm_names(vision: AbSViT, state: State, name: str) -> State:
    """The checkpoint with the image encoder's tensors under the names that `vision` has for them."""
    of_vision = {key.removeprefix("vit_model."): value for key, value in state.items() if key.startswith("vit_model.")}
    try:
        converted = vision.backbone.convert(of_vision)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise UserError(f"{name} holds an image encoder that is not METER's: {error}") from None
    others = {key: value for key, value in state.items() if not key.startswith("vit_model.")}
    return others | {f"vit_model.{key}": value for key, value in converted.items()}


def _vision(
    state: State, prefix: str, name: str, heads: int | None, topdown: TopDown | None, pool: str, num_classes: int = 0
) -> AbSViT:
    width, _, patch, _ = _need(state, f"{prefix}patch_embed.proj.weight", name)
    patches = _need(state, f"{prefix}pos_embed", name)[1] - 1
    if math.isqrt(patches) ** 2 != patches:
        raise UserError(f"{name} has {patches} patch positions, which is not a square image")
    return AbSViT(
        "vit_base_patch16_224",
        img_size=math.isqrt(patches) * patch,
        patch_size=patch,
        topdown=topdown,
        global_pool=pool,
        num_classes=num_classes,
        embed_dim=width,
        depth=_depth(state, f"{prefix}blocks."),
        num_heads=heads or _default_heads(width),
        mlp_ratio=_need(state, f"{prefix}blocks.0.mlp.fc1.weight", name)[0] / width,
        qkv_bias=f"{prefix}blocks.0.attn.qkv.bias" in state,
    )


def _text(state: State, name: str, heads: int | None) -> TextEncoder:
    prefix = "text_transformer."
    vocabulary, width = _need(state, f"{prefix}embeddings.word_embeddings.weight", name)
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": _depth(state, f"{prefix}encoder.layer."),
        "num_attention_heads": heads or _default_heads(width),
        "intermediate_size": _need(state, f"{prefix}encoder.layer.0.intermediate.dense.weight", name)[0],
        "max_position_embeddings": _need(state, f"{prefix}embeddings.position_embeddings.weight", name)[0],
    }
    types = _need(state, f"{prefix}embeddings.token_type_embeddings.weight", name)[0]
    if types == 1:  # RoBERTa has one token type, BERT two
        return RobertaEncoder(**sizes)
    return OtherEncoder("bert", **sizes, type_vocab_size=types)


def _need(state: State, key: str, name: str) -> tuple[int, ...]:
    if key not in state:
        raise UserError(f"{name} is not a checkpoint of this kind: '{key}' is missing")
    return tuple(state[key].shape)


def _depth(state: State, prefix: str) -> int:
    """Number of blocks, which are numbered from 0. It cannot exceed the number of tensors, as a damaged name could."""
    blocks = {key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)}
    if blocks != {str(number) for number in range(len(blocks))}:
        raise UserError(f"it is not a checkpoint of this kind: its blocks '{prefix}' are not numbered from 0")
    return len(blocks)


def _default_heads(width: int) -> int:
    return max(1, width // 64)


def _released_name(name: str, classifier: str) -> str:
    name = re.sub(r"^head\.classifier\.", f"{classifier}.", name)
    for pattern, replacement in _RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _fill(model: nn.Module, state: State, name: str, task: str = "") -> None:
    """Copy the released tensors into `model`. All parameters must be there, and nothing else that is used."""
    classifier = TASKS.get(task, "").partition(".")[0]
    released = {_released_name(key, classifier): key for key in model.state_dict()}
    needed = ("itm_score.", "mlm_score.") if task == "pretrain" else ()
    others = tuple(key.partition(".")[0] + "." for of, key in TASKS.items() if of != task)  # heads of other tasks
    missing = [key for key in released if key not in state and (key.startswith(needed) or not _UNUSED.search(key))]
    unexpected = [
        key for key in state if key not in released and not _UNUSED.search(key) and not key.startswith(others)
    ]
    if missing or unexpected:
        parts = [f"missing {', '.join(missing)}"] if missing else []
        parts += [f"unexpected {', '.join(unexpected)}"] if unexpected else []
        raise UserError(f"{name} does not hold the expected network: {'; '.join(parts)}")
    found = {ours: state[key] for key, ours in released.items() if key in state}
    try:
        model.load_state_dict(found, strict=False)
    except RuntimeError as error:
        raise UserError(f"{name}: {error}") from None
