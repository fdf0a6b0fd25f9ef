"""The encoder and the model against plain slow computations and invariants."""

import json
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlabs.attention.gradients import Recorded
from vlabs.attention.maps import attention_map
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, AbSViTClassifier
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import VQAHead
from vlabs.models.prior import PriorLoss, PriorMap
from vlabs.models.registry import build
from vlabs.models.text import RobertaEncoder
from vlabs.models.topdown import (
    AbSTopDown,
    AbSTopDownQKV,
    FeedbackOnly,
    MaskAttention,
    PerceiverIO,
    ReleasedTopDown,
)
from vlabs.models.variants.codebook import Codebook
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.film import FiLM
from vlabs.models.variants.prompt_merge import PromptMerge
from vlabs.models.variants.qa_vit import QAViT
from vlabs.models.variants.sentence_attention import SentenceAttention
from vlabs.models.vlm import VisionLanguageModel, assemble
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vqa import VQATask


def make_vision(topdown=None, fresh=False, **options) -> AbSViT:
    torch.manual_seed(0)
    options = {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_ratio": 2} | options
    encoder = AbSViT("vit_base_patch16_224", img_size=16, patch_size=8, topdown=topdown, **options)
    for decoder in [] if fresh else encoder.decoders[encoder.start - 1 :]:  # far from zero, so that they matter
        torch.nn.init.normal_(decoder.linear.weight, std=0.3)
        torch.nn.init.normal_(decoder.linear2.weight, std=0.3)
    return encoder.eval()


def test_a_convolutional_stem_gives_the_same_grid_and_reads_every_image_alone():
    torch.manual_seed(0)
    encoder = AbSViT("vit_base_patch16_224", img_size=32, patch_size=8, stem="conv", embed_dim=24, depth=1, num_heads=2)
    assert encoder.grid_size == (4, 4)
    again = build(encoder.spec)
    again.load_state_dict(encoder.state_dict())
    images = torch.randn(3, 3, 32, 32)
    together, alone = encoder.eval().encode(images).tokens, again.eval().encode(images[1:2]).tokens
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)
    # What lies far away in the image does not reach a patch through the stem: three 3x3 convolutions see 15 pixels.
    images.requires_grad_()
    encoder.vit.patch_embed(images)[0, 0].sum().backward()
    seen = images.grad[0].abs().sum(0) > 0
    assert seen.nonzero().amax(0).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("options", "message"), [({"stem": "cone"}, "patch, conv"), ({"patch_size": 12}, "power of 2")]
)
def test_wrong_stems_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AbSViT("vit_base_patch16_224", **{"img_size": 48, "patch_size": 8, "stem": "conv", "embed_dim": 24} | options)


def make_model(topdown=None, prior_token="cls", several=None, fresh=False, **options) -> VisionLanguageModel:
    text = RobertaEncoder(30, 32, 2, 2, 64, 20)
    fusion = partial(CoAttentionFusion, width=16, depth=2, num_heads=2)
    head = partial(VQAHead, num_answers=5)
    model = assemble(make_vision(topdown, fresh, **options), text, fusion, head, prior_token, **(several or {}))
    if topdown is not None and not fresh:
        for parameter in model.vision.topdown.parameters():  # far from zero, as the feedback is
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def plain_second_pass(encoder: AbSViT, images: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's four steps written out, token by token: modulate whole tokens, decode them, qkv of the signal."""
    vit, variant = encoder.vit, encoder.topdown

    def attention(block, x, top_down):
        attn = block.attn
        normed = block.norm1(x)
        q, k, v = attn.qkv(normed).chunk(3, dim=-1)
        if isinstance(variant, MaskAttention) and top_down is not None:
            v = top_down * v
        elif top_down is not None:
            signal = attn.qkv(top_down) if variant.bias_again else attn.qkv(top_down) - attn.qkv.bias
            whole = isinstance(variant, AbSTopDownQKV)
            q, k = (own + whole * added for own, added in zip((q, k), signal.chunk(3, dim=-1)[:2], strict=True))
            v = v + signal.chunk(3, dim=-1)[2]
        heads = [t.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for t in (q, k, v)]
        weights = (heads[0] @ heads[1].transpose(-1, -2) / heads[0].shape[-1] ** 0.5).softmax(-1)
        x = x + attn.proj((weights @ heads[2]).transpose(1, 2).flatten(2))
        return x + block.mlp(block.norm2(x))

    embedded = vit._pos_embed(vit.patch_embed(images))
    x = embedded
    for block in vit.blocks:
        x = attention(block, x, None)
    z = vit.norm(x)
    cosine = F.cosine_similarity(z, prior[:, None], dim=-1).clamp(0, 1)[..., None]
    if isinstance(variant, PerceiverIO):
        return variant.alpha * cosine * z, torch.zeros(())
    if isinstance(variant, AbSTopDown):
        t = variant.alpha * cosine * z
    elif isinstance(variant, FeedbackOnly):
        t = variant.alpha * z
    elif not isinstance(variant, MaskAttention):
        t = 5 * cosine * (z * prior[:, None]).sum(-1, keepdim=True) * prior[:, None]
    signals = [cosine] * len(vit.blocks) if isinstance(variant, MaskAttention) else []
    for decoder in reversed(encoder.decoders):
        t = decoder.linear(t)
        signals.insert(0, decoder.linear2(t))
    x, reconstruction = embedded, torch.zeros(())
    for n, (block, signal) in enumerate(zip(vit.blocks, signals, strict=True)):
        output = attention(block, x, signal)
        if variant.needs_decoders:
            reconstruction = reconstruction + ((encoder.decoders[n].linear(output) - x) ** 2).mean()
        x = output
    return vit.norm(x), reconstruction


VARIANTS = {
    "absvit": AbSTopDown(10.0),
    "absvit_alpha1": AbSTopDown(1.0, bias_again=False),
    "released": ReleasedTopDown(),
    "qkv": AbSTopDownQKV(),
    "qkv_once": AbSTopDownQKV(bias_again=False),
    "feedback": FeedbackOnly(2.0, bias_again=False),
    "mask_att": MaskAttention(),
    "perceiver_io": PerceiverIO(3.0),
}
# Those that are not the paper's are written out in test_variants.
ALL = {"none": None, **VARIANTS} | {
    "film": FiLM(), "cross_attention": CrossAttention(num_heads=2), "qa_vit": QAViT(),
    "sentence_attention": SentenceAttention(), "codebook": Codebook(codes=8),
}  # fmt: skip


@pytest.mark.parametrize("topdown", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_every_variant_equals_its_definition_written_out_token_by_token(topdown):
    encoder = make_vision(topdown).double()
    for block in encoder.vit.blocks:
        torch.nn.init.normal_(block.attn.qkv.bias)
    images, prior = torch.randn(3, 3, 16, 16).double(), torch.randn(3, 24).double()
    seen = encoder.attend(encoder.encode(images), prior, reconstruct=True)
    tokens, reconstruction = plain_second_pass(encoder, images, prior)
    torch.testing.assert_close(seen.tokens, tokens, rtol=0, atol=1e-12)
    assert (seen.reconstruction is not None) == topdown.needs_decoders
    if seen.reconstruction is not None:
        torch.testing.assert_close(seen.reconstruction, reconstruction.double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("freeze", [[], ["vision"]])
def test_feedback_begins_at_nothing_and_is_learnt_through_frozen_blocks_too(freeze):
    model = make_model(AbSTopDown(bias_again=False))
    encoder = model.vision
    for decoder, fresh in zip(encoder.decoders, build(encoder.spec).decoders, strict=True):
        assert not fresh.linear2.weight.any()
        decoder.load_state_dict(fresh.state_dict())
    images, ids = torch.randn(3, 3, 16, 16), torch.randint(5, 30, (3, 6))
    mask = torch.ones_like(ids)
    task = VQATask(model, Preprocessing(16, ""), {}, Recipe(), freeze=freeze).eval()
    optimizer = torch.optim.SGD([one for one in task.parameters() if one.requires_grad], lr=0.1)
    for step in range(2):
        output = model(images, ids, mask, alpha=10.0)
        assert torch.equal(output.seen.tokens, output.bottom_up.tokens) == (step == 0)
        optimizer.zero_grad()
        output.logits.square().sum().backward()
        assert all(decoder.linear2.weight.grad.any() for decoder in encoder.decoders)
        # What leads to B_l learns as soon as B_l is not zero any more.
        assert bool(encoder.decoders[0].linear.weight.grad.any()) == (step == 1)
        assert (encoder.vit.blocks[0].attn.qkv.weight.grad is None) == bool(freeze)
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"start": 2, "keep": 0.5}], ids=["whole", "less"])
@pytest.mark.parametrize("topdown", ALL.values(), ids=ALL)
def test_one_image_asked_many_things_gives_the_same_answers_and_gradients_as_one_by_one(topdown, options):
    model = make_model(topdown, **options).double()
    images = torch.randn(2, 3, 16, 16).double()
    ids, mask = torch.randint(3, 30, (5, 6)), torch.ones(5, 6, dtype=torch.long)
    index = torch.tensor([0, 1, 1, 0, 1])

    def gradients(*inputs):
        model.zero_grad()
        out = model(*inputs)
        out.logits.square().sum().backward()
        return out.logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    shared, shared_gradients = gradients(images, ids, mask, index)
    single, single_gradients = gradients(images[index], ids, mask)
    torch.testing.assert_close(shared, single)
    assert shared_gradients.keys() == single_gradients.keys()
    for name, gradient in single_gradients.items():
        torch.testing.assert_close(shared_gradients[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_a_different_question_changes_what_the_encoder_sees_only_with_feedback():
    images, ids, mask = torch.randn(1, 3, 16, 16), torch.randint(3, 30, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    index = torch.zeros(2, dtype=torch.long)
    steered = make_model(AbSTopDown())(images, ids, mask, index).seen.tokens
    plain = make_model(None)(images, ids, mask, index).seen.tokens
    assert (steered[0] - steered[1]).abs().max() > 1e-3
    assert torch.equal(plain[0], plain[1])


@torch.no_grad()
def test_plain_vit_equals_timm():
    encoder = make_vision(None)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder.encode(images).tokens, encoder.vit.forward_features(images))


@pytest.mark.parametrize(
    "options", [{"init_values": 0.1}, {"reg_tokens": 2}, {"pre_norm": True}, {"qk_norm": True}, {"qkv_bias": False}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
@torch.no_grad()
def test_bottom_up_pass_equals_timm_for_its_variants(options):
    encoder = make_vision(AbSTopDown(), **options)
    images = torch.randn(2, 3, 16, 16)
    bottom_up = encoder.encode(images)
    torch.testing.assert_close(bottom_up.tokens, encoder.vit.forward_features(images))
    assert encoder.attend(bottom_up, torch.randn(2, 24)).tokens.shape == bottom_up.tokens.shape


@torch.no_grad()
def test_a_later_start_says_so_and_begins_as_the_first_pass_and_takes_the_decoders_of_an_earlier_one():
    whole, late = make_vision(AbSTopDown()), make_vision(AbSTopDown(bias_again=False), start=3)
    late.load_state_dict({name: value for name, value in whole.state_dict().items() if name in late.state_dict()})
    assert {name for name in late.state_dict() if "decoders" in name} == {
        "decoders.2.linear.weight", "decoders.2.linear2.weight"
    }  # fmt: skip
    assert (build(late.spec).start, whole.spec["start"], whole.spec["keep"]) == (3, 1, 1.0)
    old = {name: value for name, value in whole.spec.items() if name not in ("start", "keep")}
    assert (build(old).start, build(old).keep) == (1, 1.0)
    images, prior = torch.randn(2, 3, 16, 16), torch.randn(2, 24)
    bottom_up = late.encode(images, [1, 2, 3])
    assert torch.equal(bottom_up.embedded, bottom_up.layers[1])
    seen = late.attend(bottom_up, prior, layers=[1, 2, 3], alpha=0.0)
    for before, after in zip([bottom_up.tokens, *bottom_up.layers], [seen.tokens, *seen.layers], strict=True):
        assert torch.equal(before, after)
    assert not torch.allclose(late.attend(bottom_up, prior).tokens, bottom_up.tokens, atol=1e-3)


@torch.no_grad()
def test_fewer_patches_are_those_most_like_the_prior_and_maps_are_of_all():
    model = make_model(AbSTopDown(), keep=[0.5, 1])
    images, ids, mask = torch.randn(2, 3, 16, 16), torch.randint(3, 30, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    assert model.vision.keep == 1.0
    whole = model(images, ids, mask, read_image=True)
    with model.vision.keeping(0.5):
        record: list[Tensor] = []
        half = model(images, ids, mask, read_image=True, record=record)
    assert half.seen.tokens.shape == (2, 4, 24)  # [cls], two patches, the mean of the others
    rest = torch.ones(2, 5).scatter(1, half.seen.kept, 0.0) * whole.seen.token_weights.clamp(min=1e-3)
    assert model.vision.choose(half.bottom_up, half.prior, None) is None
    with model.vision.keeping(0.5):
        kept = model.vision.choose(half.bottom_up, half.prior, None)
    torch.testing.assert_close(kept.rest, rest / rest.sum(1, keepdim=True))
    assert half.seen.kept[:, 0].tolist() == [0, 0]
    torch.testing.assert_close(half.seen.token_weights, whole.seen.token_weights)
    cosine = F.cosine_similarity(half.bottom_up.tokens[:, 1:], half.prior[:, None], dim=-1)
    for of_text, kept in zip(cosine, half.seen.kept[:, 1:] - 1, strict=True):
        assert set(kept.tolist()) == set(of_text.topk(2).indices.tolist())
    for name in ("fusion", "norm", "cls", "rollout"):
        seen = attention_map(half, model.vision, name, Recorded(record)).flatten(1)
        assert [row.nonzero().flatten().tolist() for row in seen] == (half.seen.kept[:, 1:] - 1).tolist(), name
    assert attention_map(half, model.vision, "weights").shape == (2, 2, 2)


@torch.no_grad()
def test_decoders_see_the_kept_tokens_alone_where_that_is_less():
    model = make_model(AbSTopDown(), keep=0.25)
    encoder, images = model.vision, torch.randn(1, 3, 16, 16)
    whole = AbSTopDown.prepare(encoder.topdown, encoder.encode(images).tokens, encoder.feedback)
    for count, waits in ((1, True), (4, False)):
        bottom_up, prior = encoder.encode(images), torch.randn(count, 24)
        index = torch.zeros(count, dtype=torch.long)
        few = encoder.attend(bottom_up, prior, index).tokens
        assert (bottom_up.prepared == []) is waits
        bottom_up.prepared = whole
        torch.testing.assert_close(few, encoder.attend(bottom_up, prior, index).tokens)


def test_a_training_draws_a_share_for_every_step_and_a_step_that_comes_again_the_same():
    model = make_model(AbSTopDown(), keep=[0.25, 0.5, 1.0])
    task = VQATask(model, Preprocessing(16, ""), {}, Recipe())

    def drawn(step):
        with mock.patch.object(VQATask, "global_step", step), task._keeping():
            return model.vision.keep

    shares = [drawn(step) for step in range(60)]
    assert min(map(shares.count, (0.25, 0.5, 1.0))) > 10
    assert shares == [drawn(step) for step in range(60)]
    assert model.vision.keep == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"keep": keep}, r"keep=.* must be a number in \(0, 1\]") for keep in (0, 1.5, "half", True, [0.5, 2])),
        ({"keep": []}, "must be a share"),
        *(({"start": start}, "start=.* must be a whole number, at least 1") for start in (0, 1.0)),
        ({"start": 4}, "one of the 3 blocks"),
        ({"keep": 0.5, "depth": 1, "architecture": "fan_tiny"}, "fan_tiny pools or mixes"),
        ({"topdown": FiLM(), "depth": 1, "architecture": "fan_tiny"}, "FiLM changes the blocks of a plain ViT"),
        ({"topdown": PromptMerge()}, "choose a Swin"),
    ],
)
def test_patches_and_blocks_that_cannot_be_left_out_are_refused(options, message):
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2} | options
    with pytest.raises(UserError, match=message):
        AbSViT(sizes.pop("architecture", "vit_base_patch16_224"), img_size=32, patch_size=16, **sizes)


def test_reconstruction_trains_the_decoders_alone():
    encoder = make_vision(AbSTopDown())
    encoder.attend(
        encoder.encode(torch.randn(2, 3, 16, 16)), torch.randn(2, 24), reconstruct=True
    ).reconstruction.backward()
    trained = {name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {f"decoders.{block}.linear.weight" for block in range(3)}


def test_a_zero_prior_leaves_the_value_bias_twice():
    """With s = 0 the signal vanishes, but W_v's bias is added all the same: not the bottom-up pass."""
    encoder = make_vision(AbSTopDown())
    torch.nn.init.normal_(encoder.vit.blocks[0].attn.qkv.bias)
    bottom_up = encoder.encode(torch.randn(2, 3, 16, 16))
    assert not torch.allclose(encoder.attend(bottom_up, torch.zeros(2, 24)).tokens, bottom_up.tokens)
    for block in encoder.vit.blocks:
        torch.nn.init.zeros_(block.attn.qkv.bias)
    bottom_up = encoder.encode(torch.ones(2, 3, 16, 16))
    torch.testing.assert_close(encoder.attend(bottom_up, torch.zeros(2, 24)).tokens, bottom_up.tokens)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_classifier_pools_cls_or_the_mean_token(pool):
    classifier = AbSViTClassifier(make_vision(AbSTopDown(1.0), global_pool=pool, num_classes=7))
    images = torch.randn(2, 3, 16, 16)
    _, bottom_up, seen = classifier(images)
    torch.testing.assert_close(bottom_up, classifier.encoder.vit(images))
    assert isinstance(classifier.encoder.vit.norm, torch.nn.Identity) == (pool == "avg")
    assert seen.token_weights.shape == (2, 5)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_base_resnet50d_224", "resnet18"])
def test_other_timm_models_are_refused_by_name(name):
    with pytest.raises(UserError, match=name):
        AbSViT(name, img_size=224)


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UserError, match="vit_bse_patch16_224"):
        AbSViT("vit_bse_patch16_224")


@torch.no_grad()
def test_padding_changes_nothing_for_cls_and_eos_priors_and_something_for_the_mean():
    ids = torch.tensor([[0, 7, 8, 2]])
    padded = torch.tensor([[0, 7, 8, 2, 1, 1]])
    images = torch.randn(1, 3, 16, 16)
    for token, same in [("cls", True), ("eos", True), ("mean", False)]:
        model = make_model(AbSTopDown(), token)
        short = model(images, ids, (ids != 1).long()).logits
        long = model(images, padded, (padded != 1).long()).logits
        assert torch.allclose(short, long, atol=1e-5) == same
        assert model.pads_to_fixed_length == (token == "mean")


@torch.no_grad()
def test_computing_only_what_the_poolers_read_changes_nothing():
    model = make_model(AbSTopDown())
    images, ids, mask = torch.randn(2, 3, 16, 16), torch.randint(3, 30, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    torch.testing.assert_close(model(images, ids, mask).logits, model(images, ids, mask, all_features=True).logits)


def plain_prior_loss(prior, seen, image_ids, scale, directions):
    prior, seen = F.normalize(prior, dim=-1), F.normalize(seen, dim=-1)
    n, losses = len(prior), []
    for rows, columns, direction in ((prior, seen, "text"), (seen, prior, "image")):
        if directions in ("both", direction):
            total = 0.0
            for i in range(n):
                others = [j for j in range(n) if j == i or image_ids[j] != image_ids[i]]
                logits = torch.stack([scale * rows[i] @ columns[j] for j in others])
                total = total - logits.log_softmax(0)[others.index(i)]
            losses.append(total / n)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("directions", ["both", "text", "image"])
def test_prior_loss_is_eq_15_over_pairs_of_other_images(directions):
    torch.manual_seed(0)
    prior, seen, image_ids = torch.randn(6, 8), torch.randn(6, 8), torch.tensor([1, 1, 2, 3, 3, 3])
    loss = PriorLoss(directions=directions)(prior, seen, image_ids)
    torch.testing.assert_close(loss, plain_prior_loss(prior, seen, image_ids, 1 / 0.07, directions))


def test_prior_loss_caps_its_scale_and_can_be_eq_15s_dot_product():
    prior, seen, ids = torch.eye(3), torch.eye(3), torch.arange(3)
    assert PriorLoss(temperature=1e-6)(prior, seen, ids) == PriorLoss(temperature=0.01)(prior, seen, ids)
    loss = PriorLoss(temperature=1.0, normalize=False, learnable=False)(2 * prior, seen, ids)
    torch.testing.assert_close(loss, torch.tensor([2.0, 0, 0]).log_softmax(0)[0].neg())
    assert not PriorLoss(learnable=False).log_scale.requires_grad


def test_prior_map_reads_the_first_end_of_text():
    states = torch.randn(2, 4, 3)
    ids = torch.tensor([[0, 5, 2, 2], [0, 2, 1, 1]])
    prior = PriorMap(3, 3, "eos")
    found = prior(states, ids, torch.ones(2, 4))
    torch.testing.assert_close(found, prior.project(torch.stack([states[0, 2], states[1, 1]])))


@pytest.mark.parametrize("topdown", ALL.values(), ids=ALL)
@torch.no_grad()
def test_a_model_is_rebuilt_from_its_spec(topdown):
    model = make_model(topdown)
    again = build(json.loads(json.dumps(model.spec)))
    again.load_state_dict(model.state_dict())
    images, ids, mask = torch.randn(1, 3, 16, 16), torch.randint(3, 30, (1, 6)), torch.ones(1, 6, dtype=torch.long)
    assert torch.equal(again.eval()(images, ids, mask).logits, model(images, ids, mask).logits)


def test_a_spec_cannot_name_anything_but_registered_classes():
    with pytest.raises(UserError, match="os.system"):
        build({"class": "os.system", "command": "true"})


@pytest.mark.parametrize("topdown", [AbSTopDown(), AbSTopDownQKV()])
def test_feedback_of_many_tokens_is_that_of_few(topdown):
    """Maps are multiplied first where there are many tokens."""
    torch.manual_seed(0)
    vision = AbSViT("vit_tiny_patch16_224", 32, 16, topdown, embed_dim=32, depth=3, num_heads=2)
    tokens = torch.randn(40, 5, 32, requires_grad=True)
    assert tokens[..., 0].numel() > 2 * vision.width >= tokens[0, ..., 0].numel()
    together = vision.feedback(tokens)
    alone = [torch.stack(parts) for parts in zip(*(vision.feedback(one) for one in tokens), strict=True)]
    for ours, plain in zip(together, alone, strict=True):
        torch.testing.assert_close(ours, plain)
    wanted = [tokens, *vision.decoders.parameters(), vision.vit.blocks[0].attn.qkv.weight]
    weights = [torch.randn_like(one) for one in together]
    for ours, plain in zip(
        *(
            torch.autograd.grad(sum((w * s).sum() for w, s in zip(weights, signals, strict=True)), wanted)
            for signals in (together, alone)
        ),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_with_one_right_answer_the_loss_is_its_cross_entropy(smoothing):
    """Answers of several people count by their shares, and a question whose answers are not in the vocabulary not."""
    torch.manual_seed(0)
    model = make_model(None)
    model.head = VQAHead(model.head.classifier[0].in_features, 5, softmax=True)
    task = VQATask(model, Preprocessing(16, ""), {}, Recipe(), label_smoothing=smoothing)
    logits = torch.randn(3, 5, dtype=torch.float64)
    targets = torch.tensor([[0, 1, 0, 0, 0], [0.3, 0, 0, 0.9, 0], [0, 0, 0, 0, 0]], dtype=torch.float64)
    odds = model.head.probabilities(logits).double().log()

    def plain(share):
        wanted = (1 - share) * torch.tensor([[0, 1, 0, 0, 0], [0.25, 0, 0, 0.75, 0]]) + share / 5
        return -(wanted * odds[:2]).sum() / 2

    assert task.answer_loss(logits, targets).item() == pytest.approx(plain(smoothing).item(), rel=1e-6)
    assert task.eval().answer_loss(logits, targets).item() == pytest.approx(plain(0).item(), rel=1e-6)
    assert "softmax" in build(model.spec | {"head": model.head.spec}).head.meaning


@pytest.mark.parametrize(("smoothing", "said"), [(0.1, "model.head.softmax=true"), (1.0, r"\[0, 1\)")])
def test_a_label_smoothing_that_means_nothing_is_refused(smoothing, said):
    with pytest.raises(UserError, match=said):
        VQATask(make_model(None), Preprocessing(16, ""), {}, Recipe(), label_smoothing=smoothing)
