"""Encoders from local weights: timm files at another size, RoBERTa folders; and the package as it is installed."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from conftest import clean_environment
from hydra import compose, initialize_config_dir
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, BertConfig, DebertaV2Config, ModernBertConfig, RobertaConfig, RobertaModel

from vlabs.checkpoints.pretrained import text_from_pretrained, vit_from_timm
from vlabs.errors import UserError
from vlabs.models.registry import build
from vlabs.models.topdown import AbSTopDown
from vlabs.runs.config import config_dir

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.fixture
def timm_file(tmp_path):
    vit = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=8, num_classes=5, **SMALL)
    path = tmp_path / "vit.safetensors"
    safetensors.torch.save_file(vit.state_dict(), path)
    return path, vit.eval()


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
    with pytest.raises(UserError, match="holds no text encoder"):
        text_from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "vocab_size": 60}))
    with pytest.raises(UserError, match="is a gpt2: a text encoder is one of roberta, bert, deberta-v2, modernbert"):
        text_from_pretrained(str(tmp_path))


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
    code = "import vlabs.runs.config as config; print(config.config_dir())"
    found = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(site / "vlabs/conf")
