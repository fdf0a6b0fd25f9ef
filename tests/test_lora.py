"""Adapters in the encoders: exact under feedback, all that is trained of them, and gone from what is loaded."""

import pytest
import torch
from conftest import assert_one_line_error, command
from test_backbones import make
from test_classify import make_task
from test_segment import make_segmenter

import vlabs
from vlabs.checkpoints.checkpoint import read_tensors
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.lora import LoRA, add_adapters, merge_adapters
from vlabs.models.registry import build
from vlabs.models.topdown import AbSTopDown, AbSTopDownQKV
from vlabs.tasks.optim import Recipe
from vlabs.tasks.segment import SegmentTask


@pytest.mark.parametrize("topdown", [AbSTopDown, AbSTopDownQKV])
@pytest.mark.parametrize("kind", ["cls", "eva02_fused", "eva02", "rvt_pooled", "fan", "swin"])
@torch.no_grad()
def test_both_passes_are_those_of_the_merged_weights(kind, topdown):
    encoder, images = make(kind, topdown())
    plain = build(encoder.spec).eval()
    lora = LoRA(rank=2, alpha=3.0)
    add_adapters(encoder.vit, lora)
    trained = [name for name, _ in encoder.named_parameters() if "lora_" in name]
    for name in trained:
        torch.nn.init.normal_(encoder.get_parameter(name), std=0.3)
    encoder, plain, images = encoder.eval().double(), plain.double(), images.double()
    plain.load_state_dict(merge_adapters(encoder.state_dict(), lora.scale))
    xi = torch.randn(2, encoder.width).double()
    seen = [e.attend(e.encode(images), xi).tokens for e in (encoder, plain)]
    torch.testing.assert_close(*seen, atol=1e-8, rtol=1e-8)
    before = build(encoder.spec).eval().double()
    before.load_state_dict({name: value for name, value in plain.state_dict().items() if "decoders" in name}, False)
    assert trained
    assert not torch.allclose(seen[0], before.attend(before.encode(images), xi).tokens, atol=1e-2)


@pytest.fixture(scope="module")
def run(tiny_run, tiny_options, tmp_path_factory):
    """A run with adapters from another run's weights, and its command's folder."""
    cwd = tmp_path_factory.mktemp("lora")
    options = [*tiny_options, "logger=csv", f"init={tiny_run[0]}", "task.lora.rank=2"]
    result = command("vlabs.train", *options, "hydra.run.dir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd


def test_training_changes_an_encoder_by_its_adapters_alone(run, tiny_run):
    before = read_tensors(tiny_run[0] / "checkpoints/best.ckpt")["state_dict"]
    raw = torch.load(run / "run/checkpoints/last.ckpt", weights_only=True)
    state = raw["state_dict"]
    bases = [name for name in state if ".base_layer." in name]
    assert {name.split(".")[1] for name in bases} == {"vision", "text"}
    for name in bases:
        torch.testing.assert_close(state[name], before[name.replace(".base_layer.", ".")], atol=0, rtol=0)
    moved = [name for name in state if name.endswith("lora_B.default.weight") and state[name].any()]
    assert len(moved) == len([name for name in bases if name.endswith("weight")])
    for part in ("vision.decoders.0.linear.weight", "prior.project.weight", "fusion", "head"):
        changed = [n for n in state if n.startswith(f"model.{part}") and not torch.equal(state[n], before[n])]
        assert changed, part


def test_what_is_loaded_is_merged_and_predicts(run, tmp_path):
    from PIL import Image

    raw = torch.load(run / "run/checkpoints/best.ckpt", weights_only=True)
    loaded = vlabs.load(run / "run")
    name = "vision.vit.blocks.1.attn.qkv"
    a, b = (raw["state_dict"][f"model.{name}.lora_{letter}.default.weight"] for letter in "AB")
    merged = raw["state_dict"][f"model.{name}.base_layer.weight"] + 16 / 2 * b @ a
    torch.testing.assert_close(loaded.model.vision.vit.blocks[1].attn.qkv.weight, merged)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "picture.png")
    exported = command("vlabs.export", "--ckpt", run / "run", "--out", "model.safetensors", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    answers = [
        vlabs.load(path).answer(tmp_path / "picture.png", ["What is it?"])[0].answers
        for path in (run / "run", tmp_path / "model.safetensors")
    ]
    assert answers[0] == answers[1]
    assert "lora" not in str(sorted(read_tensors(tmp_path / "model.safetensors")["state_dict"]))


def test_a_run_with_adapters_continues(run):
    result = command("vlabs.train", "resume=run", "trainer.max_epochs=3", cwd=run)
    assert result.returncode == 0, result.stderr
    assert "lora_A" in str(list(torch.load(run / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]))


def test_a_new_head_is_trained_whole_and_the_encoder_by_adapters_in_tasks_without_texts():
    for task, heads in ((make_task(AbSTopDown(1.0), lora=LoRA(rank=2)), {"head"}), (segmentation_task(), {"decoder"})):
        vit = next(encoder for encoder in task.encoders().values())
        inside = {name for name, one in vit.named_parameters() if one.requires_grad and "lora_" not in name}
        assert {name.split(".")[0] for name in inside} <= heads
        assert task.lora.parts == ("vision",)
        trained = {name for name, one in task.named_parameters() if one.requires_grad}
        for part in ("lora_A", "decoders.0.linear.weight", "prompt", *(f"{head}." for head in heads)):
            assert any(part in name for name in trained), part
        assert not any("head" in name for name in trained if "lora_" in name)


def segmentation_task():
    return SegmentTask(make_segmenter(), Preprocessing(16, "", names=("a", "b", "c")), {}, Recipe(), lora=LoRA(rank=2))


def test_wrong_options_are_one_line(tiny_options, tmp_path, in_process):
    for options, parts in (
        (["task.lora.rank=-1"], ["task.lora.rank=-1"]),
        (["task.lora.rank=2", "task.lora.parts=[fusion]"], ["'fusion'", "vision, text"]),
        (["task.lora.rank=2", "task.freeze=[text]"], ["task.freeze", "task.lora.parts"]),
    ):
        assert_one_line_error(in_process("vlabs.train", [*tiny_options, "logger=csv", *options], tmp_path), *parts)
    with pytest.raises(UserError, match="dropout"):
        LoRA(rank=1, dropout=1.5)
    assert make_task(None, lora={"rank": 3}).lora == LoRA(rank=3, parts=("vision",))  # +task.lora.rank=3
    with pytest.raises(UserError, match=r"parts=\['text'\]: this model has vision"):
        make_task(None, lora=LoRA(rank=1, parts=("text",)))
