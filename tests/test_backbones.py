"""Encoders that feedback can be added to: each as its own code runs it, and its second pass written out plainly."""

from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import nn

from vlabs.attention import MAPS
from vlabs.attention.classes import class_maps
from vlabs.attention.maps import maps_of
from vlabs.checkpoints.pretrained import vit_from_timm
from vlabs.errors import UserError
from vlabs.models import backbones
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.backbones.base import FeedbackDecoder
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import VQAHead
from vlabs.models.registry import build
from vlabs.models.text import RobertaEncoder
from vlabs.models.topdown import (
    AbSTopDown,
    AbSTopDownQKV,
    FeedbackOnly,
    MaskAttention,
    ReleasedTopDown,
    Signal,
    Steering,
    take,
)
from vlabs.models.vlm import assemble
from vlabs.runs.groups import choices, config_dir

GOLDEN = Path(__file__).parent / "golden"
SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 2}
WIDE = SMALL | {"embed_dim": 96, "num_heads": 3}  # where positions are rotated, heads of 32
QK_NORM = {"qk_norm": True, "class_token": False, "global_pool": "avg"}
# Architecture, its options, image and patch size, tokens before the patches, whether one of them is [cls].
TIMM = {
    "cls": ("vit_small_patch16_224", SMALL, 32, 16, 1, True),
    "mean": ("vit_small_patch16_224", SMALL | {"global_pool": "avg"}, 32, 16, 1, False),
    "clip": ("vit_base_patch16_clip_quickgelu_224", SMALL, 32, 16, 1, True),
    "siglip2": ("vit_base_patch16_siglip_224", SMALL, 32, 16, 0, False),
    "dinov2": ("vit_small_patch14_reg4_dinov2", SMALL | {"init_values": 0.7}, 28, 14, 5, True),
    "qk_norm": ("vit_small_patch16_224", SMALL | QK_NORM, 32, 16, 0, False),
    "eva02_fused": ("eva02_tiny_patch14_224", WIDE, 28, 14, 1, False),
    "eva02": ("eva02_base_patch14_224", WIDE, 28, 14, 1, False),
    "dinov3": ("vit_small_patch16_dinov3", WIDE | {"init_values": 0.7}, 32, 16, 5, False),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", WIDE | {"init_values": 0.7}, 32, 16, 1, True),
    "perception": ("vit_pe_core_tiny_patch16_384", WIDE, 32, 16, 1, False),
}  # fmt: skip
OWN = {
    "rvt": ("rvt_small_plus", {"widths": [16], "depths": [3], "heads": [2], "masked_blocks": 2}, 64, 16, 0, False),
    "rvt_pooled": ("rvt_tiny", {"widths": [16, 32], "depths": [2, 1], "heads": [2, 2]}, 64, 16, 0, False),
    "fan": ("fan_tiny", {"embed_dim": 16, "depth": 2, "num_heads": 2}, 32, 8, 1, True),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]}, 64, 4, 0, False),
    "swin_padded": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 3},
        32,
        4,
        0,
        False,
    ),
}
ALL = TIMM | OWN


def make(kind, topdown=None, **more):
    architecture, options, size, patch, *_ = ALL[kind]
    torch.manual_seed(0)
    encoder = AbSViT(architecture, size, patch, topdown, **options | more).eval()
    for name, parameter in encoder.named_parameters():  # far from zero, so that all that there is matters
        if parameter.ndim > 1 or "mask" in name:
            nn.init.normal_(parameter, std=0.25 if "decoders" in name else 0.1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    return encoder, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("kind", [*TIMM, "swin", "swin_padded"])
@torch.no_grad()
def test_the_bottom_up_pass_and_the_head_are_timms_own(kind):
    # In double precision, where sums in another order differ by nothing that counts.
    encoder, images = (value.double() for value in make(kind, num_classes=3))
    bottom_up = encoder.encode(images)
    tokens = encoder.vit.forward_features(images)
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens  # Swin keeps its tokens in rows and columns
    torch.testing.assert_close(bottom_up.tokens, tokens, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder.backbone.classify(bottom_up.tokens), encoder.vit(images), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        bottom_up.cls,
        encoder.vit.forward_head(encoder.vit.forward_features(images), pre_logits=True),
        rtol=0,
        atol=1e-6,
    )
    assert (encoder.num_prefix_tokens, encoder.has_cls) == ALL[kind][4:]
    assert encoder.grid_size == ((8, 8) if kind.startswith("swin") else (2, 2))


@pytest.mark.parametrize(("name", "make_network"), [
    ("rvt_plus_tiny", lambda: backbones.create("rvt_tiny_plus", img_size=64, widths=[8, 16], depths=[2, 1],
                                               heads=[2, 4], mlp_ratio=2.0, masked_blocks=1, num_classes=3)),
    ("fan_vit_tiny", lambda: backbones.create("fan_tiny", img_size=32, patch_size=8, embed_dim=16, depth=2,
                                              num_heads=2, mlp_ratio=2.0, num_classes=3)),
])  # fmt: skip
@torch.no_grad()
def test_released_rvt_and_fan_load_and_give_their_outputs(name, make_network):
    golden = load_file(GOLDEN / f"{name}.safetensors")
    state = {key.removeprefix("state."): value for key, value in golden.items() if key.startswith("state.")}
    backbone = make_network()
    backbone.network.load_state_dict(backbone.convert(state))
    backbone.network.eval()
    hidden = backbone.embed(golden["images"])
    for index in range(backbone.depth):
        hidden = backbone.block(index, backbone.enter(index, hidden))
    torch.testing.assert_close(backbone.classify(backbone.finish(hidden)), golden["logits"], rtol=0, atol=1e-6)


def pooled_plainly(x, pool, prefix, grid):
    """TAP, place by place: a softmax over K of two 3×3 convolutions weights means over 3×3 places, k apart."""
    rows, columns = grid
    out = x.clone()
    for image, tokens in enumerate(x):
        where = {(r, c): tokens[prefix + r * columns + c] for r in range(rows) for c in range(columns)}

        def around(of, r, c, k):
            return [of.get((r + k * a, c + k * b)) for a in (-1, 0, 1) for b in (-1, 0, 1)]

        def convolved(of, weight, where=where):
            flat = weight.flatten(2)
            return {
                at: sum(flat[:, :, n] @ one for n, one in enumerate(around(of, *at, 1)) if one is not None)
                for at in where
            }

        hidden = {at: F.gelu(value) for at, value in convolved(where, pool.choose[0].weight).items()}
        for at, scores in convolved(hidden, pool.choose[2].weight).items():
            share = scores.softmax(0)
            means = [where[at]]
            means += [sum(one for one in around(where, *at, k) if one is not None) / 9 for k in range(1, len(share))]
            out[image, prefix + at[0] * columns + at[1]] = sum(p * m for p, m in zip(share, means, strict=True))
    return out


@pytest.mark.parametrize("kind", ["cls", "dinov2", "rvt_pooled", "fan"])
@torch.no_grad()
def test_patches_are_pooled_before_the_attention_of_every_block_as_taps_recipe_says(kind):
    encoder, images = (value.double() for value in make(kind, AbSTopDown(3.0), tap=3))
    without, _ = make(kind, AbSTopDown(3.0))
    without = without.double()
    left = without.load_state_dict(encoder.state_dict(), strict=False)
    assert not left.missing_keys
    assert all(".norm1.pool.choose." in name for name in left.unexpected_keys)
    prior = torch.randn(len(images), encoder.width, dtype=torch.float64)
    plain = without.attend(without.encode(images), prior).tokens
    for index, block in enumerate(encoder.vit.blocks):
        norm = without.vit.blocks[index].norm1
        grid = encoder.vit.grids[index] if kind == "rvt_pooled" else encoder.grid_size
        prefix = 0 if kind == "fan" else encoder.num_prefix_tokens

        def pooled(x, norm=norm, pool=block.norm1.pool, prefix=prefix, grid=grid):
            return F.layer_norm(
                pooled_plainly(x, pool, prefix, grid), norm.normalized_shape, norm.weight, norm.bias, norm.eps
            )

        norm.forward = pooled
    bottom_up = encoder.encode(images)
    found = encoder.attend(bottom_up, prior).tokens
    torch.testing.assert_close(bottom_up.tokens, without.encode(images).tokens, rtol=0, atol=1e-9)
    torch.testing.assert_close(found, without.attend(without.encode(images), prior).tokens, rtol=0, atol=1e-9)
    assert (found - plain).abs().max() > 1e-3


def test_pooled_patches_are_refused_where_there_is_no_place_for_them_and_new_beside_weights(tmp_path):
    for kind in ("eva02", "swin"):
        with pytest.raises(UserError, match="model.vision.tap=4 pools the patches of a plain ViT, an RVT or a FAN"):
            make(kind, tap=4)
    for count in (1, 9):  # of 2 x 2 patches
        with pytest.raises(UserError, match=f"model.vision.tap={count}: .* pass 0, or 2 to 8"):
            make("cls", tap=count)
    with pytest.raises(UserError, match=r"keep=0.5: model.vision.tap=4 pools patches by their places"):
        make("cls", AbSTopDown(), tap=4, keep=0.5)
    with pytest.raises(UserError, match="model.vision.tap=4 needs images of one size"):
        make("cls", tap=4, dynamic_img_size=True)
    plain, _ = make("cls")
    save_file(plain.vit.state_dict(), tmp_path / "w.safetensors")
    loaded = vit_from_timm(str(tmp_path / "w.safetensors"), "vit_small_patch16_224", 32, tap=4, **SMALL)
    assert torch.equal(loaded.vit.blocks[1].norm1.weight, plain.vit.blocks[1].norm1.weight)
    assert build(loaded.spec).vit.blocks[0].norm1.pool.count == 4


def plain_second_pass(encoder, images, prior):
    """Whole top-down tokens, decoded block by block, and qkv of the signal: nothing is factored.

    Where not all patches are kept, images go through the second pass one by one, each with its own tokens.
    """
    backbone, variant, record = encoder.backbone, encoder.topdown, []
    states = [backbone.embed(images)]
    for index in range(backbone.depth):
        states.append(
            backbone.block(index, backbone.enter(index, states[-1]), backbone.positions(), None, None, record)
        )
    z = backbone.finish(states[-1])
    weights = F.cosine_similarity(z, prior[:, None], dim=-1).clamp(0, 1)[..., None]
    whole = z if isinstance(variant, FeedbackOnly) else weights * z
    if isinstance(variant, ReleasedTopDown):
        whole = weights * (z * prior[:, None]).sum(-1, keepdim=True) * prior[:, None]
    tokens, signals = variant.alpha * whole, {}
    for index in reversed(range(encoder.start - 1, backbone.depth)):
        tokens = encoder.decoders[index].linear(tokens)
        signals[index] = encoder.decoders[index].linear2(tokens)
        tokens = backbone.back(index, tokens, encoder.decoders[index])
    hidden, positions = states[encoder.start - 1], backbone.positions()
    if encoder.keep == 1:
        return plain_blocks(encoder, hidden, signals, positions)
    read = record[-1].mean(1)
    order = F.cosine_similarity(z, prior[:, None], dim=-1)
    if isinstance(variant, FeedbackOnly):
        order = read[:, 0] if encoder.has_cls else read.mean(1)
    prefix, of_one = encoder.num_prefix_tokens, []
    for n in range(len(images)):
        count = round(encoder.keep * (z.shape[1] - prefix))
        patches = sorted(range(z.shape[1] - prefix), key=lambda i, n=n: -order[n, prefix + i])[:count]
        patches.sort()
        which = [*range(prefix), *(prefix + i for i in patches)]
        rest = order[n].clamp(min=1e-3)
        rest[which] = 0
        mix = torch.cat([torch.eye(len(rest))[which], rest[None] / rest.sum()]).to(hidden.dtype)
        own = {index: (mix @ signal[n])[None] for index, signal in signals.items()}
        places = None if positions is None else mix[prefix:, prefix:].to(positions.dtype) @ positions
        of_one.append(plain_blocks(encoder, mix @ hidden[n : n + 1], own, places))
    return torch.cat([tokens for tokens, _ in of_one]), torch.stack([losses for _, losses in of_one]).mean()


def plain_blocks(encoder, hidden, signals, positions):
    backbone, variant, losses = encoder.backbone, encoder.topdown, torch.zeros(())
    for index in signals:
        signals[index] = signals[index] @ backbone.qkv_weight(index).T
    for index in range(encoder.start - 1, backbone.depth):
        before, hidden = hidden, backbone.enter(index, hidden)
        if hidden is not before:
            losses = losses + ((backbone.back(index, hidden, encoder.decoders[index]) - before) ** 2).mean()
        parts = signals[index].chunk(3, dim=-1)

        def steer(block, q, k, v, bias, parts=parts):
            of_q, of_k, of_v = (0, 0, 0) if bias is None else bias.chunk(3)
            if isinstance(variant, AbSTopDownQKV):
                q, k = q + parts[0] + of_q, k + parts[1] + of_k
            return q, k, v + parts[2] + of_v

        signal = Signal()
        signal.steer = steer
        output = backbone.block(index, hidden, positions, Steering(signal, index, variant.bias_again))
        losses = losses + ((encoder.decoders[index].linear(output) - hidden) ** 2).mean()
        hidden = output
    return backbone.finish(hidden), losses


@pytest.mark.parametrize("kind", ALL)
def test_the_factored_second_pass_is_the_plain_one(kind):
    for topdown, start, keep in (
        (AbSTopDown(10.0), 1, 1.0), (AbSTopDown(10.0), 2, 0.5), (AbSTopDownQKV(3.0), 2, 1.0),
        (FeedbackOnly(1.0, bias_again=False), 1, 0.5),
    ):  # fmt: skip
        encoder, images = (
            value.double() for value in make(kind, topdown, start=start, keep=keep if kind in TIMM else 1.0)
        )
        prior = torch.randn(2, encoder.width).double()
        with torch.no_grad():
            bottom_up = encoder.encode(images)
            seen = encoder.attend(bottom_up, prior, reconstruct=True)
            tokens, losses = plain_second_pass(encoder, images, prior)
            torch.testing.assert_close(seen.tokens, tokens, rtol=1e-6, atol=3e-6)
            torch.testing.assert_close(seen.reconstruction, losses, rtol=1e-6, atol=1e-6)
            assert (
                seen.tokens - take(bottom_up.tokens, None, encoder.choose(bottom_up, prior, None))
            ).abs().max() > 1e-3
            # Three priors of the first image, none of the second.
            many = encoder.attend(bottom_up, torch.cat([prior[:1]] * 3), torch.zeros(3, dtype=torch.int64))
            torch.testing.assert_close(many.tokens[1], seen.tokens[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", [AbSTopDown, AbSTopDownQKV, FeedbackOnly])
@pytest.mark.parametrize("kind", ALL)
@torch.no_grad()
def test_no_signal_is_the_bottom_up_pass_bit_for_bit(kind, variant):
    encoder, images = make(kind, variant(10.0, bias_again=False))
    prior = torch.randn(2, encoder.width)
    bottom_up = encoder.encode(images)
    assert torch.equal(encoder.attend(bottom_up, prior, alpha=0.0).tokens, bottom_up.tokens)
    assert not torch.allclose(encoder.attend(bottom_up, prior).tokens, bottom_up.tokens, atol=1e-2)
    new = build(encoder.spec).eval()  # its own weights but for the decoders, which are new
    new.vit.load_state_dict(encoder.vit.state_dict())
    bottom_up = new.encode(images)
    assert torch.equal(new.attend(bottom_up, prior).tokens, bottom_up.tokens)


@pytest.mark.parametrize("kind", OWN)
@torch.no_grad()
def test_other_variants_where_blocks_have_other_tokens(kind):
    encoder, images = make(kind, ReleasedTopDown())
    prior = torch.randn(2, encoder.width)
    seen = encoder.attend(encoder.encode(images), prior)
    torch.testing.assert_close(seen.tokens, plain_second_pass(encoder, images, prior)[0], rtol=1e-4, atol=2e-5)
    encoder, images = make(kind, MaskAttention())
    bottom_up = encoder.encode(images)
    like_all = encoder.attend(bottom_up, bottom_up.tokens.mean(1))
    like_none = encoder.attend(bottom_up, -100 * bottom_up.tokens.sum(1))
    assert like_all.token_weights.shape == (2, encoder.backbone.num_tokens)
    assert not torch.allclose(like_all.tokens, like_none.tokens)


def test_what_is_said_of_a_pooled_token_is_said_of_its_four():
    encoder, _ = make("rvt_pooled")
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])[None, :, None]
    spread = encoder.backbone.spread(0, values).reshape(4, 4)
    assert spread.tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    assert torch.equal(encoder.backbone.spread(2, values), values)


@pytest.mark.parametrize("kind", ["siglip2", "dinov3", "rvt_pooled", "fan", "swin"])
def test_a_vision_language_model_trains_every_part_of_it(kind):
    encoder, images = make(kind, AbSTopDown(10.0))
    text = RobertaEncoder(30, 32, 1, 2, 64, 20)
    fusion = partial(CoAttentionFusion, width=16, depth=2, num_heads=2, dropout=0.0)
    model = assemble(encoder, text, fusion, partial(VQAHead, num_answers=5))
    ids = torch.randint(5, 30, (3, 6))
    mask, index = torch.ones_like(ids), torch.tensor([0, 0, 1])
    output = model(images, ids, mask, index, reconstruct=True)
    (output.logits.sum() + output.losses["reconstruction"]).backward()
    unused = {
        name for name, parameter in model.vision.named_parameters()
        if parameter.grad is None and not name.startswith(("vit.head.", "vit.norm.", "vit.attn_pool.", "vit.fc_norm."))
    }  # fmt: skip
    assert not unused
    with torch.no_grad():
        everything = model.eval()(images, ids, mask, index, all_features=True)
        torch.testing.assert_close(model(images, ids, mask, index).logits, everything.logits, rtol=1e-4, atol=1e-5)
        pooled = everything.image_features[:, 0] if encoder.has_cls else everything.image_features.mean(1)
        wanted = torch.tanh(model.fusion.image_pooler(pooled))
        torch.testing.assert_close(everything.pooled_features[:, 16:], wanted, rtol=1e-4, atol=1e-5)
        again = build(model.spec)
        again.load_state_dict(model.state_dict())
        torch.testing.assert_close(
            again.eval()(images, ids, mask, index).logits, everything.logits, rtol=1e-4, atol=1e-5
        )


# Parameters in millions, with AbS in brackets: Table 2 of the paper, which gives whole millions.
TABLE_2 = {
    "vit_tiny_patch16_224": (6, 7), "vit_small_patch16_224": (22, 26), "vit_base_patch16_224": (87, 99),
    "rvt_tiny": (9, 11), "rvt_small": (22, 26), "rvt_base": (86, 100),
    "fan_tiny": (7, 9), "fan_small": (28, 32), "fan_base": (54, 62),
}  # fmt: skip


@pytest.mark.parametrize("architecture", TABLE_2)
def test_parameters_are_those_of_table_2(architecture):
    for topdown, published in zip((None, AbSTopDown(1.0)), TABLE_2[architecture], strict=True):
        with torch.device("meta"):
            encoder = AbSViT(architecture, topdown=topdown, num_classes=1000)
        millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
        assert abs(millions - published) <= 0.5 + 0.03 * published


@pytest.mark.parametrize("kind", ["clip", "rvt_pooled", "fan", "swin"])
def test_an_encoder_has_every_map_or_says_what_it_needs(kind):
    encoder, images = make(kind, num_classes=3)
    model = AbSViTClassifier(encoder).eval()
    names, said = maps_of(model, list(MAPS))
    logits, maps = class_maps(model, images, names)
    for name in names:
        assert maps[name].shape == (2, *encoder.grid_size), name
        assert maps[name].isfinite().all()
        assert maps[name].max() > 0, name
    assert {"norm", "normgrad"} <= set(names)
    assert (len(said) == 3) == (kind == "clip")  # a ξ and a text, which these do not have
    for name in set(MAPS) - set(names) - {"weights"}:
        with pytest.raises(UserError, match=f"the map {name} needs .*: choose another"):
            class_maps(model, images, [name])
    if kind == "fan":  # its last block computes the row of [cls] alone
        attention: list[torch.Tensor] = []
        encoder.encode(images, record=attention)
        torch.testing.assert_close(maps["cls"].flatten(1), attention[-1][:, :, 0, 1:].mean(dim=1))


@pytest.mark.parametrize("kind", ["rvt", "fan", "dinov3", "siglip2", "swin"])
def test_weights_from_a_file_fit_another_resolution(kind, tmp_path):
    architecture, options, size, patch, *_ = ALL[kind]
    source, _ = make(kind)
    save_file({name: value.contiguous() for name, value in source.vit.state_dict().items()}, tmp_path / "w.safetensors")
    larger = vit_from_timm(str(tmp_path / "w.safetensors"), architecture, 2 * size, patch, AbSTopDown(10.0), **options)
    for name, value in source.vit.named_parameters():
        other = larger.vit.get_parameter(name)
        assert other.shape == value.shape or any(part in name for part in ("pos_embed", "att_mask", "position_bias"))
        if other.shape == value.shape:
            assert torch.equal(other, value)
    tokens = (
        larger.eval().attend(larger.encode(torch.randn(1, 3, 2 * size, 2 * size)), torch.randn(1, larger.width)).tokens
    )
    assert tokens.shape[1] == larger.num_prefix_tokens + larger.grid_size[0] * larger.grid_size[1]


def test_a_scale_by_place_is_resampled_smoothly():
    backbone = backbones.create("rvt_small_plus", img_size=64, widths=[8], depths=[1], heads=[1], masked_blocks=1)
    place = torch.arange(4.0)
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    mask = (rows.flatten()[:, None] + 10 * columns.flatten()[None]).unsqueeze(0)  # rises over the grid of each
    half = backbone.resample("blocks.0.attn.att_mask", mask, torch.empty(1, 4, 4))
    torch.testing.assert_close(half.mean(), mask.mean())
    assert half[0, 2, 0] > half[0, 0, 0]
    assert half[0, 0, 1] > half[0, 0, 0]
    assert backbone.resample("blocks.0.attn.att_mask", mask, torch.empty(2, 4, 4)) is None


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("vit_small_resnet26d_224", {}, "it is no ViT"),
        ("beit_base_patch16_224", {}, "it is no ViT"),
        ("vit_base_patch16_rpn_224", {"depth": 1}, "not pre-norm"),
        ("eva02_enormous_patch14_clip_224", WIDE | {"patch_size": 14}, "not pre-norm"),
        ("rvt_tiny", {"img_size": 48}, "has an odd side"),
        ("rvt_tiny", {"patch_size": 8}, "patches of 16 px"),
        ("fan_tiny", {"global_pool": "avg"}, "classifies \\[cls\\]"),
        ("fan_tiny", {"heads": 3}, "heads"),
        ("rvt_small", {"stem": "conv"}, "a stem of its own"),
        ("fan_small", {"sincos_positions": True}, "learns no positions"),
        ("rvt_huge", {}, "near it: .*rvt_base"),
        ("swin_tiny_patch4_window7_224", {"patch_size": 4, "stem": "conv"}, "a stem of its own"),
        ("swin_tiny_patch4_window7_224", {"patch_size": 4, "img_size": 80}, "has an odd side"),
        ("swin_tiny_patch4_window7_224", {"patch_size": 4, "depths": [1, 1], "num_heads": [2]}, "timm cannot build"),
        ("vit_base_patch16_siglip_224", {"global_pool": "token", "depth": 1}, "timm cannot build"),
    ],
)  # fmt: skip
def test_what_cannot_be_steered_is_refused_with_the_reason(architecture, options, message):
    with pytest.raises(UserError, match=message):
        AbSViT(architecture, **{"img_size": 224} | options)


@pytest.mark.parametrize("name", choices("model/vision"))
def test_every_choice_of_the_command_line_can_be_steered_and_names_weights_that_there_are(name):
    with initialize_config_dir(config_dir(), version_base="1.3"):
        config = compose("train", ["model=base", f"model/vision={name}", "data.image_size=224"])
    weights = config.model.vision.get("weights")
    if weights is not None:
        assert weights in timm.list_pretrained(f"{config.model.vision.architecture}.*")
        config.model.vision.weights = None
    with torch.device("meta"):
        encoder = instantiate(config.model.vision, _convert_="all")
    assert encoder.needs_prior
    assert len(encoder.decoders) == encoder.backbone.depth


def test_a_decoder_undoes_the_pooling_where_there_is_one():
    encoder, _ = make("rvt_pooled", AbSTopDown(10.0))
    assert [type(decoder) is FeedbackDecoder for decoder in encoder.decoders] == [True, True, False]
    classifier = AbSViTClassifier(make("rvt_pooled", AbSTopDown(1.0), num_classes=3)[0])
    logits, before, seen = classifier(torch.randn(2, 3, 64, 64))
    (logits.sum() + seen.reconstruction).backward()
    assert logits.shape == before.shape == (2, 3)
    assert classifier.encoder.decoders[2].unpool.weight.grad.abs().max() > 0
