"""Ways to steer that are not the paper's, against their recipes written out word by word in float64; several ξ."""

import re
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, normalize

from vlabs.attention import MAPS
from vlabs.attention.maps import look
from vlabs.errors import UserError
from vlabs.models.absvit import AbSViT, AbSViTClassifier, StoredPass
from vlabs.models.fusion import CoAttentionFusion
from vlabs.models.heads import RankingHead
from vlabs.models.prior import PriorMap, overlap
from vlabs.models.registry import restore
from vlabs.models.segmentation import UperNet, assemble_segmenter
from vlabs.models.text import RobertaEncoder
from vlabs.models.topdown import AbSTopDown, FeedbackOnly, ReleasedTopDown, Words
from vlabs.models.variants.codebook import Codebook
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.film import FiLM
from vlabs.models.variants.prompt_merge import PromptMerge
from vlabs.models.variants.qa_vit import QAViT
from vlabs.models.variants.sentence_attention import SentenceAttention
from vlabs.models.vlm import assemble

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
IDS = torch.tensor([[0, 5, 6, 2], [0, 2, 1, 1]])
ALPHA = 0.7
SWIN = {"window_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2)}


def make(topdown, prior_count=1, architecture="vit_base_patch16_224", prior_tokens=False, token="cls", **options):
    """A model of width 16, with text of width 12; no parameter of the variant is zero, so that all of it counts."""
    torch.manual_seed(0)
    plain = {"embed_dim": 16, "depth": 4, "num_heads": 2, "start": 2, "mlp_ratio": 2}
    vision = AbSViT(architecture, 32, topdown=topdown, **(options or plain))
    text = RobertaEncoder(20, 12, 1, 2, 24)
    fusion = partial(CoAttentionFusion, width=8, depth=1, num_heads=2, dropout=0.0)
    several = {"prior_count": prior_count, "prior_tokens": prior_tokens}
    model = assemble(vision, text, fusion, RankingHead, token, **several).double().eval()
    for parameter in vision.topdown.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    for decoder in vision.decoders[vision.start - 1 :]:
        torch.nn.init.normal_(decoder.linear2.weight, std=0.5)
    for block in vision.vit.blocks if hasattr(vision.vit, "blocks") else []:
        torch.nn.init.normal_(block.attn.qkv.bias, std=0.5)
    return model


def words_of(states, mask):
    return [state for state, there in zip(states, mask, strict=True) if there]


def attend(queries, keys, values, heads=2):
    """Attention of each query over a list of keys, head by head."""
    rows = []
    for query in queries:
        mixed = []
        for q, n in zip(query.chunk(heads), range(heads), strict=True):
            scores = torch.stack([q @ key.chunk(heads)[n] / len(q) ** 0.5 for key in keys]).exp()
            shares = scores / scores.sum()
            mixed.append(sum(a * value.chunk(heads)[n] for a, value in zip(shares, values, strict=True)))
        rows.append(torch.cat(mixed))
    return torch.stack(rows)


def ran(block, x, mixed=None, norms=(lambda x: x, lambda x: x)):
    """A block of a ViT; `mixed` has what the attention gives instead of its own, after the output map."""
    normed = norms[0](block.norm1(x))
    if mixed is None:
        q, k, v = block.attn.qkv(normed).chunk(3, dim=-1)
        mixed = block.attn.proj(attend(q, list(k), list(v)))
    x = x + mixed
    return x + block.mlp(norms[1](block.norm2(x)))


def cross_attention(topdown, index, block, x, words, prior):
    if index % 2 == 0:
        return ran(block, x)
    first, last = topdown.connector[0], topdown.connector[2]
    words = [last(first(word / word.norm()).clamp(min=0)) for word in words]
    layer = topdown.layers[index]
    queries = [layer.q.weight @ layer_norm(token, (16,), layer.norm.weight, layer.norm.bias) for token in x]
    read = attend(queries, [layer.k.weight @ word for word in words], [layer.v.weight @ word for word in words])
    return ran(block, x + (ALPHA * layer.gate).tanh() * read @ layer.out.weight.T)


def qa_vit(topdown, index, block, x, words, prior):
    layer = topdown.layers[index]
    norm, first, _, last = layer.map
    mapped = [last(gelu(first(norm(word)))) for word in words]
    q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
    _, more_k, more_v = block.attn.qkv(torch.stack(mapped)).chunk(3, dim=-1)
    rows = []
    for query in q:
        mixed = []
        for n in range(2):
            part = query.chunk(2)[n]
            own = (k.chunk(2, dim=1)[n] @ part / len(part) ** 0.5).exp()
            added = ALPHA * (more_k.chunk(2, dim=1)[n] @ part / len(part) ** 0.5).exp()  # α is a share of attention
            total = own @ v.chunk(2, dim=1)[n] + added @ more_v.chunk(2, dim=1)[n]
            mixed.append(total / (own.sum() + added.sum()))
        rows.append(torch.cat(mixed))
    read = torch.stack(rows)
    other = (block.attn.proj.weight + layer.change.weight) @ read.T
    return ran(block, x, block.attn.proj(read) + (ALPHA * layer.gate).tanh() * (other.T + block.attn.proj.bias))


def film(topdown, index, block, x, words, prior):
    by = ALPHA * topdown.modulations[index](prior)
    return ran(
        block,
        x,
        norms=[lambda x, n=n: x * (1 + by[32 * n : 32 * n + 16]) + by[32 * n + 16 : 32 * n + 32] for n in (0, 1)],
    )


def sentence_attention(topdown, index, block, x, words, prior):
    x = ran(block, x)
    gate = topdown.gates[index](torch.cat([x.mean(dim=0), prior])).sigmoid()
    return x * (1 + ALPHA * (2 * gate - 1))


VARIANTS = {
    "cross_attention": (partial(CrossAttention, num_heads=2), cross_attention),
    "qa_vit": (QAViT, qa_vit),
    "film": (FiLM, film),
    "sentence_attention": (partial(SentenceAttention, reduction=4), sentence_attention),
}


@pytest.mark.parametrize(("topdown", "recipe"), VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_every_block_is_the_recipe_written_out_and_padding_is_not_read(topdown, recipe):
    model = make(topdown(alpha=ALPHA))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images, IDS, MASK)
    assert model.vision.steers(out.seen) is None  # ξ need not be similar to a patch
    vision = model.vision
    for n in range(2):
        x = ran(vision.vit.blocks[0], vision.backbone.embed(images[n][None])[0])
        for index in (1, 2, 3):
            words = words_of(out.text_states[n], MASK[n])
            x = recipe(vision.topdown, index, vision.vit.blocks[index], x, words, out.prior[n])
        torch.testing.assert_close(out.seen.tokens[n], vision.vit.norm(x), rtol=0, atol=1e-11)
    # One image for all texts, and pairs that share images and texts, are the same.
    one = model(images[:1], IDS, MASK, torch.tensor([0, 0])).seen.tokens
    torch.testing.assert_close(one[0], out.seen.tokens[0])
    shared = model.join(vision.encode(images[:1]), out.prior, out.text_states, MASK).seen.tokens
    torch.testing.assert_close(shared, one)
    pairs = model(images, IDS, MASK, torch.tensor([1, 0]), torch.tensor([1, 0])).seen.tokens
    torch.testing.assert_close(pairs, out.seen.tokens.flip(0))


@torch.no_grad()
def test_a_codebook_replaces_every_token_by_a_mixture_of_codes():
    model = make(Codebook(alpha=ALPHA, codes=5, code_dim=3))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images, IDS, MASK)
    topdown = model.vision.topdown
    for n in range(2):
        for z, found in zip(out.bottom_up.tokens[n], out.seen.tokens[n], strict=True):
            scores = topdown.choose(topdown.joint(torch.cat([z, out.prior[n]])).clamp(min=0)).exp()
            code = sum(p * code for p, code in zip(scores / scores.sum(), topdown.codes, strict=True))
            torch.testing.assert_close(found, 0.3 * z + 0.7 * topdown.up(code), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_swin_reads_the_words_where_it_merges_tokens():
    model = make(
        PromptMerge(alpha=ALPHA, num_heads=2),
        architecture="swin_tiny_patch4_window7_224",
        patch_size=8,
        start=2,
        **SWIN,
    )
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images, IDS, MASK)
    vision, layer = model.vision, model.vision.topdown.attention
    before = vision.backbone.block(0, vision.backbone.embed(images)).unflatten(1, (4, 4))
    merging = vision.backbone.merges[1]
    for n in range(2):
        words = words_of(out.text_states[n], MASK[n])
        key = [layer.k_proj_weight @ word + layer.in_proj_bias[32:64] for word in words]
        value = [layer.v_proj_weight @ word + layer.in_proj_bias[64:] for word in words]
        tokens = []
        for row in (0, 2):
            for column in (0, 2):
                four = torch.cat([before[n, row + i % 2, column + i // 2] for i in range(4)])  # down first, as in Swin
                query = [layer.q_proj_weight @ four + layer.in_proj_bias[:32]]
                read = layer.out_proj(attend(query, key, value)[0])
                tokens.append(merging.reduction(merging.norm(four + ALPHA / 2 * (read - four))))
        expected = vision.backbone.finish(vision.backbone.block(1, torch.stack(tokens)[None]))
        torch.testing.assert_close(out.seen.tokens[n], expected[0], rtol=0, atol=1e-11)
    with pytest.raises(UserError, match="pass model.vision.start=2"):
        make(PromptMerge(), architecture="swin_tiny_patch4_window7_224", patch_size=8, **SWIN)
    with pytest.raises(
        UserError, match=r"model.vision.topdown.num_heads=7 must divide the width 32 of the four tokens"
    ):
        make(PromptMerge(num_heads=7), architecture="swin_tiny_patch4_window7_224", patch_size=8, start=2, **SWIN)


ALL = VARIANTS | {
    "codebook": (partial(Codebook, codes=5), None),
    "prompt_merge": (partial(PromptMerge, num_heads=2), None),
}


@pytest.mark.parametrize("name", ALL)
def test_alpha_0_is_the_first_pass_and_it_is_rebuilt_and_all_of_it_learns(name):
    swin = {"architecture": "swin_tiny_patch4_window7_224", "patch_size": 8, "start": 2} | SWIN
    model = make(ALL[name][0](), **(swin if name == "prompt_merge" else {}))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images, IDS, MASK, alpha=0.0)
    torch.testing.assert_close(out.seen.tokens, out.bottom_up.tokens, rtol=0, atol=1e-12)
    assert (model(images, IDS, MASK).seen.tokens - out.bottom_up.tokens).abs().max() > 1e-3
    if name != "prompt_merge":
        with model.vision.keeping(0.5):
            kept = model(images, IDS, MASK).seen
        assert (kept.tokens.shape, kept.kept.shape) == ((2, 4, 16), (2, 3))
    again = restore(model.spec, model.state_dict()).double().eval()
    again.load_state_dict(model.state_dict())
    out = model(images, IDS, MASK)
    torch.testing.assert_close(again(images, IDS, MASK).logits, out.logits, rtol=0, atol=0)
    out.logits.sum().backward()
    unread = {"in_proj_bias"} if name == "prompt_merge" else set()
    learn = {n: p.grad is not None and bool(p.grad.any()) for n, p in model.vision.topdown.named_parameters()}
    assert all(learn.values()), [n for n, does in learn.items() if not does and n not in unread]


@pytest.mark.parametrize("name", ["cross_attention", "film", "sentence_attention"])
@torch.no_grad()
def test_a_new_one_leaves_the_encoder_as_it_is(name):
    vision = AbSViT("vit_base_patch16_224", 32, topdown=ALL[name][0](), embed_dim=16, depth=4, num_heads=2)
    text = RobertaEncoder(20, 12, 1, 2, 24)
    fusion = partial(CoAttentionFusion, width=8, depth=1, num_heads=2)
    out = assemble(vision, text, fusion, RankingHead).eval()(torch.randn(2, 3, 32, 32), IDS, MASK)
    torch.testing.assert_close(out.seen.tokens, out.bottom_up.tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_belong_to_a_block_whatever_the_start(name):
    early, late = make(ALL[name][0](), start=1, embed_dim=16, depth=4, num_heads=2), make(ALL[name][0]())
    numbered = re.compile(r"(?:layers|modulations|gates)\.(\d)\.")
    blocks = [
        {int(found[1]) for key in model.vision.topdown.state_dict() if (found := numbered.match(key))}
        for model in (early, late)
    ]
    assert blocks == ([{0, 2}, {1, 3}] if name == "cross_attention" else [{0, 1, 2, 3}, {1, 2, 3}])


@pytest.mark.parametrize("name", ["cross_attention", "qa_vit"])
@torch.no_grad()
def test_blocks_below_the_first_that_words_steer_run_once_an_image(name, monkeypatch):
    model = make(ALL[name][0]()).train()
    ran, block = [], model.vision.backbone.block

    def counted(index, *arguments):
        out = block(index, *arguments)
        ran.append((index, len(out)))
        return out

    monkeypatch.setattr(model.vision.backbone, "block", counted)
    texts, index = (IDS.repeat(3, 1), MASK.repeat(3, 1)), torch.tensor([0, 0, 0, 1, 1, 1])
    model(torch.randn(2, 3, 32, 32, dtype=torch.float64), *texts, index)
    first_pass, second_pass = [(0, 2), (1, 2), (2, 2), (3, 2)], [(1, 6), (2, 6), (3, 6)]
    assert ran == first_pass + second_pass
    # As a ranking does: from what is stored of images, none of them is encoded again.
    encoded = model.vision.encode(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    ran.clear()
    model(StoredPass(encoded.embedded, encoded.tokens), *texts, index)
    assert ran == second_pass


@torch.no_grad()
def test_the_second_output_map_of_qa_vit_starts_as_the_encoders():
    vision = AbSViT("vit_base_patch16_224", 32, topdown=QAViT(), embed_dim=16, depth=1, num_heads=2)
    fusion = partial(CoAttentionFusion, width=8, depth=1, num_heads=2)
    model = assemble(vision, RobertaEncoder(20, 12, 1, 2, 24), fusion, RankingHead).eval()
    torch.nn.init.normal_(vision.vit.blocks[0].attn.proj.weight)  # as weights that come later do
    layer = vision.topdown.layers[0]
    layer.gate.fill_(0.5)
    out = model(torch.randn(2, 3, 32, 32), IDS, MASK)
    signal = vision.topdown.read(Words(out.text_states, MASK), out.bottom_up.tokens, out.prior, vision._project)
    mixed = torch.randn(2, 5, 16)
    own = vision.vit.blocks[0].attn.proj(mixed)
    torch.testing.assert_close(signal.project(0, mixed, own), own * (1 + layer.gate.tanh()))


def test_where_there_are_no_words_it_is_refused_in_one_line():
    encoder = AbSViT("vit_base_patch16_224", 32, topdown=QAViT(), embed_dim=16, depth=2, num_heads=2, num_classes=3)
    with pytest.raises(UserError, match="QAViT steers by words, and there are none: choose another model/topdown"):
        AbSViTClassifier(encoder)(torch.randn(1, 3, 32, 32))


# Several ξ


@torch.no_grad()
def test_each_of_several_priors_reads_the_words_and_a_patch_counts_by_the_most_similar():
    model = make(AbSTopDown(3.0, bias_again=False), prior_count=3)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    out = model(images, IDS, MASK)
    for n in range(2):
        words = torch.stack(words_of(out.text_states[n], MASK[n]))
        for m, query in enumerate(model.prior.queries):
            scores = (words @ query / 12**0.5).exp()
            expected = model.prior.project((scores / scores.sum()) @ words)
            torch.testing.assert_close(out.prior[n, m], expected, rtol=0, atol=1e-12)
        for z, s in zip(out.bottom_up.tokens[n], out.seen.token_weights[n], strict=True):
            best = max(float(normalize(prior, dim=0) @ normalize(z, dim=0)) for prior in out.prior[n])
            assert float(s) == pytest.approx(min(max(best, 0.0), 1.0), abs=1e-12)
    alone = [model(images, IDS, MASK, prior=out.prior[:, m]).seen.token_weights for m in range(3)]
    torch.testing.assert_close(torch.stack(alone).amax(dim=0), out.seen.token_weights)


@pytest.mark.parametrize("keep", [1.0, 0.5])
@torch.no_grad()
def test_the_fusion_gets_a_token_of_what_each_prior_points_at(keep):
    model = make(AbSTopDown(3.0), prior_count=2, prior_tokens=True)
    images = torch.randn(1, 3, 96, 96, dtype=torch.float64)[:, :, :32, :32]
    with model.vision.keeping(keep):
        out = model(images, IDS, MASK, torch.tensor([0, 0]), read_image=True, all_features=True)
    tokens = out.seen.tokens
    assert tokens.shape[1] == (5 if keep == 1 else 4)  # [cls], and four patches, or two and the mean of the others
    rows = []
    for n in range(2):
        places = [1, 2, 3, 4] if keep == 1 else [int(place) for place in out.seen.kept[n] if place > 0]
        read = []
        for m in range(2):
            alike = [normalize(out.prior[n, m], dim=0) @ normalize(out.bottom_up.tokens[0, i], dim=0) for i in places]
            share = (torch.stack(alike) / 0.1).softmax(dim=0)
            first = tokens[n, 1 : 1 + len(places)]
            read.append((share[:, None] * first).sum(dim=0) + model.prior_tokens.kind[m])
        rows.append(torch.cat([tokens[n], torch.stack(read)]))
    fused = model.fusion(out.text_states, MASK, torch.stack(rows), read_image=True)
    torch.testing.assert_close(out.logits, model.head(fused.pooled))
    assert out.image_features.shape[1] == tokens.shape[1]
    # What the text reads of these tokens, it reads of the patches that they are made of.
    own = fused.image_read[:, :-2] + torch.einsum("nm,nmi->ni", fused.image_read[:, -2:], out.prior_reads)
    torch.testing.assert_close(out.image_read, own)
    torch.testing.assert_close(out.image_read.sum(dim=1), torch.ones(2, dtype=torch.float64))


def test_every_map_of_a_model_with_tokens_of_what_priors_point_at_is_over_its_patches():
    model = make(AbSTopDown(3.0), prior_count=2, prior_tokens=True)
    _, found = look(model, torch.randn(1, 3, 32, 32), IDS, MASK, list(MAPS))
    assert found.keys() == MAPS.keys()
    for values in found.values():
        assert values.shape == (2, 2, 2)
        assert torch.isfinite(values).all()
        assert float(values.sum()) > 0


def test_one_of_several_equal_priors_is_that_prior_and_overlap_is_their_mean_cosine():
    one = make(AbSTopDown(3.0), prior_count=1)
    prior = torch.randn(2, 16, dtype=torch.float64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    alone, several = (one(images, IDS, MASK, prior=p).logits for p in (prior, prior[:, None].repeat(1, 2, 1)))
    torch.testing.assert_close(several, alone, rtol=0, atol=0)
    unit = torch.tensor([[[1.0, 0], [0, 2], [3, 3]]])
    assert float(overlap(unit)) == pytest.approx((0 + 2 * 0.5**0.5) / 3, abs=1e-6)


def test_a_variant_that_reads_one_prior_refuses_several():
    with pytest.raises(UserError, match="model.prior_count=2: ReleasedTopDown reads one ξ: pass 1"):
        make(ReleasedTopDown(), prior_count=2)
    assert not hasattr(PriorMap(4, 4), "queries")
    with pytest.raises(UserError, match=r"model.prior_token=mean: of several ξ \(model.prior_count=2\) each reads all"):
        make(AbSTopDown(), prior_count=2, token="mean")
    with pytest.raises(UserError, match="model.prior_count=2: this model/topdown reads no ξ: pass 1"):
        make(FeedbackOnly(), prior_count=2)
    with pytest.raises(UserError, match="model.prior_tokens=true: this model/topdown reads no ξ: pass false"):
        make(FeedbackOnly(), prior_tokens=True)


@torch.no_grad()
def test_a_prior_that_steers_nothing_is_not_said_to_steer():
    torch.manual_seed(0)
    vision = AbSViT("vit_base_patch16_224", 32, topdown=FeedbackOnly(), embed_dim=16, depth=2, num_heads=2)
    fusion = partial(CoAttentionFusion, width=8, depth=1, num_heads=2)
    model = assemble(vision, RobertaEncoder(20, 12, 1, 2, 24), fusion, RankingHead, unused_prior=True).eval()
    out = model(torch.randn(2, 3, 32, 32), IDS, MASK)
    assert out.seen.token_weights is not None  # where ξ points is known
    assert vision.steers(out.seen) is None


@pytest.mark.parametrize("points", ["prior", "head"])
def test_words_steer_the_segmentation_of_what_they_name(points):
    torch.manual_seed(0)
    topdown = CrossAttention(num_heads=2, points=points)
    vision = AbSViT("vit_base_patch16_224", 32, topdown=topdown, embed_dim=16, depth=4, num_heads=2, start=2)
    head = partial(UperNet, num_classes=1, channels=4, pool_scales=[1, 2], aux_channels=4)
    model = assemble_segmenter(vision, head, prior="text", text=RobertaEncoder(20, 12, 1, 2, 24)).eval()
    for layer in topdown.layers[1::2]:
        torch.nn.init.constant_(layer.gate, 0.9)
    image = torch.randn(1, 3, 32, 32)
    found = model(image, IDS, MASK, torch.tensor([0, 0])).logits
    assert (found[0] - found[1]).abs().max() > 1e-4
    restore(model.spec, model.state_dict())
