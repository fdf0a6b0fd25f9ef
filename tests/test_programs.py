"""Programs for serving: the numbers of the model, with ξ as an input, for any number of images, texts and tokens."""

import json
from pathlib import Path

import pytest
import torch
from conftest import assert_one_line_error, command
from test_backbones import ALL
from test_models import make_model

from vlabs.checkpoints.checkpoint import Checkpoint, load_checkpoint
from vlabs.checkpoints.programs import parts_of, trace, write_programs
from vlabs.data.preprocessing import Preprocessing
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.topdown import AbSTopDown, AbSTopDownQKV, FeedbackOnly, MaskAttention, PerceiverIO, ReleasedTopDown
from vlabs.models.variants.codebook import Codebook
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.film import FiLM
from vlabs.models.variants.qa_vit import QAViT
from vlabs.models.variants.sentence_attention import SentenceAttention


def run_onnx(folder):
    """By the name of a part, a function of named tensors that gives named tensors."""
    import onnxruntime

    sessions = {path.stem: onnxruntime.InferenceSession(path) for path in folder.glob("*.onnx")}

    def call(name, given):
        session = sessions[name]
        asked = {one.name: given[one.name].numpy() for one in session.get_inputs()}
        found = session.run(None, asked)
        return {out.name: torch.from_numpy(value) for out, value in zip(session.get_outputs(), found, strict=True)}

    return call


def traced(checkpoint):
    """As `run_onnx`, of what torch.export has; the text's part as it is."""
    parts = parts_of(checkpoint)
    programs = {name: trace(part).module() for name, part in parts.items() if name != "text"}

    def call(name, given):
        part = parts[name]
        if name == "text":
            return dict(zip(part.gives, part.module(given["input_ids"], given["attention_mask"]), strict=True))
        names = iter(part.given)
        values = [[given[next(names)] for _ in x] if isinstance(x, list) else given[next(names)] for x in part.inputs]
        return dict(zip(part.gives, programs[name](*values), strict=True))

    return call


def checkpoint_of(network, size):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "what": 2, "is": 3, "it": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    preprocessing = Preprocessing(size, tokenizer.to_str(), max_length=12, names=("a", "b", "c"))
    return Checkpoint(network, preprocessing, "vqa", {}, Path("run"))


@torch.no_grad()
def assert_same_numbers(call, model, size, pairs, tokens, other_prior=False):
    """The programs, one after another, against the model itself.

    Args:
        pairs: of each text, its image.
    """
    torch.manual_seed(tokens)
    images = torch.randn(max(pairs) + 1, 3, size, size)
    ids = torch.randint(5, 20, (len(pairs), tokens))
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    known = {"images": images, "input_ids": ids, "attention_mask": mask, "image_index": torch.tensor(pairs)}
    known |= call("text", known)
    known |= call("first_pass", known)
    if other_prior:
        known["prior"] = torch.randn_like(known["prior"])
    found = call("second_pass", known)
    expected = model(images, ids, mask, torch.tensor(pairs), prior=known["prior"] if other_prior else None)
    torch.testing.assert_close(found["logits"], expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["seen_tokens"], expected.seen.tokens, atol=1e-4, rtol=1e-4)
    if expected.seen.token_weights is not None:
        torch.testing.assert_close(found["token_weights"], expected.seen.token_weights, atol=1e-4, rtol=1e-4)


def test_the_command_writes_what_serving_needs_and_onnxruntime_has_the_models_numbers(tiny_run, tmp_path):
    result = command("vlabs.export", "--ckpt", tiny_run[0], "--out", "served", "--format", "onnx", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("served")
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == [
        "first_pass.onnx", "preprocessing.json", "programs.json", "second_pass.onnx", "text.onnx", "tokenizer.json",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["served"]
    model, call = load_checkpoint(tiny_run[0]).model, run_onnx(tmp_path / "served")
    for pairs, tokens in (([0, 1, 1, 2, 0], 7), ([0], 3), ([0, 0, 0], 12)):
        assert_same_numbers(call, model, 32, pairs, tokens)
        assert_same_numbers(call, model, 32, pairs, tokens, other_prior=True)
    again = command("vlabs.export", "--ckpt", tiny_run[0], "--out", "served", "--format", "torch", cwd=tmp_path)
    assert_one_line_error(again, "served already exists")


@pytest.mark.parametrize(
    "topdown",
    [
        AbSTopDown, ReleasedTopDown, None, FiLM, QAViT, Codebook, AbSTopDownQKV, FeedbackOnly, MaskAttention,
        PerceiverIO, CrossAttention, SentenceAttention,
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)  # fmt: skip
def test_every_way_to_steer_has_the_models_numbers(topdown):
    several = {"prior_count": 2, "prior_tokens": True} if topdown is AbSTopDown else None
    model = make_model(topdown() if callable(topdown) else topdown, several=several).eval()
    size = model.vision.vit.patch_embed.img_size[0]
    call = traced(checkpoint_of(model, size))
    for pairs, tokens in (([0, 1, 1, 2, 0], 7), ([0, 0, 0], 12)):
        assert_same_numbers(call, model, size, pairs, tokens)


@pytest.mark.parametrize("topdown", [AbSTopDown, None], ids=["kept by xi", "kept by cls"])
def test_a_model_that_keeps_some_patches_has_its_numbers(topdown):
    model = make_model(topdown and topdown()).eval()
    model.vision.keep = 0.5
    size = model.vision.vit.patch_embed.img_size[0]
    call = traced(checkpoint_of(model, size))
    for pairs, tokens in (([0, 1, 1, 2, 0], 7), ([0, 0, 0], 12)):
        assert_same_numbers(call, model, size, pairs, tokens)


@pytest.mark.parametrize("kind", ["eva02_fused", "siglip2", "rvt_pooled", "fan", "swin"])
@torch.no_grad()
def test_classifiers_of_all_kinds_of_encoders_have_their_numbers(kind):
    architecture, options, size, patch, *_ = ALL[kind]
    torch.manual_seed(0)
    model = AbSViTClassifier(AbSViT(architecture, size, patch, AbSTopDown(), num_classes=3, **options)).eval()
    call = traced(checkpoint_of(model, size))
    images = torch.randn(3, 3, size, size)
    known = {"images": images, "prior": torch.randn(3, model.encoder.width)}
    found = call("second_pass", known | call("first_pass", known))
    after, before, seen = model(images, known["prior"], reconstruct=False)
    for name, expected in (("logits", after), ("bottom_up_logits", before), ("token_weights", seen.token_weights)):
        torch.testing.assert_close(found[name], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_classifier_is_written_with_its_own_prior(tmp_path):
    encoder = AbSViT("vit_small_patch16_224", 32, 16, AbSTopDown(), num_classes=3, embed_dim=24, depth=1, num_heads=2)
    model = AbSViTClassifier(encoder).eval()
    write_programs(checkpoint_of(model, 32), tmp_path / "out", "torch")
    first, second = (torch.export.load(tmp_path / f"out/{name}.pt2").module() for name in ("first_pass", "second_pass"))
    prior = torch.tensor(json.loads((tmp_path / "out/programs.json").read_text())["prior"])
    images = torch.randn(3, 3, 32, 32)
    logits = second(list(first(images)), prior.expand(3, -1))[0]
    torch.testing.assert_close(logits, model(images)[0], atol=1e-4, rtol=1e-4)
