"""Steering by all words, against the recipe written out word by word in float64 and against invariants."""

from functools import partial

import pytest
import torch
from torch.nn.functional import layer_norm

from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.cross_attention import CrossAttention
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import RankingHead
from vlabs.models.registry import restore
from vlabs.models.text import RobertaEncoder
from vlabs.models.vlm import assemble

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
IDS = torch.tensor([[0, 5, 6, 2], [0, 2, 1, 1]])


def encoder(**options):
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 4, "num_heads": 2, "start": 2} | options
    return AbSViT("vit_base_patch16_224", topdown=CrossAttention(0.7, num_heads=2), **sizes)


@pytest.fixture
def model():
    """Of width 16, text of width 12; gates are open, so that words count."""
    torch.manual_seed(0)
    text = RobertaEncoder(20, 12, 1, 2, 24)
    fusion = partial(CoAttentionFusion, width=8, depth=1, num_heads=2, dropout=0.0)
    model = assemble(encoder(), text, fusion, RankingHead).double().eval()
    for layer in model.vision.topdown.layers:
        torch.nn.init.constant_(layer.gate, 0.9)
        torch.nn.init.normal_(layer.norm.weight)
    return model


def written_out(model, image, states, mask):
    """z of one image under one text."""
    vision, topdown = model.vision, model.vision.topdown
    first, last = topdown.connector[0], topdown.connector[2]
    words = []
    for state, there in zip(states, mask, strict=True):
        if there:
            state = state / state.norm()
            words.append(last.weight @ (first.weight @ state + first.bias).clamp(min=0) + last.bias)
    x = vision.vit.blocks[0](vision.backbone.embed(image[None]))[0]
    for index in (1, 2, 3):
        if index in (1, 3):
            layer = topdown.layers[index // 2]
            rows = []
            for token in x:
                query = layer.q.weight @ layer_norm(token, (16,), layer.norm.weight, layer.norm.bias)
                mixed = []
                for part in query.split(12):
                    at = slice(12 * len(mixed), 12 * len(mixed) + 12)
                    scores = torch.stack([part @ (layer.k.weight @ word)[at] / 12**0.5 for word in words])
                    shares = scores.exp() / scores.exp().sum()
                    mixed.append(sum(a * (layer.v.weight @ word)[at] for a, word in zip(shares, words, strict=True)))
                rows.append(token + (0.7 * layer.gate).tanh() * (layer.out.weight @ torch.cat(mixed)))
            x = torch.stack(rows)
        x = vision.vit.blocks[index](x[None])[0]
    return vision.vit.norm(x)


@torch.no_grad()
def test_all_tokens_read_all_words_before_blocks_1_and_3_and_no_padding(model):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images, IDS, MASK)
    assert model.vision.steers(out.seen) is None  # ξ does not steer
    for n in range(2):
        expected = written_out(model, images[n], out.text_states[n], MASK[n])
        torch.testing.assert_close(out.seen.tokens[n], expected, rtol=0, atol=1e-12)
    # One image for all texts, and pairs that share images and texts, are the same.
    one = model(images[:1], IDS, MASK, torch.tensor([0, 0])).seen.tokens
    torch.testing.assert_close(one[0], out.seen.tokens[0])
    shared = model.join(model.vision.encode(images[:1]), out.prior, out.text_states, MASK).seen.tokens
    torch.testing.assert_close(shared, one)
    pairs = model(images, IDS, MASK, torch.tensor([1, 0]), torch.tensor([1, 0])).seen.tokens
    torch.testing.assert_close(pairs, out.seen.tokens.flip(0))


@torch.no_grad()
def test_alpha_0_and_new_gates_leave_the_first_pass_and_keep_1_is_all(model):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images, IDS, MASK, alpha=0.0)
    torch.testing.assert_close(out.seen.tokens, out.bottom_up.tokens, rtol=0, atol=1e-13)
    steered = model(images, IDS, MASK).seen.tokens
    assert (steered - out.bottom_up.tokens).abs().max() > 1e-3
    with model.vision.keeping(0.5):
        kept = model(images, IDS, MASK).seen
    assert kept.tokens.shape == (2, 4, 16)
    assert kept.kept.shape == (2, 3)
    for layer in model.vision.topdown.layers:
        layer.gate.zero_()
    out = model(images, IDS, MASK)
    torch.testing.assert_close(out.seen.tokens, out.bottom_up.tokens, rtol=0, atol=1e-13)


def test_it_is_rebuilt_from_its_description_and_every_layer_learns(model):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    again = restore(model.spec, model.state_dict()).double().eval()
    again.load_state_dict(model.state_dict())
    out = model(images, IDS, MASK)
    torch.testing.assert_close(again(images, IDS, MASK).logits, out.logits, rtol=0, atol=0)
    out.logits.sum().backward()
    assert all(one.grad is not None and one.grad.any() for one in model.vision.topdown.parameters())


def test_where_there_are_no_words_it_is_refused_in_one_line():
    with pytest.raises(UserError, match="CrossAttention steers by words: choose another model/topdown"):
        AbSViTClassifier(encoder(num_classes=3))(torch.randn(1, 3, 32, 32))
