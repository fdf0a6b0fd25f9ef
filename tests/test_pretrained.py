"""Encoders from local weights and the hub's cache: timm, transformers; and the package as it is installed."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import assert_one_line_error, clean_environment
from huggingface_hub import save_torch_state_dict
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer, models
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, DebertaV2Config, ModernBertConfig, RobertaConfig, RobertaModel

from vlabs.checkpoints.initialize import initialize
from vlabs.checkpoints.pretrained import report, text_from_pretrained, vit_from_timm
from vlabs.data.tokenizer import read_tokenizer
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.backbones import patch_size_of
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import VQAHead
from vlabs.models.registry import build
from vlabs.models.segmentation import UperNet, assemble_segmenter
from vlabs.models.text import RobertaEncoder
from vlabs.models.topdown import AbSTopDown
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.vlm import assemble
from vlabs.runs.groups import config_dir
from vlabs.utils.hub import hub_name

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def timm_file(tmp_path):
    vit = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=8, num_classes=5, **SMALL)
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(vit.state_dict(), path)
    return path, vit.eval()


def test_commands_without_the_compiler_build_the_text_encoders_of_transformers():
    """In a process of its own, because in this one the compiler may be imported already."""
    sizes = "vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8"
    code = (
        "import sys; from vlabs.utils.imports import quick_imports\n"
        "with quick_imports('wandb'):\n"
        f"    from vlabs.models.text import OtherEncoder; OtherEncoder('bert', {sizes})\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@torch.no_grad()
def test_a_timm_file_loads_whole(timm_file):
    path, vit = timm_file
    encoder = vit_from_timm(
        str(path), "vit_base_patch16_224", img_size=32, patch_size=8, topdown=AbSTopDown(), **SMALL
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.encode(images).tokens, vit.forward_features(images))


def test_position_embeddings_are_resampled_to_another_resolution_as_meter_does(timm_file):
    path, vit = timm_file
    encoder = vit_from_timm(str(path), "vit_base_patch16_224", img_size=48, patch_size=8, **SMALL)
    grid = vit.pos_embed[0, 1:].unflatten(0, (4, 4)).permute(2, 0, 1)[None]
    resized = F.interpolate(grid, size=(6, 6), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(encoder.vit.pos_embed[0], torch.cat([vit.pos_embed[0, :1], resized]))


def test_a_timm_file_of_another_size_is_named(timm_file):
    with pytest.raises(UserError, match=r"vit\.safetensors does not fit"):
        vit_from_timm(str(timm_file[0]), "vit_base_patch16_224", img_size=32, patch_size=8, **SMALL | {"depth": 3})


def test_the_encoder_of_a_larger_model_is_found_by_its_names(timm_file, tmp_path):
    state = timm_file[1].state_dict()
    make = partial(vit_from_timm, architecture="vit_base_patch16_224", img_size=32, patch_size=8, **SMALL)
    named = {f"model.backbone.{key}": value for key, value in state.items()}
    safetensors.torch.save_file(named | {"head.weight": torch.zeros(2, 2)}, tmp_path / "lightning.safetensors")
    encoder = make(str(tmp_path / "lightning.safetensors"))
    assert torch.equal(encoder.vit.blocks[1].mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])
    assert encoder.origin.endswith("(the part model.backbone; 1 tensors of others left out)")
    torch.save({"teacher": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, tmp_path / "dino.pth")
    assert "(the part teacher.module)" in make(str(tmp_path / "dino.pth")).origin
    torch.save({"teacher": state, "student": state}, tmp_path / "both.pth")
    with pytest.raises(UserError, match=r"both.pth has the encoder 2 times, in student, teacher: save one"):
        make(str(tmp_path / "both.pth"))


@torch.no_grad()
def test_the_last_blocks_can_be_left_out_as_meter_does(timm_file):
    path, vit = timm_file
    encoder = vit_from_timm(str(path), "vit_base_patch16_224", img_size=32, patch_size=8, **SMALL | {"depth": 1}).eval()
    images = torch.randn(2, 3, 32, 32)
    vit.blocks = vit.blocks[:1]
    torch.testing.assert_close(encoder.encode(images).tokens, vit.forward_features(images))


def test_a_file_needs_its_architecture_and_must_be_there(timm_file):
    with pytest.raises(UserError, match=r"model\.vision\.architecture"):
        vit_from_timm(str(timm_file[0]))
    with pytest.raises(UserError, match="does not exist"):
        vit_from_timm("nowhere.safetensors", "vit_base_patch16_224")
    with pytest.raises(UserError, match=r"pass model\.vision\.weights=vit_small_patch14_dinov2\.lvd142m$"):
        vit_from_timm("timm/vit_small_patch14_dinov2.lvd142m")
    with pytest.raises(UserError, match=r"near it: vit_small_patch14_dinov2, "):
        vit_from_timm(None, "vit_small_patch14_dinov")


@torch.no_grad()
def test_a_roberta_folder_loads_with_its_sizes(tmp_path):
    config = RobertaConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        max_position_embeddings=20, type_vocab_size=1,
    )  # fmt: skip
    source = RobertaModel(config, add_pooling_layer=True).eval()
    source.save_pretrained(tmp_path)
    encoder = text_from_pretrained(str(tmp_path)).eval()
    ids, mask = torch.tensor([[0, 5, 6, 2, 1]]), torch.tensor([[1, 1, 1, 1, 0]])
    expected = source(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(encoder(ids, mask), expected)
    assert encoder.max_length == 18


def test_a_roberta_is_that_of_transformers_with_the_same_weights_from_a_seed():
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 20, "type_vocab_size": 1}
    torch.manual_seed(0)
    source = RobertaModel(RobertaConfig(**sizes, layer_norm_eps=1e-5), add_pooling_layer=False)
    torch.manual_seed(0)
    encoder = RobertaEncoder(**sizes)
    for (name, one), (there, other) in zip(encoder.named_parameters(), source.named_parameters(), strict=True):
        assert name == f"roberta.{there}"
        assert torch.equal(one, other), name
    ids = torch.tensor([[0, 5, 6, 7, 8, 2, 1], [0, 9, 2, 1, 1, 1, 1]])
    mask = (ids != 1).long()
    there = mask.bool()
    for recompute in (False, True):
        torch.manual_seed(1)  # with dropout
        expected = source(input_ids=ids, attention_mask=mask).last_hidden_state[there]
        torch.manual_seed(1)
        found = encoder(ids, mask)[there]
        torch.testing.assert_close(found, expected)
        source.zero_grad(), encoder.zero_grad()
        expected.square().sum().backward()
        found.square().sum().backward()
        for one, other in zip(encoder.parameters(), source.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        assert encoder.roberta.recompute is recompute
        encoder.recompute_activations()
    with pytest.raises(ValueError, match="24 is not a multiple of the 5 attention heads"):
        RobertaEncoder(**sizes | {"num_attention_heads": 5})


OTHERS = {
    "bert": BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
                       max_position_embeddings=20),
    "modernbert": ModernBertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=4, num_attention_heads=3,
                                   intermediate_size=48, max_position_embeddings=20, local_attention=4, pad_token_id=1,
                                   bos_token_id=0, eos_token_id=2, cls_token_id=0, sep_token_id=2),
    "deberta-v2": DebertaV2Config(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
                                  intermediate_size=48, max_position_embeddings=20, relative_attention=True,
                                  position_buckets=8, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
                                  share_att_key=True),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_text_encoders_give_transformers_outputs_and_come_back_from_a_checkpoint(name, tmp_path):
    source = AutoModel.from_config(OTHERS[name]).eval()
    source.save_pretrained(tmp_path)
    encoder = text_from_pretrained(str(tmp_path)).eval()
    ids, mask = (
        torch.tensor([[0, 5, 6, 7, 8, 2, 1], [0, 9, 2, 1, 1, 1, 1]]),
        torch.tensor([[1] * 6 + [0], [1] * 3 + [0] * 4]),
    )
    expected = source(input_ids=ids, attention_mask=mask).last_hidden_state
    there = mask.bool()
    torch.testing.assert_close(encoder(ids, mask)[there], expected[there])
    assert (encoder.width, encoder.max_length, encoder.vocab_size) == (24, 20, 60)
    again = build(json.loads(json.dumps(encoder.spec))).eval()
    again.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(again(ids, mask)[there], expected[there])
    # In a larger model.
    state = {f"0.auto_model.{key}": value for key, value in source.state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.testing.assert_close(text_from_pretrained(str(tmp_path)).eval()(ids, mask)[there], expected[there])
    # Recomputed activations give the same gradients.
    encoder.train(), again.train()
    for module in (*encoder.modules(), *again.modules()):
        if isinstance(module, nn.Dropout) or type(module).__name__ == "StableDropout":
            module.p = module.drop_prob = 0.0
    encoder.recompute_activations()
    encoder(ids, mask)[there].square().sum().backward()
    again(ids, mask)[there].square().sum().backward()
    for (key, one), other in zip(encoder.named_parameters(), again.parameters(), strict=True):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5, msg=key)


def test_text_encoders_that_there_are_not_are_named(tmp_path):
    with pytest.raises(UserError, match="has no config.json, model.safetensors"):
        text_from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 60}))
    with pytest.raises(UserError, match="is a gpt2: a text encoder is one of roberta, bert, deberta-v2, modernbert"):
        text_from_pretrained(str(tmp_path))


# What is loaded, in which form


def as_timm_folder(folder, model, **config):
    """What `hf download timm/TAG --local-dir` gives."""
    folder.mkdir()
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"} | config))
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_becomes_float32_exactly_at_another_size_too(dtype, timm_file, tmp_path):
    state = {name: value.to(dtype) for name, value in timm_file[1].state_dict().items()}
    safetensors.torch.save_file(state, tmp_path / "half.safetensors")
    safetensors.torch.save_file({name: value.float() for name, value in state.items()}, tmp_path / "full.safetensors")
    half, full = (
        vit_from_timm(str(tmp_path / name), "vit_base_patch16_224", img_size=48, patch_size=8, **SMALL)
        for name in ("half.safetensors", "full.safetensors")
    )
    for one, other in zip(half.parameters(), full.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
    text = AutoModel.from_config(OTHERS["bert"]).to(dtype)
    text.save_pretrained(tmp_path / "text")
    loaded = text_from_pretrained(str(tmp_path / "text")).encoder.state_dict()
    assert all(torch.equal(value, text.state_dict()[name].float()) for name, value in loaded.items())


def test_a_folder_of_timms_says_its_architecture_whatever_the_config_says(timm_file, tmp_path):
    folder = as_timm_folder(tmp_path / "vit", timm_file[1], model_args={**SMALL, "patch_size": 8, "img_size": 32})
    encoder = vit_from_timm(str(folder), "vit_large_patch14_dinov2", img_size=48)
    assert (encoder.width, encoder.grid_size, encoder.backbone.depth) == (24, (6, 6), 2)
    assert encoder.origin == f"30 of 30 tensors of vit_base_patch16_224 from {folder} (positions resampled)"
    # A file in it is read as any other file.
    file = str(folder / "model.safetensors")
    encoder = vit_from_timm(file, "vit_base_patch16_224", img_size=32, patch_size=8, **SMALL)
    assert encoder.origin == f"30 of 30 tensors of vit_base_patch16_224 from {file}"
    # One block of two: what is left out is said.
    encoder = vit_from_timm(str(folder), img_size=32, depth=1)
    assert "18 of 30 tensors" in encoder.origin
    assert "the last 1 of 2 blocks left out" in encoder.origin
    for config, part in (
        ({"architecture": None, "model_type": "dinov2"}, "dinov2 of transformers"),
        ({"architecture": {"class": "AbSViT"}}, "a model of vlabs: start from it with init="),
        ({"architecture": "resnet50"}, "no ViT"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path"),
        ({"model_args": {"depth": 3}}, "has no blocks"),
        ({"model_args": {"depth": 5000}}, "many more parameters"),
        ({"model_args": {"embed_dim": 98_304}}, "many times the memory"),
    ):
        (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"} | config))
        with pytest.raises(UserError, match=part):
            vit_from_timm(str(folder), "vit_base_patch16_224", img_size=32, patch_size=8)


ARCHITECTURES = {
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
    "eva02_small_patch14_224": {},
    "vit_small_patch16_dinov3": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_gap_224": {},
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2]},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_of_any_of_timms_encoders_comes_back_whole(name, tmp_path):
    small = ARCHITECTURES[name] or {"embed_dim": 32, "depth": 2, "num_heads": 2}
    own = timm.create_model(name, num_classes=3, **small)
    safetensors.torch.save_file(own.state_dict(), tmp_path / "a.safetensors")
    encoder = vit_from_timm(str(tmp_path / "a.safetensors"), name, img_size=own.patch_embed.img_size[0], **small)
    mine, whole = encoder.vit.state_dict(), own.state_dict()
    assert all(torch.equal(value, whole[key]) for key, value in mine.items())
    assert encoder.origin.startswith(f"{len(mine)} of {len(mine)} tensors of {name}")
    assert "resampled" not in encoder.origin
    # At another size the rest is the same.
    again = vit_from_timm(str(tmp_path / "a.safetensors"), name, img_size=448, **small)
    assert again.origin.startswith(f"{len(mine)} of {len(mine)} tensors")


def test_a_norm_after_the_mean_is_the_files_too(timm_file):
    encoder = vit_from_timm(
        str(timm_file[0]), "vit_base_patch16_224", img_size=32, patch_size=8, global_pool="avg", **SMALL
    )
    assert torch.equal(encoder.vit.fc_norm.weight, timm_file[1].norm.weight)


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"embed_dim": 48}, "cls_token is 1×1×24 there and 1×1×48 here"),
        ({"reg_tokens": 4}, "it has no reg_token"),
        ({"init_values": 1e-5}, "it has no blocks.0.ls1.gamma"),
        ({"class_token": False, "global_pool": "avg"}, "the encoder has no cls_token"),
    ],
)
def test_a_file_of_another_architecture_is_one_line_that_names_both(change, parts, timm_file):
    path, _ = timm_file
    with pytest.raises(UserError) as caught:
        vit_from_timm(str(path), "vit_base_patch16_224", img_size=32, patch_size=8, **SMALL | change)
    assert parts in str(caught.value)
    assert str(caught.value).startswith(f"{path} does not fit vit_base_patch16_224: ")
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_the_line_of_a_start_names_what_is_pre_trained_and_what_is_new(timm_file, monkeypatch):
    vision = vit_from_timm(
        str(timm_file[0]),
        "vit_base_patch16_224",
        img_size=32,
        patch_size=8,
        num_classes=5,
        topdown=AbSTopDown(),
        **SMALL,
    )
    of_file = f"pre-trained: vision: 30 of 30 tensors of vit_base_patch16_224 from {timm_file[0]}"
    assert report(AbSViTClassifier(vision)) == f"{of_file}; new: feedback, head, prior"
    model = assemble_segmenter(vision, partial(UperNet, num_classes=3, channels=8))
    assert report(model) == f"{of_file}; new: feedback, head, decoder, prior"
    fresh = vit_from_timm(None, "vit_base_patch16_224", img_size=32, patch_size=8, **SMALL)
    assert report(AbSViTClassifier(fresh)) is None
    # A checkpoint in init= that lacks pre-trained parts leaves them as they are: they are not new.
    classifier = AbSViTClassifier(vision)
    content = {
        "vlabs": {"task": "classify", "data": {}, "preprocessing": {}},
        "state_dict": {"model.prompt": classifier.prompt.detach()},
    }
    monkeypatch.setattr("vlabs.checkpoints.initialize.read_source", lambda source: (source, content))
    started = initialize(classifier, "run")
    assert report(classifier, starts=True) == of_file
    assert {name.split(".")[1] for name in started.kept} == {"vit"}
    assert {*started.new} == {name for name in classifier.state_dict() if "decoders" in name or "vit.head." in name}


def start_of(model):
    """What `read_source` gives of a checkpoint of a model."""
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    return Path("run"), {
        "vlabs": {"task": "vqa", "data": {}, "preprocessing": {}, "architecture": model.spec},
        "state_dict": state,
    }


@pytest.mark.parametrize(
    ("own", "theirs", "said"),
    [
        ({}, {"vision": {"num_heads": 4}}, r"vit.blocks.0.attn has 4 heads, and 2 .* pass model.vision.num_heads=4"),
        ({}, {"fusion": {"num_heads": 4}}, r"fusion.text_layers.0.* pass model.fusion.num_heads=4"),
        ({}, {"text": 4}, r"text.roberta.* pass model.text.num_attention_heads=4"),
        ({}, {"pool_heads": 4}, r"pool.attention has 4 heads, and 2 .* pass model.pool_heads=4"),
        ({}, {"words": {"num_heads": 4, "head_dim": 2}}, r"topdown.layers.0 has 4 .* pass model.vision.topdown.num_h"),
        ({}, {}, None),
        ({"vision": {"num_heads": 4}}, {"vision": {"embed_dim": 32}}, None),
    ],
)  # fmt: skip
def test_attention_with_another_number_of_heads_does_not_start_from_the_same_weights(own, theirs, said, monkeypatch):
    def make(vision=None, fusion=None, text=2, words=None, pool_heads=2):
        steer = CrossAttention(**({"num_heads": 2, "head_dim": 4} | (words or {})))
        sizes = {"embed_dim": 24, "depth": 1, "num_heads": 2} | (vision or {})
        encoder = AbSViT("vit_base_patch16_224", 16, 8, steer, **sizes)
        roberta = RobertaEncoder(30, 32, 1, text, 64, 20)
        fuse = partial(CoAttentionFusion, **({"width": 16, "depth": 1, "num_heads": 2} | (fusion or {})))
        return assemble(encoder, roberta, fuse, partial(VQAHead, num_answers=3), pool_heads=pool_heads)

    monkeypatch.setattr("vlabs.checkpoints.initialize.read_source", lambda source: start_of(make(**theirs)))
    with pytest.raises(UserError, match=f"init=run: .*{said}") if said else nullcontext():
        initialize(make(**own), "run")


def test_a_folders_weights_keep_their_number_of_heads(tmp_path):
    save_torch_state_dict(timm.create_model("vit_tiny_patch16_224", depth=1).state_dict(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    with pytest.raises(UserError, match=r"model.vision.num_heads=2: .* was trained with 3: leave it out"):
        vit_from_timm(str(tmp_path), img_size=32, depth=1, num_heads=2)
    assert vit_from_timm(str(tmp_path), img_size=32, depth=1, num_heads=3).vit.blocks[0].attn.num_heads == 3


# Several files, and files that are missing


@pytest.fixture
def text_folder(tmp_path):
    """A BERT in three shards, and its tokenizer."""
    folder = tmp_path / "text"
    AutoModel.from_config(OTHERS["bert"]).save_pretrained(folder, max_shard_size="12KB")
    tokens = {"[PAD]": 0, "[UNK]": 1, "a": 2}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    return folder


def test_weights_in_several_files_are_read_as_one(text_folder, tmp_path):
    encoder = text_from_pretrained(str(text_folder))
    source = AutoModel.from_pretrained(text_folder, dtype=torch.float32)
    mine = encoder.encoder.state_dict()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in mine.items())
    assert encoder.origin == f"{len(mine)} of {len(mine)} tensors from {text_folder}"
    config = json.loads((text_folder / "config.json").read_text())
    (text_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "left out: encoder.encoder.layer.1." in text_from_pretrained(str(text_folder)).origin
    # So is a ViT's.
    vit = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=8, num_classes=0, **SMALL)
    folder = tmp_path / "vit"
    folder.mkdir()
    save_torch_state_dict(vit.state_dict(), folder, max_shard_size="8KB")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_224"}))
    found = vit_from_timm(str(folder), img_size=32, patch_size=8, **SMALL)
    assert all(torch.equal(value, vit.state_dict()[name]) for name, value in found.vit.state_dict().items())


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "not a .safetensors file in its folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "not a .safetensors file in its folder"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "not a .safetensors file in its folder"),
        ({"weight_map": {"a": "none-1.safetensors", "b": "none-2.safetensors"}},
         "has no none-1.safetensors, none-2.safetensors"),
        ({"weight_map": {"a": "link.safetensors"}}, "link out of its folder"),
        ({"weight_map": {"a": "lies.safetensors"}}, "not a whole safetensors file"),
        ({"weight_map": {"a": "other.safetensors"}}, "has no a"),
        ({"weight_map": {"a": 7}}, "is damaged"), ({"weight_map": []}, "is damaged"), ([], "is damaged"),
        ({"weight_map": {str(n): f"{n}.safetensors" for n in range(10_000)}}, "and 9997 more"),
    ],
)  # fmt: skip
def test_an_index_leads_to_no_other_files_and_all_that_is_missing_is_named(index, parts, text_folder, tmp_path):
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    (text_folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    safetensors.torch.save_file({"b": torch.ones(1)}, text_folder / "other.safetensors")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    (text_folder / "lies.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    (text_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=re.escape(parts)):
        text_from_pretrained(str(text_folder))


def test_a_missing_shard_and_weights_of_another_kind_are_one_line_that_says_what_to_do(text_folder):
    shard = sorted(text_folder.glob("model-*.safetensors"))[1]
    shard.rename(text_folder / "elsewhere")
    with pytest.raises(UserError, match=f"has no {shard.name}: it has"):
        text_from_pretrained(str(text_folder))
    for path in text_folder.glob("model*"):
        path.unlink()
    for name in ("pytorch_model.bin.index.json", "tf_model.h5", "model_quantized.onnx"):
        (text_folder / name).write_text("{}")
        with pytest.raises(UserError, match=rf"has no model.safetensors, and {name} cannot be read: .*save_pretrained"):
            text_from_pretrained(str(text_folder))
        (text_folder / name).unlink()
    quantized = {"embeddings.word_embeddings.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn)}
    safetensors.torch.save_file(quantized, text_folder / "model.safetensors")
    with pytest.raises(UserError, match="float8_e4m3fn: save it as float32"):
        text_from_pretrained(str(text_folder))
    (text_folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="git lfs pull"):
        vit_from_timm(str(text_folder / "model.safetensors"), "vit_small_patch16_224")
    with pytest.raises(UserError, match="git lfs pull"):
        text_from_pretrained(str(text_folder))
    safetensors.torch.save_file({"a": torch.tensor([float("nan")])}, text_folder / "model.safetensors")
    with pytest.raises(UserError, match="a is not finite"):
        text_from_pretrained(str(text_folder))


# The hub's cache


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Puts a folder into a cache, as one that was downloaded, and names it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(name, folder):
        root = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        snapshot = root / "snapshots" / ("1" * 40)
        for path in (root / "blobs", root / "refs", snapshot):
            path.mkdir(parents=True)
        (root / "refs/main").write_text("1" * 40)
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copy(path, root / "blobs" / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        return snapshot

    return put


def test_without_a_network_the_cache_is_enough(text_folder, timm_file, cache, tmp_path, monkeypatch):
    cache("user/text", text_folder)
    encoder = text_from_pretrained("user/text")
    expected = text_from_pretrained(str(text_folder))
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), expected.parameters(), strict=True))
    assert read_tokenizer("user/text", tmp_path) == (text_folder / "tokenizer.json").read_text()
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=2, depth=1)
    cache("timm/vit_tiny_patch16_224.augreg_in21k", as_timm_folder(tmp_path / "vit", vit, architecture="of_no_matter"))
    found = vit_from_timm("vit_tiny_patch16_224.augreg_in21k", img_size=32, depth=1)
    assert torch.equal(found.vit.blocks[0].attn.qkv.weight, vit.blocks[0].attn.qkv.weight)
    assert found.origin.startswith("18 of 18 tensors of vit_tiny_patch16_224 from vit_tiny_patch16_224.augreg_in21k")


def test_a_cache_that_is_not_whole_is_one_line_that_names_what_is_missing(text_folder, cache, tmp_path):
    def is_refused(load, *parts):
        started = time.perf_counter()
        with pytest.raises(UserError) as caught:
            load()
        assert time.perf_counter() - started < 5
        assert all(part in str(caught.value) for part in parts), caught.value

    for name in ("user/nobody", "nobody"):
        is_refused(
            lambda name=name: text_from_pretrained(name),
            "HF_HUB_OFFLINE",
            f"hf download {name}",
            "model.text.name_or_path=DIR",
        )
        is_refused(lambda name=name: read_tokenizer(name, tmp_path), f"hf download {name}", "data.tokenizer=DIR")
    is_refused(lambda: text_from_pretrained("./models/text"), "not a local file or folder, and not a name on the")
    is_refused(lambda: vit_from_timm("vit_tiny_patch16_224.augreg_in21k"), "model.vision.weights=DIR")
    is_refused(
        lambda: vit_from_timm("vit_tiny_patch16_224.nonesuch"), "choose one of vit_tiny_patch16_224.augreg_in21k"
    )
    snapshot = cache("user/text", text_folder)
    shard = sorted(snapshot.glob("model-*.safetensors"))[0]
    shard.resolve().rename(shard.resolve().with_suffix(".incomplete"))
    is_refused(
        lambda: text_from_pretrained("user/text"), f"user/text has no {shard.name} (a broken link)", str(snapshot)
    )
    for path in snapshot.glob("model*"):
        path.unlink()
    is_refused(
        lambda: text_from_pretrained("user/text"),
        "user/text has no model.safetensors in the local cache",
        "hf download",
    )
    (snapshot / "tokenizer.json").unlink()
    is_refused(
        lambda: read_tokenizer("user/text", tmp_path), "user/text has no tokenizer.json", "config.json", "hf download"
    )
    (snapshot / "config.json").unlink()
    (snapshot / "README.md").write_text("")
    is_refused(lambda: text_from_pretrained("user/text"), "user/text")


def test_the_hub_name_of_a_tag_is_known_without_timm():
    families = (".vision_transformer", ".eva", ".swin_transformer")
    tags = [t for t in timm.list_pretrained() if timm.model_entrypoint(t.split(".")[0]).__module__.endswith(families)]
    known = {tag: hub_name(tag) for tag in tags}
    assert {
        tag: name for tag, name in known.items() if name not in (None, timm.get_pretrained_cfg(tag).hf_hub_id)
    } == {}
    assert len([name for name in known.values() if name]) > 300
    assert [hub_name(path) for path in ("a/vit.x", "vit.safetensors", "vit_base_patch16_224")] == [None] * 3


def test_a_network_that_is_down_is_one_quick_line_with_nothing_before_it(in_process, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    given = ["task=vqa", "data.size=tiny", "model/vision=small", "data.tokenizer=user/nonesuch", "logger=csv"]
    result = in_process("vlabs.train", [*given, "hydra.run.dir=run"], tmp_path)
    assert time.perf_counter() - started < 20
    # All that is missing, with what to pass for it.
    assert_one_line_error(result, "timm/vit_small_patch16_224.augreg", "no network", "model.vision.weights=DIR")
    assert_one_line_error(result, "user/nonesuch", "data.tokenizer=DIR")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())  # before any data were made


def test_a_pre_trained_encoder_is_whole_in_every_task_and_has_its_own_rates():
    new, trained = 1e-3, 1e-5
    for overrides, blocks, vision, text in (
        (["task=segment"], 4, new, None),
        (["task=segment", "model/vision=dinov2_base"], None, trained, None),
        (["task=refer", "model/vision=small", "model/text=minilm"], None, trained, trained),
        (["task=classify", "model/vision=dinov2_small"], None, trained, None),
        (["task=classify", "model/vision=dinov2_small", "model.vision.weights=null"], None, new, None),
        (["task=vqa", "model/text=minilm"], 2, new, trained),
    ):
        with initialize_config_dir(config_dir(), version_base="1.3"):
            config = compose("train", overrides=overrides)
        assert config.model.vision.get("depth") == blocks
        assert config.task.recipe.lr.vision == vision
        assert text is None or config.task.recipe.lr.text == text
        if "model/text=minilm" in overrides:
            assert config.data.tokenizer == config.model.text.name_or_path
    # What the head of a segmenter is made of grows with the encoder.
    assert UperNet(384, 2).head.fpn_bottleneck.conv.out_channels == 384
    assert UperNet(1024, 2, aux_channels=None).auxiliary.convs[0].conv.out_channels == 256
    assert patch_size_of("vit_small_patch14_dinov2") == 14


@pytest.mark.network
@pytest.mark.skip(reason="downloads 340 MB from the hub: run it by hand with HF_HUB_OFFLINE=0 where there is a network")
def test_the_default_tag_of_vit_base_loads():
    vit_from_timm("vit_base_patch16_224.augreg_in21k_ft_in1k", topdown=AbSTopDown())


def test_the_recipe_of_vqav2_is_the_designs():
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides=["experiment=vqav2_absvit_base"])
        baseline = compose("train", overrides=["experiment=vqav2_vit_base"])
    assert config.task.recipe.lr == {"vision": 1e-5, "text": 1e-5, "fusion": 5e-5, "head": 5e-4, "feedback": 3e-5}
    assert config.data.batch_size * config.trainer.accumulate_grad_batches == 512
    assert (config.data.image_size, config.data.rand_augment, config.data.max_length) == (224, "rand-m9-n2", 50)
    assert (config.trainer.max_epochs, config.task.recipe.warmup, config.task.recipe.schedule) == (10, 0.1, "linear")
    assert baseline.model.vision.topdown is None
    assert baseline.trainer == config.trainer


def test_the_released_form_is_one_switch_away():
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", overrides=["model/topdown=absvit_released"])
    assert config.model.prior_token == "mean"
    assert config.task.prior_weight == 0
    assert config.task.freeze == ["prior.project.bias"]


def test_every_parameter_of_the_wandb_sweep_is_an_option():
    sweep = yaml.safe_load((Path(__file__).parent.parent / "docs/wandb_sweep.yaml").read_text())
    assert sweep["command"][-1] == "${args_no_hyphens}"
    with initialize_config_dir(config_dir(), version_base="1.3"):
        for name, parameter in sweep["parameters"].items():
            for value in parameter["values"]:
                compose("train", overrides=[f"{name}={value}"])


def test_the_wheel_carries_every_module_and_file_and_works_in_a_clean_environment(tmp_path):
    root = Path(__file__).parent.parent
    source = tmp_path / "source"  # a copy, because setuptools leaves a build folder behind
    for name in ("vlabs", "conf", "data_prep"):
        shutil.copytree(root / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path],
        capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    # An environment with nothing of vlabs in it; the libraries are found where they are: they take minutes to install.
    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean/bin/python"
    site = next((tmp_path / "clean/lib").glob("python*/site-packages"))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "-q", next(tmp_path.glob("*.whl"))],
        capture_output=True, text=True,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    ours = {
        path.relative_to(root)
        for name in ("vlabs", "data_prep")
        for path in (root / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } | {Path("vlabs") / path.relative_to(root) for path in (root / "conf").rglob("*.yaml")}
    there = {
        path.relative_to(site)
        for name in ("vlabs", "data_prep")
        for path in (site / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert there == ours  # a package that pyproject.toml does not list is left out without a word
    shutil.copy(root / "vlabs/page/pictures/scene02.jpg", tmp_path / "picture.jpg")
    asked = ["--ckpt", "scenes", "--image", "picture.jpg", "--question", "Which color is the star?", "--out", "a.png"]
    answered = subprocess.run(
        [tmp_path / "clean/bin/vlabs", "predict", *asked],
        cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr
    assert "purple" in answered.stdout
    code = "from vlabs.runs.groups import config_dir; print(config_dir())"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(site / "vlabs/conf")


def test_weights_are_known_by_their_content_whatever_their_file_is_called(tmp_path):
    encoder = vit_from_timm(None, "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2)
    for name in ("größe 1.SAFETENSORS", "no suffix"):
        safetensors.torch.save_file(encoder.vit.state_dict(), tmp_path / name)
        found = vit_from_timm(
            str(tmp_path / name), "vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=24, num_heads=2
        )
        assert torch.equal(found.vit.pos_embed, encoder.vit.pos_embed)
    safetensors.torch.save_file(encoder.vit.state_dict(), tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="if mine.safetensors has all of its weights, rename it to model.safetensors"):
        vit_from_timm(str(tmp_path), "vit_tiny_patch16_224", img_size=32)
