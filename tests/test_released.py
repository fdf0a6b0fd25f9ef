"""Released checkpoints give the released numbers, whatever file they come in; everything else is refused by name."""

import argparse
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from vlabs.checkpoints.released import load_released, pictures_of
from vlabs.data.preprocessing import IMAGE_MEAN, IMAGE_STD, IMAGENET_MEAN, IMAGENET_STD
from vlabs.errors import UserError

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
