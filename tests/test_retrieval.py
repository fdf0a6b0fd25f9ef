"""Captions: pre-training, fine-tuning and ranking from the command line, and what each draws and measures."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, areas_by_hand, assert_one_line_error, command
from test_train import metrics_of
from torch.nn.functional import cosine_similarity

from vlabs.attention.maps import look
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.captions import CaptionDataModule
from vlabs.data.images import ImageReader
from vlabs.data.module import Wants
from vlabs.data.prepared import load_split, read_manifest
from vlabs.data.preprocessing import decode_image
from vlabs.data.words import words_in
from vlabs.errors import UserError
from vlabs.evaluation.retrieval import FilledScores
from vlabs.metrics.retrieval import retrieval_ranks
from vlabs.models.flair import TextPool
from vlabs.models.prior import PriorLoss
from vlabs.prediction import search as searching
from vlabs.prediction.search import Search, list_pictures
from vlabs.ranking.scores import ScoreMatrix
from vlabs.ranking.shortlist import Similarity, best_both_ways, share_kept, shortlist, similarities
from vlabs.ranking.texts import encode_priors
from vlabs.tasks.masking import IGNORED, TokenMasker
from vlabs.tasks.negatives import draw_false
from vlabs.tasks.optim import Recipe
from vlabs.tasks.pretrain import PretrainTask

QUICK = ["data.num_workers=0", "trainer.enable_progress_bar=false"]


@pytest.fixture(scope="session")
def tiny_captions(tiny_data):
    """The prepared captions of the tiny corpus."""
    from data_prep.engine.pipeline import Options, prepare
    from data_prep.scenes.scenes_captions import ScenesCaptions

    folder = tiny_data.parent / "captions"
    prepare(ScenesCaptions(tiny_data.parent / "raw"), folder, Options())
    return folder


@pytest.fixture(scope="session")
def caption_options(tiny_captions):
    """Overrides for a training of seconds."""
    return [
        f"callbacks.grounding.instances={tiny_captions.parent / 'raw/annotations.zip'}",
        "callbacks.grounding.num_texts=20", "data=scenes_captions", "data.size=tiny",
        f"data.dir={tiny_captions}", "data.image_size=32",
        "data.batch_size=16", "data.captions_per_image=2", "task.ranking_images=6", "trainer.max_epochs=1",
        "trainer.limit_train_batches=2", "trainer.limit_val_batches=1", "logger=csv", *QUICK, *TINY_MODEL,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def pretrained(caption_options, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("pretrain")
    result = command("vlabs.train", "task=pretrain", *caption_options, "hydra.run.dir=run", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "run"


@pytest.fixture(scope="session")
def fine_tuned(pretrained, caption_options, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("retrieval")
    result = command(
        "vlabs.train",
        "task=retrieval",
        *caption_options,
        f"init={pretrained}",
        "task.num_false=3",
        "hydra.run.dir=run",
        cwd=cwd,
    )
    assert result.returncode == 0, result.stderr
    return cwd / "run", result


def rank(run, cwd, *options, ranker="exact"):
    """Run the ranking of the test split; the metrics and the folder of the scores."""
    result = command(
        "vlabs.evaluate", "task=retrieval", f"ckpt={run}", "split=test", f"ranker={ranker}", "task.figure_queries=0",
        *QUICK, *options, "hydra.run.dir=out", "overwrite=true", cwd=cwd,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads((cwd / "out/metrics.json").read_text()), next((cwd / "outputs/scores").iterdir()), result


def test_grounding_of_captions_is_logged_in_validation_as_evaluation_finds_it(pretrained, tiny_captions, tmp_path):
    logged = json.loads((pretrained / "summary.json").read_text())["metrics"]
    result = command(
        "vlabs.evaluate", "task=grounding", f"ckpt={pretrained / 'checkpoints/last.ckpt'}", "split=val",
        "data=scenes_captions", f"data.dir={tiny_captions}", "data.num_workers=0", "task.num_texts=20",
        f"task.instances={tiny_captions.parent / 'raw/annotations.zip'}", "task.maps=[norm,fusion]",
        "hydra.run.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    for name in ("norm", "fusion"):
        assert logged[f"val/grounding/{name}_energy"] == pytest.approx(found[f"{name}/energy"], rel=1e-4)
    assert logged["val/grounding/area"] == pytest.approx(found["area"], rel=1e-4)


# Data


def test_each_caption_comes_once_an_epoch_and_several_sets_are_trained_on_together(tiny_captions):
    data = CaptionDataModule(
        tiny_captions, sets={"two": tiny_captions}, image_size=16, batch_size=8, captions_per_image=2, num_workers=0
    )
    seen = [caption for batch in data.train_dataloader() for caption in batch.caption_ids]
    once = [caption for row in load_split(tiny_captions, "train") for caption in row["caption_id"]]
    assert sorted(seen) == sorted(once * 2)


def test_false_partners_are_of_other_images_and_a_function_of_seed_epoch_and_caption(tiny_captions):
    data = CaptionDataModule(tiny_captions, image_size=16, batch_size=8, num_workers=0)
    data.wants = Wants(false_images=True, false_captions=3)
    loader = data.train_dataloader()
    first, again = next(iter(loader)), next(iter(loader))
    assert torch.equal(first.false_input_ids, again.false_input_ids)
    assert torch.equal(first.images, again.images)
    rows = load_split(tiny_captions, "train")
    tokenizer = data.preprocessing
    for n, row in enumerate(first.image_ids.tolist()):
        own = {tuple(ids) for ids in tokenizer.token_ids(rows[row]["caption"])}
        for ids, mask in zip(first.false_input_ids[n], first.false_attention_mask[n], strict=True):
            assert tuple(ids[mask.bool()].tolist()) not in own
        false, true = first.images[first.false_image_index[n]], first.images[first.image_index[n]]
        assert not torch.equal(false, true)


# Masking and negatives


@pytest.fixture(scope="module")
def tokenizer(tiny_captions):
    return (tiny_captions / "tokenizer/tokenizer.json").read_text()


def test_masking_hides_the_wanted_share_and_never_special_tokens(tokenizer):
    ids = torch.tensor([[0, *range(10, 60), 2, 1, 1]]).repeat(400, 1)
    masked, labels = TokenMasker(tokenizer)(ids, torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    assert not chosen[:, [0, 51, 52, 53]].any()
    assert chosen[:, 1:51].float().mean() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(masked[~chosen], ids[~chosen])
    hidden = masked[chosen] == TokenMasker(tokenizer).mask_id
    assert hidden.float().mean() == pytest.approx(0.8, abs=0.02)
    assert (masked[chosen] == ids[chosen]).float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(labels[chosen], ids[chosen])


def test_whole_words_are_masked_whole(tokenizer):
    from vlabs.data.preprocessing import Preprocessing

    preprocessing = Preprocessing(image_size=16, tokenizer=tokenizer)
    text = " ".join(["unforeseeable striped purplish square"] * 4)
    ids, _ = preprocessing.pad(preprocessing.token_ids([text] * 200))
    masker = TokenMasker(tokenizer, share=0.3, whole_words=True)
    _, labels = masker(ids, torch.Generator().manual_seed(0))
    starts = masker.starts_word[ids[0]].clone()
    starts[1] = True
    word = starts.cumsum(0)
    for row in (labels != IGNORED)[:50]:
        for n in range(1, int(word.max()) + 1):
            of_word = row[1:-1][word[1:-1] == n]
            assert of_word.all() or not of_word.any()
    assert (labels[:, 1:-1] != IGNORED).float().mean() == pytest.approx(0.3, abs=0.03)


def test_tokenizers_of_other_text_encoders_are_masked_and_padded_with_their_own_tokens():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    from vlabs.data.tokenizer import special_token

    pieces = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "red", "purp", "##lish", "star"]
    bert = Tokenizer(models.WordPiece({piece: n for n, piece in enumerate(pieces)}, unk_token="[UNK]"))
    bert.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    bert.add_special_tokens([AddedToken(piece, special=True) for piece in pieces[:5]])
    scores = [("<unk>", 0.0), ("<pad>", 0.0), ("[MASK]", 0.0), ("▁red", -1.0), ("▁purp", -1.0), ("lish", -1.0)]
    deberta = Tokenizer(models.Unigram(scores, unk_id=0))
    deberta.pre_tokenizer = pre_tokenizers.Metaspace()
    deberta.add_special_tokens([AddedToken(piece, special=True) for piece, _ in scores[:3]])
    for tokenizer, padding, mask in ((bert, 3, 4), (deberta, 1, 2)):
        plain = tokenizer.to_str()
        assert (special_token(plain, "pad"), special_token(plain, "mask")) == (padding, mask)
        ids = torch.tensor(tokenizer.encode("red purplish").ids)
        masker = TokenMasker(plain, share=0.5, whole_words=True)
        assert masker.mask_id == mask
        assert masker.starts_word[ids].tolist() == [True, True, False]
        _, labels = masker(ids.repeat(200, 1), torch.Generator().manual_seed(0))
        hidden = labels != IGNORED
        assert torch.equal(hidden[:, 1], hidden[:, 2])
        assert hidden[:, 0].float().mean() == pytest.approx(0.5, abs=0.12)
    nothing = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")).to_str()
    with pytest.raises(UserError, match="has no mask token"):
        TokenMasker(nothing)


def test_false_captions_of_the_batch_are_of_other_images_and_hard_ones_are_drawn_by_similarity():
    images = torch.tensor([7, 7, 8, 9])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, 4)
    similarity = torch.tensor([[0.0, 0, 3, 0]] * 4)
    for _ in range(2000):
        which, real = draw_false(images, images, 1, generator, similarity)
        assert real.all()
        counts[torch.arange(4), which[:, 0]] += 1
    assert counts[0, :2].sum() == 0
    assert counts[2, 2] == 0
    weight = torch.tensor(3.0).exp()
    assert counts[0, 2] / 2000 == pytest.approx(float(weight / (weight + 1)), abs=0.03)


def test_a_pool_without_enough_other_images_says_which_draws_are_real():
    images = torch.tensor([1, 1, 2])
    which, real = draw_false(images, images, 2, torch.Generator().manual_seed(0))
    assert real.tolist() == [[True, False], [True, False], [True, True]]
    assert which[0, 0] == 2
    assert sorted(which[2].tolist()) == [0, 1]


# Measures


def test_ranks_equal_a_plain_count():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(12, 30)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(12), [3, 2] * 6))
    ranks = retrieval_ranks(scores, owner)
    for caption in range(30):
        order = np.argsort(-scores[:, caption]).tolist()
        assert ranks.image[caption] == 1 + order.index(owner[caption])
    for image in range(12):
        order = owner[np.argsort(-scores[image])].tolist()
        assert ranks.text[image] == 1 + order.index(image)
    assert ranks.metrics()["ir@5"] == pytest.approx(100 * np.mean(ranks.image <= 5))


def test_equal_scores_are_no_better_than_the_last_place():
    ranks = retrieval_ranks(np.zeros((10, 20), np.float32), np.repeat(np.arange(10), 2))
    assert (ranks.image == 10).all()
    assert (ranks.text == 19).all()


def test_a_perfect_ranking_has_recall_one():
    scores = np.kron(np.eye(10), np.ones((1, 5))).astype(np.float32)
    metrics = retrieval_ranks(scores, np.repeat(np.arange(10), 5)).metrics()
    assert {metrics[key] for key in ("ir@1", "ir@5", "ir@10", "tr@1", "tr@5", "tr@10")} == {100}


def test_the_shortlist_is_the_union_of_both_directions_best():
    similarity = torch.randn(9, 20, generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(9, 20, dtype=torch.bool)
    for image in range(9):
        wanted[image, similarity[image].argsort(descending=True)[:3]] = True
    for caption in range(20):
        wanted[similarity[:, caption].argsort(descending=True)[:3], caption] = True
    for at_once in (1, 4, 100):
        found = shortlist(similarity.split(at_once), 3)
        assert [part.tolist() for part in found] == [row.nonzero()[:, 0].tolist() for row in wanted]


def test_images_are_compared_with_texts_as_a_whole_and_patch_by_patch():
    torch.manual_seed(0)
    cls, patches, prior = torch.randn(9, 5), torch.randn(9, 4, 5), torch.randn(20, 5)
    by_cls, by_patches = similarities(cls, patches, prior)
    torch.testing.assert_close(by_cls, cosine_similarity(cls[:, None], prior[None], dim=2))
    every = cosine_similarity(patches[:, None], prior[None, :, None], dim=3)  # (9, 20, 4)
    torch.testing.assert_close(by_patches, (every * 10).exp().sum(dim=2).log())
    coarse = (patches * 10).round().to(torch.int8)
    torch.testing.assert_close(similarities(cls, coarse, prior)[1], similarities(cls, coarse * 0.1, prior)[1])
    both = Similarity(by_cls.numpy(), by_patches.numpy())
    added = by_cls / by_cls.std(correction=0) + by_patches / by_patches.std(correction=0)
    torch.testing.assert_close(torch.cat(list(both.blocks(4))), added)
    torch.testing.assert_close(both[3], added[3])


@torch.no_grad()
def test_patches_pooled_for_a_text_and_their_loss_are_flairs_recipe_written_out():
    """v = MHA(LN(W t), LN(z), LN(z)) of 2 heads with a zero key, e^s cos(v, t) + b, and the sigmoid of every pair."""
    torch.manual_seed(0)
    width, heads = 6, 2
    pool = TextPool(width, heads).double()
    for parameter in pool.parameters():
        parameter.copy_(torch.randn(parameter.shape) / 2)
    cls, patches, prior = (
        torch.randn(3, width).double(),
        torch.randn(3, 4, width).double(),
        torch.randn(5, width).double(),
    )
    index = torch.tensor([0, 0, 1, 2, 0])
    maps, shifts = pool.attention.in_proj_weight.chunk(3), pool.attention.in_proj_bias.chunk(3)
    losses, cosines = [], torch.zeros(3, 5, dtype=torch.float64)
    for b in range(3):
        z = torch.stack([pool.norm(one) for one in patches[b]])
        for n in range(5):
            q, k, v = (x @ w.T + c for x, w, c in zip((pool.query(prior[n]), z, z), maps, shifts, strict=True))
            k, v = (torch.cat([one, torch.zeros(1, width)]) for one in (k, v))
            mixed = []
            for h in range(heads):
                part = slice(h * width // heads, (h + 1) * width // heads)
                weights = (k[:, part] @ q[part] / (width // heads) ** 0.5).softmax(0)
                mixed.append(weights @ v[:, part])
            pooled = pool.attention.out_proj(torch.cat(mixed))
            cosines[b, n] = cosine_similarity(pooled, prior[n], dim=0)
            sign = 1 if index[n] == b else -1
            for cosine in (cosines[b, n], cosine_similarity(cls[b], prior[n], dim=0)):
                losses.append(-torch.sigmoid(sign * (pool.log_scale.exp() * cosine + pool.bias)).log())
    torch.testing.assert_close(pool(patches, prior), cosines)
    found = pool.loss(cls, patches, prior, index)
    torch.testing.assert_close(found, (sum(losses) / 2 / 5).float())
    by_cls, by_pool = similarities(cls, patches, prior, pool)
    torch.testing.assert_close(by_pool, cosines.float())
    torch.testing.assert_close(by_cls, similarities(cls, patches, prior)[0])
    fresh = TextPool(8, 4)
    assert float(fresh.log_scale.exp()) == pytest.approx(10)
    assert float(fresh.bias) == -10
    assert torch.equal(similarities(cls, patches, prior, fresh)[1], similarities(cls, patches, prior)[1])
    with pytest.raises(UserError, match="model.pool_heads=3 must divide the width 8"):
        TextPool(8, 3)


def test_the_best_of_rows_and_columns_equal_a_sort_however_the_matrix_is_cut():
    matrix = torch.randn(13, 21, generator=torch.Generator().manual_seed(0))
    for at_once in (1, 5, 13):
        columns, rows = best_both_ways(matrix.split(at_once), 4)
        assert torch.equal(columns, matrix.argsort(dim=1, descending=True)[:, :4])
        assert torch.equal(rows, matrix.argsort(dim=0, descending=True)[:4])


def test_what_a_shortlist_kept_equals_a_plain_count():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(15, 40)).astype(np.float32)
    chosen = rng.random(exact.shape) < 0.3
    kept = share_kept([np.flatnonzero(row) for row in chosen], exact, k=4, images_at_once=6)
    texts = [chosen[n, c] for n in range(15) for c in np.argsort(-exact[n])[:4]]
    images = [chosen[n, c] for c in range(40) for n in np.argsort(-exact[:, c])[:4]]
    assert kept == {"texts": pytest.approx(100 * np.mean(texts)), "images": pytest.approx(100 * np.mean(images))}


def test_pairs_without_a_score_come_after_all_others_in_the_order_of_their_similarity():
    similarity = Similarity(*np.random.default_rng(2).normal(size=(2, 4, 9)).astype(np.float32))
    scores = np.random.default_rng(0).normal(size=(4, 9)).astype(np.float32)
    unknown = np.random.default_rng(1).random(scores.shape) < 0.5
    filled = FilledScores(np.where(unknown, np.nan, scores), similarity)
    whole = np.stack([filled[n] for n in range(4)])
    assert (whole[~unknown] == scores[~unknown]).all()
    assert whole[unknown].max() < scores[~unknown].min()
    assert (np.argsort(whole[unknown]) == np.argsort(similarity[:].numpy()[unknown])).all()


def test_a_prior_loss_of_no_pairs_is_zero_and_trains_nothing():
    loss = PriorLoss()
    prior, seen = torch.randn(0, 6, requires_grad=True), torch.randn(0, 6, requires_grad=True)
    value = loss(prior, seen, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value == 0
    assert loss.log_scale.grad == 0


def test_a_batch_of_one_caption_gives_finite_losses_whether_or_not_it_matches(pretrained, tiny_captions):
    checkpoint = load_checkpoint(pretrained)
    task = PretrainTask(checkpoint.model, checkpoint.preprocessing, {}, Recipe(), mlm_probability=0.01).train()
    data = CaptionDataModule(tiny_captions, batch_size=1, preprocessing=checkpoint.preprocessing, num_workers=0)
    data.wants = Wants(false_images=True)
    guessed = 0
    batches = list(itertools.islice(data.train_dataloader(), 8))
    for batch in batches:
        losses = task.losses(batch)
        assert all(torch.isfinite(value) for value in (losses.task | losses.others).values())
        guessed += len(losses.right["mlm"])
    assert guessed < len(batches)  # so at least one had no token hidden
    bottom_up = task.model.vision.encode(batches[0].images)
    matches = [float(task._pairs(batch, bottom_up, task.generator(batch))[3]) for batch in batches]
    assert 0 < sum(matches) < len(batches)


# The command line


def test_pretraining_logs_every_loss_and_a_small_zero_shot_ranking(pretrained):
    metrics = json.loads((pretrained / "summary.json").read_text())["metrics"]
    for name in ("mlm", "itm", "prior", "prior_bottom_up", "reconstruction"):
        assert np.isfinite(metrics[f"train/{name}_loss"])
    assert 0 <= metrics["val/ir@1"] <= 100


@pytest.mark.parametrize("negatives", ["batch", "hard"])
@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_false_partners_of_the_batch_train(task, negatives, caption_options, tmp_path, in_process):
    result = in_process(
        "vlabs.train", [f"task={task}", *caption_options, f"task.negatives={negatives}", "hydra.run.dir=run"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_false_partners_come_from_the_store_too(task, caption_options, tmp_path, in_process, monkeypatch):
    options = [
        f"task={task}",
        *caption_options,
        "task.freeze=[vision]",
        "task.store=store",
        "callbacks.predictions=null",
    ]
    options += ["callbacks.grounding=null"]
    assert in_process("vlabs.train", [*options, "hydra.run.dir=first"], tmp_path).returncode == 0
    monkeypatch.setattr(ImageReader, "_read_image", None)
    result = in_process("vlabs.train", [*options, "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr


def test_fine_tuning_starts_from_the_pretrained_matching_head(fine_tuned, pretrained):
    _, result = fine_tuned
    assert "head.rank, the matching head's row" in result.stdout
    before = load_checkpoint(pretrained).model.head.match.weight
    assert torch.equal(load_checkpoint(fine_tuned[0]).model.head.match.weight, before)


def test_a_run_that_starts_from_weights_takes_their_tokenizer_along(
    pretrained, tiny_data, tiny_options, tmp_path, in_process
):
    own, theirs = tiny_data / "tokenizer/tokenizer.json", load_checkpoint(pretrained).preprocessing.tokenizer
    assert own.read_text() != theirs
    options = [o for o in tiny_options if not o.startswith("trainer.max_epochs")]
    result = in_process(
        "vlabs.train",
        [*options, "trainer.max_epochs=1", "logger=csv", f"init={pretrained}", "hydra.run.dir=run"],
        tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert load_checkpoint(tmp_path / "run").preprocessing.tokenizer == theirs
    # Captions are no questions: of the words that only these have, the most frequent are named.
    rows = load_split(tiny_data, "train")
    counts = Counter(word for texts in rows["question"] for text in texts for word in words_in([text]))
    earlier = {*load_checkpoint(pretrained).data["words"].split()}
    new = sorted((word for word in counts if word not in earlier), key=lambda word: (-counts[word], word))
    assert len(new) > 1
    said = f"earlier training never had {len(new)} of the {len(counts)} words of these texts: {', '.join(new[:5])}"
    assert said in result.stdout


def test_a_checkpoint_remembers_all_that_its_weights_were_trained_on(fine_tuned, tmp_path):
    metrics, _, result = rank(fine_tuned[0], tmp_path)
    assert [item["task"] for item in metrics["trained_on"]] == ["pretrain", "retrieval"]
    assert metrics["zero_shot"] is False
    assert "not zero-shot" in result.stdout


def test_exact_ranking_equals_the_whole_network_pair_by_pair(fine_tuned, tiny_captions, tmp_path):
    metrics, folder, _ = rank(fine_tuned[0], tmp_path, "ranker.batch_size=7", "ranker.captions_in_memory=23")
    scores = np.load(folder / "exact.npy")
    checkpoint = load_checkpoint(fine_tuned[0])
    rows = load_split(tiny_captions, "test")
    from vlabs.data.preprocessing import decode_image

    captions = [caption for row in rows for caption in row["caption"]]
    assert scores.shape == (len(rows), len(captions))
    plain = np.empty_like(scores)
    input_ids, mask = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids(captions))
    with torch.no_grad():
        for n, row in enumerate(rows):
            image = checkpoint.preprocessing.image(decode_image(row["image"], "image"))[None]
            plain[n] = checkpoint.model(image.expand(len(captions), -1, -1, -1), input_ids, mask).logits.numpy()
    np.testing.assert_allclose(scores, plain, atol=1e-4)
    owner = np.repeat(np.arange(len(rows)), [len(row["caption"]) for row in rows])
    assert metrics["ir@5"] == pytest.approx(retrieval_ranks(plain, owner).metrics()["ir@5"])


def test_a_ranking_by_similarity_is_that_of_the_plain_sum_and_scores_no_pair(fine_tuned, tiny_captions, tmp_path):
    metrics, folder, _ = rank(fine_tuned[0], tmp_path, ranker="similarity")
    assert not list(folder.glob("exact*")) + list(folder.glob("shortlist*"))
    cls, patches = (np.load(folder / f"like_{name}.npy") for name in ("cls", "patches"))
    rows = load_split(tiny_captions, "test")
    owner = np.repeat(np.arange(len(rows)), [len(row["caption"]) for row in rows])
    expected = retrieval_ranks(cls / cls.std(ddof=1) + patches / patches.std(ddof=1), owner).metrics()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["ranker"] == "similarity"


def test_a_model_that_pools_for_texts_learns_to_and_is_ranked_and_searched_by_it(
    caption_options, tiny_captions, tmp_path, in_process
):
    options = ["task=retrieval", *caption_options, "model.pool_heads=2", "callbacks.predictions=null"]
    options += ["callbacks.grounding=null", "trainer.log_every_n_steps=1", "hydra.run.dir=run"]
    trained = in_process("vlabs.train", options, tmp_path)
    assert trained.returncode == 0, trained.stderr
    logged = [row.get("train/pool_prior_loss") for row in metrics_of(tmp_path / "run")]
    assert all(float(value) > 0 for value in filter(None, logged))
    assert any(logged)
    _, folder, _ = rank(tmp_path / "run", tmp_path, ranker="similarity")
    checkpoint = load_checkpoint(tmp_path / "run")
    model, rows = checkpoint.model.eval(), load_split(tiny_captions, "test")
    reader = ImageReader(rows, checkpoint.preprocessing)
    prior = encode_priors(model, checkpoint.preprocessing, [text for row in rows for text in row["caption"]])
    with torch.no_grad():
        patches = model.vision.encode(torch.cat([reader.read(n, 0)[1] for n in range(len(rows))])).tokens[:, 1:]
        pooled = model.pool(patches, prior).numpy()
    np.testing.assert_allclose(np.load(folder / "like_patches.npy"), pooled, atol=2e-3)  # patches are stored as float16
    files = [tmp_path / f"{n}.png" for n in range(6)]
    for n, file in enumerate(files):
        file.write_bytes(rows[n]["image"])
    found = Search(checkpoint, files, tmp_path / "index").find(rows[0]["caption"][0], k=2)
    by_cls = cosine_similarity(model.vision.encode(torch.cat([reader.read(n, 0)[1] for n in range(6)])).cls, prior[:1])
    both = Similarity(by_cls.detach().numpy()[:, None], pooled[:6, :1])[:][:, 0]
    assert {one.path for one in found} == {files[n] for n in both.topk(2).indices}


def test_a_shortlist_of_everything_is_exact_and_says_what_it_kept(fine_tuned, tmp_path):
    exact, _, _ = rank(fine_tuned[0], tmp_path)
    everything, folder, result = rank(fine_tuned[0], tmp_path, "ranker.k=1000", ranker="shortlist")
    for key in ("ir@1", "ir@5", "ir@10", "tr@1", "tr@5", "tr@10"):
        assert everything[key] == exact[key]
    assert everything["shortlist_kept_texts"] == 100
    few, _, _ = rank(fine_tuned[0], tmp_path, "ranker.k=2", ranker="shortlist")
    scores = np.load(folder / "shortlist-k2.npy")
    assert 0 < np.isnan(scores).mean() < 1
    assert few["shortlist_kept_texts"] == pytest.approx(
        100
        * np.mean(
            ~np.isnan(
                np.take_along_axis(
                    scores, np.argsort(-np.load(folder / "exact.npy"), axis=1, kind="stable")[:, :10], axis=1
                )
            )
        )
    )


def test_a_ranking_that_was_killed_continues_where_it_was(fine_tuned, tmp_path):
    _, folder, _ = rank(fine_tuned[0], tmp_path)
    whole = np.load(folder / "exact.npy")
    broken = np.lib.format.open_memmap(folder / "exact.npy", mode="r+")
    broken[3:] = np.nan
    broken[0] = 123  # would be overwritten if the work were done again
    broken.flush()
    rank(fine_tuned[0], tmp_path)
    again = np.load(folder / "exact.npy")
    assert (again[0] == 123).all()
    np.testing.assert_allclose(again[1:], whole[1:], atol=1e-6)


def test_two_processes_count_no_pair_twice(fine_tuned, tmp_path):
    _, folder, _ = rank(fine_tuned[0], tmp_path)
    alone = np.load(folder / "exact.npy")
    together = ["trainer.devices=2", "trainer.strategy=ddp", "trainer.accelerator=cpu", "ranker.scores=two"]
    metrics, _, result = rank(fine_tuned[0], tmp_path, *together)
    np.testing.assert_allclose(np.load(tmp_path / "two/exact.npy"), alone, atol=1e-5)
    assert result.stdout.count("image retrieval") == 1


def test_the_figure_shows_queries_with_their_best_images(fine_tuned, tmp_path):
    result = command("vlabs.evaluate", "task=retrieval", f"ckpt={fine_tuned[0]}", "split=test", "task.figure_queries=2",
                     *QUICK, "hydra.run.dir=out", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/figures/ranking.png").stat().st_size > 10_000


# Search


def test_search_ranks_your_own_images_and_keeps_an_index_by_content(fine_tuned, tiny_captions, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for n, row in enumerate(load_split(tiny_captions, "test")):
        (pictures / f"{n}.jpg").write_bytes(row["image"])
    options = ["--ckpt", fine_tuned[0], "--images", pictures, "--index", tmp_path / "index", "--top", 3, "--overwrite"]
    options += ["--out", "search.png"]
    first = command("vlabs.search", *options, "--query", "what's left, the red one?", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(".jpg") == 3
    assert (tmp_path / "search.png").is_file()
    assert "indexing" in first.stderr
    (pictures / "0.jpg").rename(pictures / "renamed.jpg")
    again = command("vlabs.search", *options, "--query", "what's left, the red one?", cwd=tmp_path)
    assert "indexing" not in again.stderr
    assert again.stdout.replace("renamed.jpg", "0.jpg") == first.stdout


def test_search_takes_less_work_and_bfloat16_and_decodes_nothing_twice(
    fine_tuned, tiny_captions, tmp_path, monkeypatch, capsys
):
    from vlabs import search

    (tmp_path / "pictures").mkdir()
    for n, row in enumerate(load_split(tiny_captions, "test")):
        (tmp_path / f"pictures/{n}.jpg").write_bytes(row["image"])
    monkeypatch.chdir(tmp_path)
    searches = []
    monkeypatch.setattr(
        Search, "__init__", lambda self, *given, made=Search.__init__: (made(self, *given), searches.append(self))[0]
    )
    for options in ([], ["--keep", "0.25"], ["--bf16"]):
        fixed = ["--ckpt", str(fine_tuned[0]), "--images", "pictures", "--index", "index", "--query", "the red one"]
        monkeypatch.setattr(sys, "argv", ["search", *fixed, *options])
        search.main()
    whole, less, half = searches
    assert (whole.model.vision.keep, less.model.vision.keep) == (1, 0.25)
    assert {weight.dtype for weight in half.model.parameters()} == {torch.bfloat16}
    exact = {item.path: item.score for item in whole.find("the red one", None)}
    assert {item.path: item.score for item in less.find("the red one", None)} != exact
    near = {item.path: item.score for item in half.find("the red one", None)}
    assert all(abs(near[path] - score) < 0.1 for path, score in exact.items())
    assert len(list((tmp_path / "index").iterdir())) == 2  # a share reads the same first passes

    opened, opens = [], searching.open_image
    monkeypatch.setattr(searching, "open_image", lambda path: (opened.append(path), opens(path))[1])
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "pictures" / name).write_bytes(b"no image")
    capsys.readouterr()
    given = [whole.checkpoint, list_pictures("pictures"), Path("index"), "cpu"]
    assert Search(*given, True).pictures == whole.pictures
    assert [path.name for path in opened] == ["b.jpg"]  # what the index has is not decoded again
    said = capsys.readouterr().out
    assert "left out: pictures/b.jpg is not a whole image" in said
    assert "left out: pictures/a.jpg is the same as pictures/b.jpg" in said


def test_search_without_shortlist_is_the_exact_ranking(fine_tuned, tiny_captions, tmp_path):
    from vlabs.prediction.search import Search

    metrics, folder, _ = rank(fine_tuned[0], tmp_path)
    rows = load_split(tiny_captions, "test")
    for n, row in enumerate(rows):
        (tmp_path / f"{n:02}.jpg").write_bytes(row["image"])
    search = Search(load_checkpoint(fine_tuned[0]), sorted(tmp_path.glob("*.jpg")), tmp_path)
    found = search.find(rows[0]["caption"][0], k=None)
    scores = np.load(folder / "exact.npy")[:, 0]
    by_name = [next(item.score for item in found if item.path.name == f"{n:02}.jpg") for n in range(len(rows))]
    np.testing.assert_allclose(by_name, scores, atol=5e-3)  # tokens of int8
    assert [item.score for item in found] == sorted(by_name, reverse=True)
    sharp = np.exp([item.score - found[0].score for item in found])
    np.testing.assert_allclose([item.share for item in found], sharp / sharp.sum())


# Wrong input


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["task=pretrain", "data=scenes", "data.dir=VQA"], ["task=pretrain", "captions", "data.dir"]),
        (["task=vqa", "data=scenes_captions", "data.dir=CAPTIONS"], ["task=vqa", "questions", "data=scenes, vqav2"]),
        (["task=pretrain", "task.mlm_probability=2"], ["task.mlm_probability=2", "a number in (0, 1)"]),
        (["task=retrieval", "task.num_false=0"], ["task.num_false=0", "at least 1"]),
        (["task=retrieval", "task.ranking_images=0"], ["task.ranking_images=0", "at least 2"]),
        (["task=pretrain", "task.negatives=random"], ["task.negatives=random", "dataset, batch, hard"]),
        (["task=pretrain", "task.negatives=hard", "model/topdown=none"], ["task.negatives=hard", "model/topdown"]),
    ],
)
def test_wrong_training_options_are_one_line(
    options, parts, caption_options, tiny_captions, tiny_data, tmp_path, in_process
):
    options = [o.replace("CAPTIONS", str(tiny_captions)).replace("VQA", str(tiny_data)) for o in options]
    result = in_process("vlabs.train", ["data.dir=" + str(tiny_captions), "logger=csv", *QUICK, *options], tmp_path)
    assert_one_line_error(result, *parts)


def test_a_vqa_model_does_not_rank_and_questions_are_no_captions(tiny_run, fine_tuned, tiny_data, tmp_path, in_process):
    result = in_process("vlabs.evaluate", ["task=retrieval", f"ckpt={tiny_run[0]}"], tmp_path)
    assert_one_line_error(result, "trained for the task 'vqa'", "retrieval or pretrain")
    result = in_process(
        "vlabs.evaluate", ["task=retrieval", f"ckpt={fine_tuned[0]}", f"data.dir={tiny_data}"], tmp_path
    )
    assert_one_line_error(result, "holds questions", "is measured on captions")


def test_maps_are_measured_by_the_rank_of_the_own_image(fine_tuned, tiny_captions, tmp_path, in_process):
    given = ["task=faithfulness", f"ckpt={fine_tuned[0]}", "task.num_texts=3", "task.maps=[norm]", "split=val"]
    result = in_process("vlabs.evaluate", [*given, *QUICK, "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    checkpoint, rows = load_checkpoint(fine_tuned[0]), load_split(tiny_captions, "val")
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    chosen = np.linspace(0, len(rows) - 1, num=min(16, len(rows)), dtype=int).tolist()

    def score_of(image, ids, mask):
        return float(model.head.score(model(image, ids, mask).pooled_features))

    for line in (tmp_path / "out/faithfulness.jsonl").read_text().splitlines():
        record = json.loads(line)
        own = next(n for n, row in enumerate(rows) if record["id"] in row["caption_id"])
        images = {
            n: preprocessing.image(decode_image(rows[n]["image"], ""))[None] for n in dict.fromkeys([own, *chosen])
        }
        ids, mask = preprocessing.pad(preprocessing.token_ids([record["text"]]))
        most = max(score_of(images[n], ids, mask) for n in [n for n in chosen if n != own][:15])
        values = look(model, images[own], ids, mask, ["norm"])[1]["norm"]

        def score(taken):
            left = images[own].clone()  # noqa: B023
            for patch in taken:
                top, start = 8 * (patch // 4), 8 * (patch % 4)
                left[..., top : top + 8, start : start + 8] = 0
            return 100.0 * (score_of(left, ids, mask) > most)  # noqa: B023

        deletion, insertion = areas_by_hand(values.flatten().argsort(descending=True).tolist(), score)
        assert record["norm"]["deletion"] == pytest.approx(deletion)
        assert record["norm"]["insertion"] == pytest.approx(insertion)


def test_a_score_file_of_another_checkpoint_is_refused(fine_tuned, pretrained, tmp_path, in_process):
    rank(pretrained, tmp_path)
    options = ["task=retrieval", f"ckpt={fine_tuned[0]}", "split=test", *QUICK]
    folder = next((tmp_path / "outputs/scores").iterdir())
    result = in_process("vlabs.evaluate", [*options, f"ranker.scores={folder}"], tmp_path)
    assert_one_line_error(result, "exact.npy", "another checkpoint", "ranker.scores")


def test_a_damaged_score_file_is_refused(tmp_path):
    ScoreMatrix(tmp_path, "exact", (3, 4), {"split": "test"})
    (tmp_path / "exact.npy").write_bytes(b"no")
    with pytest.raises(UserError, match=r"exact\.npy is damaged"):
        ScoreMatrix(tmp_path, "exact", (3, 4), {"split": "test"})


def test_fewer_than_ten_images_are_too_few_for_recall_at_ten(fine_tuned, tmp_path, in_process):
    table = tmp_path / "few.jsonl"
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    table.write_text(
        "".join(json.dumps({"image": "a.png", "caption": f"number {n}", "split": "test"}) + "\n" for n in range(3))
    )
    made = command("data_prep.own", "--table", table, "--out-dir", "few", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    result = in_process(
        "vlabs.evaluate", ["task=retrieval", f"ckpt={fine_tuned[0]}", "split=test", "data.dir=few"], tmp_path
    )
    assert_one_line_error(result, "1 images", "R@10 needs at least 10")


def test_the_shortlist_needs_a_prior(caption_options, tmp_path, in_process):
    result = in_process(
        "vlabs.train", ["task=pretrain", "model/topdown=none", *caption_options, "hydra.run.dir=run"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    result = in_process("vlabs.evaluate", ["task=retrieval", "ckpt=run", "split=test", "ranker=shortlist"], tmp_path)
    assert_one_line_error(result, "ranker=shortlist", "plain ViT")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--images", "nowhere"], "there is no such folder"),
        (["--images", "empty"], "there is no image in it"),
        (["--images", "bad"], "broken.png is not a whole image"),
        (["--images", "bad", "--query", " "], "--query is empty"),
        (["--images", "bad", "--out", "x.gif"], "name a .png or .svg file"),
    ],
)
def test_wrong_searches_are_one_line(options, part, fine_tuned, tmp_path, monkeypatch, capsys):
    from vlabs import search
    from vlabs.errors import run_cli

    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/broken.png").write_bytes(b"not a picture")
    if "--query" in options:
        from PIL import Image

        Image.new("RGB", (8, 8)).save(tmp_path / "bad/broken.png")
    monkeypatch.chdir(tmp_path)
    query = [] if "--query" in options else ["--query", "a dog"]
    monkeypatch.setattr(sys, "argv", ["search", "--ckpt", str(fine_tuned[0]), "--index", "i", *options, *query])
    with pytest.raises(SystemExit) as stop:
        run_cli(search.main)
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert part in error.splitlines()[-1]
    assert "Traceback" not in error


def test_sets_whose_ids_are_numbers_and_texts_are_trained_on_together(tiny_captions, tmp_path):
    shutil.copytree(tiny_captions, tmp_path / "texts")
    for split in read_manifest(tiny_captions)["splits"]:
        rows = load_split(tiny_captions, split)
        ids = [[f"0{one}" for one in of] for of in rows["caption_id"]]
        strings = datasets.List(datasets.Value("string"))
        rows = rows.remove_columns("caption_id").add_column("caption_id", ids, feature=strings)
        shutil.rmtree(tmp_path / "texts" / split)
        rows.save_to_disk(tmp_path / "texts" / split)
    for sets in ((tiny_captions, tmp_path / "texts"), (tmp_path / "texts", tiny_captions)):
        data = CaptionDataModule(sets[0], sets={"other": sets[1]}, image_size=16, num_workers=0)
        found = [one for batch in data.val_dataloader() for one in batch.caption_ids]
        of_numbers = [str(one) for of in load_split(tiny_captions, "val")["caption_id"] for one in of]
        assert sorted(found) == sorted(of_numbers + [f"0{one}" for one in of_numbers])
