"""Ranking: shared work gives the plain computation's numbers, and the measures count as METER counts."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from vlabs.data.preprocessing import Preprocessing
from vlabs.models.absvit import AbSViT
from vlabs.models.fusion import CoAttentionFusion, FusionAttention
from vlabs.models.heads import PretrainHead, RankingHead
from vlabs.models.text import RobertaEncoder
from vlabs.models.topdown import (
    AbSTopDown,
    AbSTopDownQKV,
    FeedbackOnly,
    MaskAttention,
    PerceiverIO,
    ReleasedTopDown,
)
from vlabs.models.vlm import VisionLanguageModel, assemble
from vlabs.ranking.texts import encode_texts, score_texts

CAPTIONS = ["a dog", "two men in the rain", "one", "a red bus stops near a very old church", "a cat on a mat", "rain"]


@pytest.fixture(scope="module")
def preprocessing() -> Preprocessing:
    from data_prep.engine.folder import train_tokenizer

    return Preprocessing(image_size=32, tokenizer=train_tokenizer(CAPTIONS * 3, 300).to_str(), max_length=16)


def random_model(topdown: torch.nn.Module | None, prior_token: str, ranking: bool = True) -> VisionLanguageModel:
    """A small model with weights far from its start, so that every term shows in the scores.

    Maps keep the size of what they map and norms are near one: a smaller scale would drown the text in the biases.
    """
    torch.manual_seed(0)
    model = assemble(
        AbSViT("vit_tiny_patch16_224", 32, 16, topdown, embed_dim=32, depth=3, num_heads=2),
        RobertaEncoder(400, 24, 2, 2, 48, max_position_embeddings=50),
        partial(CoAttentionFusion, width=32, depth=2, num_heads=4),
        RankingHead if ranking else partial(PretrainHead, vocab_size=400),
        prior_token,
    )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, torch.nn.LayerNorm) and name == "weight":
                torch.nn.init.normal_(parameter, mean=1, std=0.2)
            elif isinstance(module, torch.nn.Linear) and name == "weight":
                torch.nn.init.normal_(parameter, std=module.in_features**-0.5)
            else:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("prior_token", ["cls", "mean", "eos"])
@pytest.mark.parametrize(
    "topdown", [None, AbSTopDown(), ReleasedTopDown(), AbSTopDownQKV(), FeedbackOnly(), MaskAttention(), PerceiverIO()]
)
@torch.no_grad()
def test_shared_ranking_scores_equal_pair_by_pair_scores(
    topdown: torch.nn.Module | None, prior_token: str, preprocessing: Preprocessing
) -> None:
    model = random_model(topdown, prior_token)
    if model.pads_to_fixed_length:
        preprocessing = Preprocessing.from_plain(preprocessing.to_plain() | {"pad_to_max_length": True})
    images = torch.randn(2, 3, 32, 32)
    texts = encode_texts(model, preprocessing, CAPTIONS, batch_size=4)
    for image in images:
        bottom_up = model.vision.encode(image[None])
        which = torch.tensor([5, 0, 3, 1, 2])
        ours = score_texts(model, bottom_up, texts, which, batch_size=2)
        for n, text in enumerate(which.tolist()):
            input_ids, mask = preprocessing.pad(preprocessing.token_ids([CAPTIONS[text]]))
            plain = model(image[None], input_ids, mask).logits
            torch.testing.assert_close(ours[n : n + 1], plain, atol=1e-5, rtol=0)


@torch.no_grad()
def test_zero_shot_score_is_the_logit_of_matching(preprocessing: Preprocessing) -> None:
    model = random_model(AbSTopDown(), "cls", ranking=False)
    image = torch.randn(1, 3, 32, 32)
    texts = encode_texts(model, preprocessing, CAPTIONS)
    scores = score_texts(model, model.vision.encode(image), texts, torch.arange(3))
    input_ids, mask = preprocessing.pad(preprocessing.token_ids(CAPTIONS[:3]))
    matching = model(image.expand(3, -1, -1, -1), input_ids, mask).logits
    torch.testing.assert_close(scores, matching[:, 1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_scores_in_bfloat16_are_not_rounded_to_bfloat16(preprocessing: Preprocessing) -> None:
    model = random_model(AbSTopDown(), "cls").bfloat16()
    texts = encode_texts(model, preprocessing, CAPTIONS)
    image = torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)
    scores = score_texts(model, model.vision.encode(image), texts, torch.arange(len(CAPTIONS)))
    assert (scores != scores.bfloat16().float()).any()


def test_fine_tuning_starts_from_the_matching_heads_positive_row() -> None:
    head = RankingHead(8)
    head.start_from_matching()
    pooled = torch.randn(5, 8)
    torch.testing.assert_close(head(pooled), head.match(pooled)[:, 1])


@pytest.mark.parametrize(
    ("queries", "keys"), [((3, 1), (3, 40)), ((3, 2), (3, 40)), ((3, 40), (3, 2)), ((1, 40), (3, 2))]
)
@pytest.mark.parametrize("masked", [False, True])
def test_folded_attention_equals_the_usual_order_and_has_its_gradients(
    queries: tuple[int, int], keys: tuple[int, int], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attention = FusionAttention(64, num_heads=4, dropout=0.1).double().eval()
    x = torch.randn(*queries, 64, dtype=torch.float64, requires_grad=True)
    context = torch.randn(*keys, 64, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(keys[1]) < torch.tensor([[1], [2], [keys[1]]]) if masked else None
    usual = attention.norm(x + attention.out(attention._mix(x, context, mask)))
    monkeypatch.setattr(attention, "_mix", None)  # so that it cannot be what is called now
    folded = attention(x, context, mask)
    torch.testing.assert_close(folded, usual)
    inputs = [x, context, *attention.parameters()]
    weights = torch.randn_like(usual)
    for ours, expected in zip(
        torch.autograd.grad((folded * weights).sum(), inputs),
        torch.autograd.grad((usual * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)
