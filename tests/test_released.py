"""Released checkpoints give the released numbers, whatever file they come in; everything else is refused by name."""

import argparse
import contextlib
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import ModelCheckpoint

from vlabs.checkpoints.initialize import initialize, read_source
from vlabs.checkpoints.released import load_released, pictures_of
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, IMAGENET_MEAN, IMAGENET_STD
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import RankingHead
from vlabs.models.text import RobertaEncoder
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.film import FiLM
from vlabs.models.vlm import assemble

GOLDEN = Path(__file__).parent / "golden"
HEADS = {"vision_heads": 3, "text_heads": 3, "fusion_heads": 3}
TOLERANCE = 5e-6


def golden(name: str) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in safetensors.torch.load_file(GOLDEN / f"{name}.safetensors").items():
        group, rest = key.split("/", 1)
        parts.setdefault(group, {})[rest] = value
    return parts


def assert_close(actual, expected):
    torch.testing.assert_close(actual.reshape(expected.shape), expected, rtol=0, atol=TOLERANCE)


OF_STEERVIT = "vision_model.trunk.blocks.1.gated_cross_attn"


def steervit_state(width=16, text=12, depth=4, inner=8):
    """A state dict as SteerViT saves it, of words before the blocks 1 and 3, with all of its encoders."""
    torch.manual_seed(0)
    trunk = timm.create_model(
        "vit_base_patch16_224", img_size=32, embed_dim=width, depth=depth, num_heads=2, mlp_ratio=2
    )
    roberta = RobertaEncoder(20, text, 1, 2, 24).roberta
    state = {f"vision_model.trunk.{key}": value for key, value in trunk.state_dict().items()}
    state |= {f"text_model.{key}": value for key, value in roberta.state_dict().items()}
    shapes = {"norm.weight": (width,), "norm.bias": (width,), "to_q.weight": (inner, width)}
    shapes |= {"to_kv.weight": (2 * inner, width), "to_out.weight": (width, inner)}
    for block in (1, 3):
        place = f"vision_model.trunk.blocks.{block}.gated_cross_attn"
        state |= {f"{place}.cross_attn.{name}": torch.randn(shape) for name, shape in shapes.items()}
        state[f"{place}.attn_gate"] = torch.randn(1)
    for name, shape in {
        "connector.mlp.0": (text, text),
        "connector.mlp.2": (width, text),
        "lin_seg_head": (1, width),
    }.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return state, trunk, roberta


def steervit_model(steer=None, start=2, width=16, depth=4, text=12):
    steer = steer or CrossAttention(num_heads=2, head_dim=4, points="head")
    plain = {"embed_dim": width, "depth": depth, "num_heads": 2, "mlp_ratio": 2}
    vision = AbSViT("vit_base_patch16_224", 32, topdown=steer, start=start, **plain)
    fusion = partial(CoAttentionFusion, width=8, depth=1, num_heads=2)
    return assemble(vision, RobertaEncoder(20, text, 1, 2, 24), fusion, RankingHead).eval()


@torch.no_grad()
def test_steervits_files_start_a_model_and_give_its_numbers(tmp_path):
    state, trunk, _ = steervit_state()
    config = {"vision_encoder": {"cross_attn_layers": [1, 3], "use_ffn": False}, "text_encoder": "roberta-large"}
    torch.save({"config": config, "state_dict": state}, tmp_path / "steervit.pth")
    model = steervit_model()
    found = initialize(model, tmp_path / "steervit.pth")
    assert all(name.startswith(("fusion.", "head.", "prior.")) for name in found.new)
    assert all(name.startswith(("vision.vit.head.", "text.roberta.pooler.")) for name in found.left_out)
    images, ids, mask = torch.randn(2, 3, 32, 32), torch.tensor([[0, 5, 6, 2], [0, 7, 2, 1]]), torch.ones(2, 4).long()
    mask[1, 3] = 0
    seen = model(images, ids, mask).seen
    # What its public code computes, in its own names.
    x = trunk.norm_pre(trunk._pos_embed(trunk.patch_embed(images)))
    words = F.normalize(model.text(ids, mask), dim=-1)
    words = F.linear(words, state["connector.mlp.0.weight"], state["connector.mlp.0.bias"]).relu()
    words = F.linear(words, state["connector.mlp.2.weight"], state["connector.mlp.2.bias"])
    for index, block in enumerate(trunk.blocks):
        if index in (1, 3):
            of = {
                key.split("gated_cross_attn.")[1]: value
                for key, value in state.items()
                if f"blocks.{index}.gated" in key
            }
            normed = F.layer_norm(x, (16,), of["cross_attn.norm.weight"], of["cross_attn.norm.bias"])
            q = (normed @ of["cross_attn.to_q.weight"].T).reshape(2, -1, 2, 4).permute(0, 2, 1, 3)
            k, v = (words @ of["cross_attn.to_kv.weight"].T).reshape(2, 4, 2, 2, 4).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bool()[:, None, None])
            x = x + of["attn_gate"].tanh() * (
                mixed.transpose(1, 2).reshape(2, -1, 8) @ of["cross_attn.to_out.weight"].T
            )
        x = block(x)
    x = trunk.norm(x)
    torch.testing.assert_close(seen.tokens, x, rtol=0, atol=1e-5)
    heat = F.linear(x[:, 1:], state["lin_seg_head.weight"], state["lin_seg_head.bias"])[..., 0].softmax(dim=1)
    torch.testing.assert_close(seen.token_weights[:, 1:], heat, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_model.trunk.blocks.2.gated_cross_attn.attn_gate": torch.zeros(1)}, r"before the blocks \[1, 2, 3\]"),
        ({f"{OF_STEERVIT}.ff.1.weight": torch.zeros(1)}, r"feed-forward layers"),
        ({"connector.mlp.0.weight": None}, r"connector.mlp.0.weight of SteerViT is missing"),
        ({"connector.mlp.2.bias": None}, r"connector.mlp.2.bias of SteerViT is missing"),
        ({"lin_seg_head.bias": None}, r"lin_seg_head.bias of SteerViT is missing"),
        ({key: None for key in steervit_state()[0] if "cross_attn" in key}, r"all cross-attention layers of SteerViT"),
        (
            {key: None for key in steervit_state()[0] if "blocks.3.gated_cross_attn" in key},
            r"before the blocks \[1\], and vlabs before every second one",
        ),
        ({f"{OF_STEERVIT}.attn_gate": None}, r"before block 1 lacks attn_gate, unlike SteerViT's"),
        ({f"{OF_STEERVIT}.cross_attn.to_out.weight": None}, r"before block 1 lacks cross_attn.to_out.weight"),
        ({f"{OF_STEERVIT}.cross_attn.bias": torch.zeros(8)}, r"before block 1 has cross_attn.bias"),
        ({f"{OF_STEERVIT}.cross_attn.to_kv.weight": torch.zeros(1, 16)}, r"to_kv.weight has the shape \(1, 16\), not"),
        ({f"{OF_STEERVIT}.cross_attn.to_kv.weight": torch.tensor(1.0)}, r"shape \(\), not \(16, 16\): download it"),
        ({f"{OF_STEERVIT}.cross_attn.to_q.weight": torch.zeros(8)}, r"to_q.weight has the shape \(8,\), not \(0, 16\)"),
        ({f"{OF_STEERVIT}.cross_attn.to_out.weight": torch.zeros(64, 5)}, r"to_out.weight has the shape \(64, 5\)"),
        ({f"{OF_STEERVIT}.cross_attn.norm.weight": torch.zeros(5)}, r"norm.weight has the shape \(5,\), not \(16,\)"),
        ({f"{OF_STEERVIT}.attn_gate": torch.zeros(3)}, r"blocks.1.*attn_gate has the shape \(3,\), not \(1,\)"),
        ({"lin_seg_head.weight": torch.zeros(2, 16)}, r"lin_seg_head.weight has the shape \(2, 16\), not \(1, 16\)"),
        ({"connector.mlp.2.weight": torch.zeros(16)}, r"connector.mlp.2.weight has the shape \(16,\)"),
    ],
)
def test_other_kinds_of_steervit_and_damaged_ones_are_refused(change, message, tmp_path):
    state = {key: value for key, value in (steervit_state()[0] | change).items() if value is not None}
    torch.save({"state_dict": state}, tmp_path / "steervit.pth")
    with pytest.raises(UserError, match=message):
        read_source(tmp_path / "steervit.pth")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"start": 1}, "pass model.vision.start=2$"),
        ({"start": 3}, "pass model.vision.start=2$"),
        ({"steer": CrossAttention(num_heads=2, points="head")}, "pass model.vision.topdown.head_dim=4$"),
        (
            {"steer": CrossAttention(num_heads=3, points="head")},
            "pass a model.vision.topdown.num_heads that divides 8$",
        ),
        ({"steer": CrossAttention(num_heads=2, head_dim=4)}, "pass model.vision.topdown.points=head$"),
        ({"steer": FiLM()}, "pass model/topdown=cross_attention$"),
        ({"width": 8}, "choose a model/vision of width 16, not 8$"),
        ({"depth": 6}, "choose a model/vision with 4 or 5 blocks, not 6$"),
        ({"text": 8}, "choose a model/text of width 12, not 8$"),
    ],
)
def test_a_model_that_steervits_layers_do_not_fit_is_told_what_to_pass(options, said, tmp_path):
    torch.save({"state_dict": steervit_state()[0]}, tmp_path / "steervit.pth")
    with pytest.raises(UserError, match=f"is of SteerViT, and its .* does not fit: {said}"):
        initialize(steervit_model(**options), tmp_path / "steervit.pth")


@pytest.mark.parametrize(
    ("lost", "pretrained", "said"),
    [
        (r"vision_model\.trunk\.blocks\.0\.", (), "no vision.vit.blocks.0.norm1.weight of this shape"),
        (r"vision_model\.trunk\.blocks\.0\.", ("vision", "text"), "no vision.vit.blocks.0.norm1.weight of this shape"),
        (r"vision_model\.trunk\.(?!.*cross)", (), "no vision.vit.cls_token of this shape.* model/vision"),
        (r"vision_model\.trunk\.(?!.*cross)", ("vision",), None),
        (r"text_model\.", ("vision",), "no text.roberta.embeddings.*download it again, or choose the model/text"),
        (r"text_model\.", ("text",), None),
    ],
)
def test_a_file_of_steervit_with_a_part_of_an_encoder_is_refused(lost, pretrained, said, tmp_path):
    state = {key: value for key, value in steervit_state()[0].items() if not re.match(lost, key)}
    torch.save({"state_dict": state}, tmp_path / "steervit.pth")
    model = steervit_model()
    for part in pretrained:
        getattr(model, part).origin = "weights of the encoder alone"
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        initialize(model, tmp_path / "steervit.pth")


def test_a_gate_that_is_not_finite_is_said_to_be_so(tmp_path):
    state = steervit_state()[0] | {f"{OF_STEERVIT}.attn_gate": torch.tensor([float("nan")])}
    torch.save({"state_dict": state}, tmp_path / "steervit.pth")
    with pytest.raises(UserError, match=r"layers.1.gate are not finite: they are damaged"):
        initialize(steervit_model(), tmp_path / "steervit.pth")


@pytest.mark.parametrize("alpha", [1, 10])
@pytest.mark.parametrize("pool", ["token", "gap"])
@torch.no_grad()
def test_classifier_gives_the_released_numbers(pool, alpha):
    numbers = golden(f"absvit_classifier_{pool}")
    module = load_released(numbers["state"], task="classification", vision_heads=3, alpha=alpha)
    out, expected = module(numbers["input"]["image"]), numbers[f"alpha{alpha}"]
    assert_close(out.logits, expected["logits"])
    assert_close(out.logits_bottom_up, expected["logits_bottom_up"])
    assert_close(out.losses["reconstruction"], expected["recon_loss"])
    assert pictures_of(module) == {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop": 0.875}


@pytest.mark.parametrize("task", ["vqa", "retrieval"])
@pytest.mark.parametrize("encoder", ["absvit", "vit"])
@torch.no_grad()
def test_meter_gives_the_released_numbers(encoder, task):
    numbers = golden(f"meter_{encoder}_{'vqa' if task == 'vqa' else 'irtr'}")
    module = load_released(numbers["state"], task=task, **HEADS)
    inputs, expected = numbers["input"], numbers["out"]
    out = module(inputs["image"], inputs["text_ids"], inputs["text_masks"])
    assert_close(out.text_features, expected["text_feats"])
    assert_close(out.image_features, expected["image_feats"])
    assert_close(out.pooled_features, expected["cls_feats"])
    assert pictures_of(module) == {"mean": IMAGE_MEAN, "std": IMAGE_STD}
    if encoder == "absvit":
        assert_close(out.losses["reconstruction"] * 0.3, expected["recon_loss_weighted"])
    if task == "vqa":
        assert_close(out.logits, expected["vqa_logits"])
    else:
        assert_close(out.logits, expected["rank_score"])
        assert_close(out.matching_logits, expected["itm_logits"])


def test_a_lightning_file_with_pickled_arguments_and_callbacks_loads(tmp_path):
    numbers = golden("meter_absvit_vqa")
    content = {
        "state_dict": OrderedDict(numbers["state"]),
        "hyper_parameters": {"config": argparse.Namespace(lr=1e-5)},
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.5)}},
        "epoch": 3,
    }
    torch.save(content, tmp_path / "released.ckpt")
    module = load_released(tmp_path / "released.ckpt", task="vqa", **HEADS)
    inputs = numbers["input"]
    with torch.no_grad():
        assert_close(
            module(inputs["image"], inputs["text_ids"], inputs["text_masks"]).logits, numbers["out"]["vqa_logits"]
        )


def test_a_timm_style_file_and_a_dataparallel_prefix_load(tmp_path):
    numbers = golden("absvit_classifier_gap")
    state = {f"module.{key}": value for key, value in numbers["state"].items()}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "best.pth")
    module = load_released(tmp_path / "best.pth", task="classification", vision_heads=3)
    with torch.no_grad():
        assert_close(module(numbers["input"]["image"]).logits, numbers["alpha1"]["logits"])


class Boom:
    def __reduce__(self):
        return (Path.touch, (Path("boom"),))


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": golden("meter_vit_vqa")["state"], "extra": Boom()}, "evil.ckpt")
    with pytest.raises(UserError, match="pickled code"):
        load_released("evil.ckpt", task="vqa", **HEADS)
    assert not Path("boom").exists()


@pytest.mark.parametrize(
    "key", ["vit_model.head.weight", "text_transformer.pooler.dense.bias", "itm_score.fc.weight", "mlm_score.bias"]
)
def test_unused_keys_may_be_there_or_not(key):
    state = dict(golden("meter_absvit_vqa")["state"])
    state.pop(key, None)
    load_released(state, task="vqa", **HEADS)
    state[key] = torch.zeros(2)
    state["text_transformer.embeddings.position_ids"] = torch.arange(5)[None]
    load_released(state, task="vqa", **HEADS)


def test_missing_and_unexpected_keys_are_named():
    state = dict(golden("meter_absvit_vqa")["state"])
    state["surprise.weight"] = state.pop("cross_modal_text_pooler.dense.bias")
    with pytest.raises(UserError, match="missing cross_modal_text_pooler.dense.bias; unexpected surprise.weight"):
        load_released(state, task="vqa", **HEADS)


@pytest.mark.parametrize(
    ("key", "encoder"),
    [("vit_model.blocks.0.gamma_1", "BEiT"), ("text_transformer.encoder.layer.0.deberta.weight", "DeBERTa")],
)
def test_other_encoders_of_meter_are_refused_by_name(key, encoder):
    with pytest.raises(UserError, match=encoder):
        load_released(dict(golden("meter_vit_vqa")["state"]) | {key: torch.zeros(1)}, task="vqa", **HEADS)


def test_widths_of_text_vision_and_fusion_may_differ():
    """A network built with three widths is written in released names and comes back with the same outputs."""
    from vlabs.models.absvit import AbSViT
    from vlabs.models.fusion import CoAttentionFusion
    from vlabs.models.heads import VQAHead
    from vlabs.models.prior import PriorMap
    from vlabs.models.text import RobertaEncoder
    from vlabs.models.topdown import ReleasedTopDown
    from vlabs.models.vlm import VisionLanguageModel

    torch.manual_seed(0)
    vision = AbSViT("vit_base_patch16_224", 16, 8, ReleasedTopDown(), embed_dim=24, depth=2, num_heads=2, mlp_ratio=2)
    text = RobertaEncoder(30, 32, 1, 2, 64, 20)
    fusion = CoAttentionFusion(32, 24, width=16, depth=2, num_heads=2, mlp_ratio=2)
    model = VisionLanguageModel(vision, text, fusion, VQAHead(32, 5), PriorMap(32, 24, "mean")).eval()
    image, ids, mask = torch.randn(2, 3, 16, 16), torch.randint(3, 30, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    module = load_released(
        {released_name(k): v for k, v in model.state_dict().items()},
        task="vqa", vision_heads=2, text_heads=2, fusion_heads=2,
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(module(image, ids, mask).logits, model(image, ids, mask).logits)


def released_name(name: str) -> str:
    """The inverse of the renaming, written independently."""
    for ours, theirs in [
        ("prior.project.", "vit_model.prompt_decoder."), ("vision.decoders.", "vit_model.decoders."),
        ("vision.vit.", "vit_model."), ("text.roberta.", "text_transformer."),
        ("fusion.text_map.", "cross_modal_text_transform."), ("fusion.image_map.", "cross_modal_image_transform."),
        ("fusion.text_pooler.", "cross_modal_text_pooler.dense."),
        ("fusion.image_pooler.", "cross_modal_image_pooler.dense."),
        ("fusion.token_type.", "token_type_embeddings."), ("head.classifier.", "vqa_classifier."),
        ("fusion.text_layers.", "cross_modal_text_layers."), ("fusion.image_layers.", "cross_modal_image_layers."),
    ]:  # fmt: skip
        name = name.replace(ours, theirs) if name.startswith(ours) else name
    if not name.startswith("cross_modal") or "layers" not in name:
        return name
    for ours, theirs in [(".self_attention.", ".attention."), (".cross_attention.", ".crossattention.")]:
        if ours in name:
            for part in ("query", "key", "value"):
                name = name.replace(f"{ours}{part}.", f"{theirs}self.{part}.")
            return name.replace(f"{ours}out.", f"{theirs}output.dense.").replace(
                f"{ours}norm.", f"{theirs}output.LayerNorm."
            )
    for ours, theirs in [
        ("expand.", "intermediate.dense."),
        ("contract.", "output.dense."),
        ("norm.", "output.LayerNorm."),
    ]:
        name = name.replace(ours, theirs)
    return name
