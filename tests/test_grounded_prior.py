"""ξ learns to point: the losses on patches, what a batch says of regions, and the control that is fed to nothing."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import LOOKS, assert_one_line_error, command
from PIL import Image
from test_models import make_model
from test_scenes import asked
from test_train import metrics_of

from data_prep.engine.regions import draw_regions
from vlabs.data.images import ImageReader, decode_region, decode_regions, seed_generators
from vlabs.data.instances import crop_map, read_instances
from vlabs.data.prepared import count_regions, load_split
from vlabs.data.preprocessing import Preprocessing
from vlabs.data.sampling import BatchSpec, Group
from vlabs.data.vqa import VQABatch, VQADataModule, VQADataset
from vlabs.errors import UserError
from vlabs.metrics.grounding import list_hat
from vlabs.models.harmonizer import harmonizer_loss
from vlabs.models.prior import AlivePriorLoss, RegionPriorLoss, TokenPriorLoss
from vlabs.models.topdown import AbSTopDown, similarity
from vlabs.models.variants.cross_attention import CrossAttention
from vlabs.models.variants.qa_vit import QAViT
from vlabs.models.vlm import assemble
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vqa import People, VQATask

GRID = (4, 4)


def some_texts(n=5, images=3, patches=6, width=4):
    torch.manual_seed(0)
    return torch.randn(n, width), torch.randn(images, patches, width), torch.tensor([0, 0, 1, 2, 2])


def test_region_loss_is_the_cross_entropy_of_the_shares_written_out():
    prior, tokens, index = some_texts()
    coverage = torch.rand(5, 6)
    coverage[1] = 0  # nobody said
    expected = []
    for n in (0, 2, 3, 4):
        z = tokens[index[n]]
        cosine = torch.stack([F.cosine_similarity(prior[n], patch, dim=0) for patch in z])
        expected.append(-(coverage[n] / coverage[n].sum() * torch.log_softmax(cosine / 0.2, 0)).sum())
    found = RegionPriorLoss(0.2)(prior, tokens, index, coverage)
    torch.testing.assert_close(found, torch.stack(expected).sum() / 5)


def test_region_loss_is_least_where_xi_is_on_the_region():
    tokens = torch.eye(4)[None]
    coverage = torch.tensor([[0.0, 0.5, 0.0, 0.0]])
    loss = RegionPriorLoss()
    values = [float(loss(torch.eye(4)[n][None], tokens, None, coverage)) for n in range(4)]
    assert min(values) == values[1] < 0.01
    assert min(values[0], values[2], values[3]) > 9


def test_region_loss_is_zero_with_a_gradient_where_no_text_has_a_region():
    prior, tokens, index = some_texts()
    prior.requires_grad_()
    value = RegionPriorLoss()(prior, tokens, index, torch.zeros(5, 6))
    value.backward()
    assert value == 0
    assert torch.equal(prior.grad, torch.zeros_like(prior))


def test_token_loss_compares_soft_maxima_with_other_images_alone():
    prior, tokens, index = some_texts()
    similar = torch.zeros(5, 3)
    for n in range(5):
        for b in range(3):
            cosine = torch.stack([F.cosine_similarity(prior[n], patch, dim=0) for patch in tokens[b]])
            similar[n, b] = torch.log(torch.exp(cosine / 0.1).sum())
    to_image = torch.stack([-torch.log_softmax(similar[n], 0)[index[n]] for n in range(5)]).mean()
    to_text = []
    for n in range(5):
        rivals = [n, *[m for m in range(5) if index[m] != index[n]]]
        to_text.append(-torch.log_softmax(similar[rivals, index[n]], 0)[0])
    expected = (to_image + torch.stack(to_text).mean()) / 2
    torch.testing.assert_close(TokenPriorLoss(0.1)(prior, tokens, index), expected, rtol=1e-4, atol=1e-5)


def test_token_loss_asks_for_one_patch_and_not_for_the_whole_image():
    """An image of which one patch is what the text says beats one that is a little like it everywhere."""
    prior = torch.eye(3)[:2]
    half = F.normalize(torch.tensor([0.4, 0.0, 1.0]), dim=0).expand(4, 3)
    one = torch.stack([torch.eye(3)[0], *[torch.eye(3)[2]] * 3])
    right = TokenPriorLoss()(prior, torch.stack([one, half]), torch.tensor([0, 1]))
    wrong = TokenPriorLoss()(prior, torch.stack([one, half]), torch.tensor([1, 0]))
    assert right < wrong


def test_alive_loss_asks_for_one_patch_where_nobody_said_which():
    prior, tokens, index = some_texts()
    coverage = torch.zeros(5, 6)
    coverage[2, 3] = 1
    expected = []
    for n in range(5):
        cosine = torch.stack([F.cosine_similarity(prior[n], patch, dim=0) for patch in tokens[index[n]]])
        expected.append((0.9 - cosine.max()).clamp_min(0))
    assert min(expected) < 0.3 < max(expected)
    loss = AlivePriorLoss(0.9)
    torch.testing.assert_close(loss(prior, tokens, index), torch.stack(expected).mean())
    expected[2] *= 0
    torch.testing.assert_close(loss(prior, tokens, index, coverage), torch.stack(expected).mean())
    # A ξ that is unlike everything gets a gradient, which the clamp of the modulation does not give.
    dead = (-tokens[:1].mean(1)).requires_grad_()
    assert not similarity(dead, tokens[:1] * 0 - dead.detach()).any()
    loss(dead, tokens[:1] * 0 - dead.detach(), None).backward()
    assert torch.isfinite(dead.grad).all()


def test_the_focus_loss_contrasts_text_image_and_image_through_its_region():
    """FocusCLIP's recipe: pixels · (a + (1 − a) · region), and NT-Xent of all three pairs, both ways."""
    task = make_task(focus_prior_weight=1.0, focus_prior_floor=0.25).train()
    prepared = task.preprocessing
    pixels, coverage = (
        torch.rand(2, 3, 16, 16),
        torch.tensor([[0, 1, 0.5, 0], [0, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]),
    )
    ids, mask, index = torch.randint(5, 30, (4, 6)), torch.ones(4, 6, dtype=torch.int64), torch.tensor([0, 0, 1, 1])
    mean, std = (torch.tensor(one)[:, None, None] for one in (prepared.mean, prepared.std))
    images = (pixels - mean) / std
    task.model.eval()  # without dropout, but with the losses of training
    output = task.model(images, ids, mask, index)
    task.log = lambda *_, **__: None
    found = task.pointing_losses(output, coverage, images=images)["focus_prior"]
    known = [0, 2, 3]  # nobody said where the second looks
    heat = F.interpolate(coverage[known].view(3, 1, 2, 2), (16, 16), mode="bilinear")
    assert torch.equal(heat[0, 0, 0], torch.tensor([0.0] * 4 + [n / 8 + 1 / 16 for n in range(8)] + [1.0] * 4))
    masked = (pixels[index[known]] * (0.25 + 0.75 * heat) - mean) / std
    views = [F.normalize(x, dim=1) for x in (
        output.prior[known], output.bottom_up.cls[index[known]], task.model.vision.encode(masked).cls
    )]  # fmt: skip
    losses = []
    for a, b in ((0, 1), (0, 2), (2, 1)):
        logits = views[a] @ views[b].T / 0.07
        logits[1, 2] = logits[2, 1] = -torch.inf  # two texts of one image
        losses += [F.cross_entropy(logits, torch.arange(3)), F.cross_entropy(logits.T, torch.arange(3))]
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)
    nowhere = task.pointing_losses(output, torch.zeros(4, 4), images=images)["focus_prior"]
    nowhere.backward()
    assert nowhere == 0
    assert "focus_prior" not in task.eval().pointing_losses(output, coverage, images=images)


@pytest.mark.parametrize("index", [None, torch.tensor([1, 0])])
def test_each_of_several_priors_is_taught_its_own_region(index):
    prior, tokens, coverage = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.rand(2, 3, 5)
    coverage[1] = 0  # nobody said where it looks
    loss = RegionPriorLoss()
    alone = [loss(prior[:, m], tokens, index, coverage[:, m]) for m in range(3)]
    torch.testing.assert_close(loss(prior, tokens, index, coverage), torch.stack(alone).mean())
    scores = torch.randn(2, 5)  # of a variant that has one map
    torch.testing.assert_close(
        loss(prior, tokens, index, coverage, scores), loss(prior, tokens, index, coverage.amax(dim=1), scores)
    )
    alive = AlivePriorLoss(1.0)(prior, tokens, index, coverage)
    torch.testing.assert_close(alive, AlivePriorLoss(1.0)(prior, tokens, index, coverage.amax(dim=1)))


def test_one_text_alone_or_none_gives_finite_losses():
    for n in (0, 1):
        prior, tokens = torch.randn(n, 4, requires_grad=True), torch.randn(1, 6, 4)
        value = TokenPriorLoss()(prior, tokens, torch.zeros(n, dtype=torch.int64))
        value.backward()
        assert value == 0
        assert torch.isfinite(prior.grad).all()


def test_a_temperature_must_be_above_zero():
    with pytest.raises(UserError, match="above 0"):
        RegionPriorLoss(0)


# Regions of a batch


def reader_of(tiny_data, grid=GRID, **options):
    data = VQADataModule(tiny_data, image_size=32, num_workers=0)
    rows = load_split(tiny_data, "train")
    images = ImageReader(rows, data.preprocessing, region_grid=grid, **options)
    return VQADataset(rows, data.preprocessing, images)


def test_regions_are_those_of_the_phrases_in_their_order(tiny_data):
    raw, rows, counts = tiny_data.with_name("raw"), load_split(tiny_data, "train"), set()
    phrases = {one["question_id"]: one["target_instances"] for _, one, _ in asked(raw, "train")}
    wanted = {n for of in phrases.values() for phrase in of for n in phrase}
    masks = read_instances(raw / "annotations.zip", wanted)
    for row in rows:
        for question_id, png in zip(row["question_id"], row["region"], strict=True):
            named = [np.logical_or.reduce([masks[n].mask() for n in phrase]) for phrase in phrases[question_id]]
            if not named:
                continue
            counts.add(len(named))
            whole = np.logical_or.reduce(named)
            assert (decode_region(png, "") == whole).all()
            one, two, three = decode_regions(png, 3, "")
            assert (one == (named[0] if len(named) > 1 else whole)).all()
            assert (two == (named[1] if len(named) > 1 else whole)).all()
            assert (three == whole).all()  # no question of train has a third phrase
            assert (decode_regions(png, 1, "")[0] == whole).all()
    assert counts == {1, 2}


def test_the_last_region_has_all_further_phrases_and_phrases_may_overlap():
    boxes = [(0, 0, 4, 4), (2, 2, 4, 4), (6, 0, 2, 2)]
    png, _ = draw_regions([{"box": box, "phrase": n} for n, box in enumerate(boxes)], 8, 8)
    plain = [decode_region(draw_regions([{"box": box}], 8, 8)[0], "") for box in boxes]
    first, others = decode_regions(png, 2, "")
    assert (first == plain[0]).all()
    assert (others == np.maximum(plain[1], plain[2])).all()
    assert (decode_region(png, "") == np.maximum(first, others)).all()


def test_coverage_has_the_share_of_each_patch_in_every_phrase(tiny_data):
    rows = load_split(tiny_data, "train")
    spec = BatchSpec(0, [Group(0, tuple(range(len(rows[0]["question"]))))])
    found = reader_of(tiny_data, region_sets=2)[spec].coverage
    for n, png in enumerate(rows[0]["region"]):
        for m in range(2):
            expected = crop_map(decode_regions(png, 2, "")[m], 32, GRID).ravel() if png else np.zeros(GRID[0] * GRID[1])
            np.testing.assert_allclose(found[n, m].numpy(), expected, atol=1e-6)
    assert (found[:, 0] != found[:, 1]).any()
    with_palette = [png[25] == 3 for row in rows for png in row["region"] if png]
    assert count_regions(tiny_data, "train", "phrases") == sum(with_palette) > 0


def test_coverage_is_the_share_of_each_patch_in_the_masks_of_the_targets(tiny_data):
    rows = load_split(tiny_data, "train")
    batch = reader_of(tiny_data)[BatchSpec(0, [Group(0, tuple(range(len(rows[0]["question"]))))])]
    targets = rows[0]["target_instances"]
    found = read_instances(tiny_data.parent / "raw/annotations.zip", {n for one in targets for n in one})
    assert any(targets)
    for n, wanted in enumerate(targets):
        mask = np.logical_or.reduce([found[i].mask() for i in wanted]) if wanted else np.zeros((32, 32))
        expected = mask.astype(float).reshape(4, 8, 4, 8).mean(axis=(1, 3)).ravel()
        np.testing.assert_allclose(batch.coverage[n].numpy(), expected, atol=1e-6)


def test_without_a_grid_nothing_is_read_of_regions(tiny_data):
    batch = reader_of(tiny_data, grid=None)[BatchSpec(0, [Group(0, (0,))])]
    assert batch.coverage is None


def test_a_region_moves_with_its_image(tiny_data):
    """An image that is white where its region is, augmented as any image, stays bright (or dark) where that says."""
    black_beyond_the_edge = replace(VQADataModule(tiny_data, image_size=32).preprocessing, mean=(0.0, 0.0, 0.0))
    images = ImageReader(load_split(tiny_data, "train"), black_beyond_the_edge, "rand-m9-n2", region_grid=GRID)
    region = np.zeros((32, 32), dtype=np.uint8)
    region[4:20, 10:26] = 255
    still = region.reshape(4, 8, 4, 8).mean(axis=(1, 3)) / 255
    moved = 0
    for epoch in range(40):
        found = images._patch_shares(region / 255, images._key({"image_id": 7}, 0, epoch))
        with images._generators_kept():
            seed_generators(images.seed, epoch, 7)
            picture = images.augment(Image.merge("RGB", [Image.fromarray(region)] * 3))
        seen = np.asarray(picture.convert("L"), dtype=float).reshape(4, 8, 4, 8).mean(axis=(1, 3))
        if seen.std() < 1:
            continue  # colours that came out all alike
        assert abs(np.corrcoef(seen.ravel(), found.ravel())[0, 1]) > 0.9, epoch
        moved += not np.allclose(found, still, atol=0.02)
    assert moved > 10


def test_augmentation_leaves_the_same_images_with_and_without_regions(tiny_data):
    plan = BatchSpec(3, [Group(0, (0, 1)), Group(4, (0,))])
    with_regions = reader_of(tiny_data, rand_augment="rand-m9-n2")[plan]
    without = reader_of(tiny_data, grid=None, rand_augment="rand-m9-n2")[plan]
    assert torch.equal(with_regions.images, without.images)


# The control


@pytest.mark.parametrize("steered", [False, True])
def test_xi_that_is_fed_to_nothing_changes_nothing_and_learns(steered):
    """The control has a trained ξ and the answers of the plain ViT; a steered model's answers follow its ξ."""
    model = make_model(AbSTopDown() if steered else None)
    if not steered:
        torch.manual_seed(0)
        model = assemble(
            model.vision, model.text, lambda **_: model.fusion, lambda **_: model.head, unused_prior=True
        ).eval()
    images, ids = torch.randn(2, 3, 16, 16), torch.randint(5, 30, (2, 6))
    mask = torch.ones_like(ids)
    before = model(images, ids, mask)
    assert before.prior is not None
    z = model.vision.encode(images).tokens
    cosine = F.cosine_similarity(before.prior[:, None], z, dim=2).clamp(0, 1)
    torch.testing.assert_close(before.seen.token_weights, cosine)
    loss = RegionPriorLoss()(before.prior, z[:, 1:], None, torch.eye(4)[:2])
    loss.backward()
    assert float(model.prior.project.weight.grad.abs().sum()) > 0
    with torch.no_grad():
        model.prior.project.weight.mul_(-3)
        model.prior.project.bias.add_(1)
    after = model(images, ids, mask)
    assert torch.equal(after.logits, before.logits) != steered


def test_training_learns_regions_where_there_are_some_and_says_so(tiny_options, tmp_path):
    result = command(
        "vlabs.train", *tiny_options, "logger=csv", "model/topdown=none", "model.unused_prior=true",
        "task.token_prior_weight=0.5", "task.focus_prior_weight=0.5", "trainer.max_epochs=1",
        "data.rand_augment=rand-m9-n2", "callbacks.grounding.maps=[weights]", *LOOKS, "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "training texts have a region, so its weight is 1" in result.stdout + result.stderr
    logged = {key: float(value) for row in metrics_of(tmp_path / "run") for key, value in row.items() if value}
    assert logged["train/region_prior_loss"] > 0
    assert logged["train/token_prior_loss"] > 0
    assert logged["train/focus_prior_loss"] > 0
    assert logged["val/grounding/weights_energy"] > 0


def make_task(**options):
    model = make_model(AbSTopDown())
    return VQATask(model, Preprocessing(16, ""), {}, Recipe(), **options)


def set_up(task, known, phrases=0):
    """What Lightning does before training; what the task wants of such data."""
    data = SimpleNamespace(regions_known=known, phrases_known=phrases, val_split="val", answer_types=lambda split: [])
    task._trainer = SimpleNamespace(datamodule=data, is_global_zero=True)
    wants = task.wants(data)
    task.setup("fit")
    return wants


def test_the_prior_loss_of_null_is_that_of_the_paper():
    assert make_task(prior_loss=None).prior_loss is not None
    assert make_task(prior_loss=None, prior_weight=0.0).prior_loss is None


def test_the_weight_is_off_where_the_data_have_no_regions(capsys):
    task = make_task(region_prior_weight=0.5)
    assert set_up(task, known=0).region_grid is None
    assert task.region_prior_weight == 0
    assert "the data have no regions, so its weight is 0" in "".join(capsys.readouterr())
    task = make_task(region_prior_weight=0.5)
    assert set_up(task, known=7).region_grid == (2, 2)
    assert task.region_prior_weight == 0.5


def test_several_priors_that_no_region_tells_apart_are_named(capsys, monkeypatch):
    for priors, phrases, said in ((1, 0, False), (2, 0, True), (2, 3, False)):
        task = make_task(region_prior_weight=0.5)
        monkeypatch.setattr(type(task.model), "prior_count", priors)
        set_up(task, known=7, phrases=phrases)
        told = "".join(capsys.readouterr())
        assert (f"model.prior_count={priors}: no region tells the phrases of its text apart" in told) == said


def test_the_focus_loss_is_refused_without_regions_or_images():
    task = make_task(focus_prior_weight=1.0, region_prior_weight=0)
    with pytest.raises(UserError, match=r"task.focus_prior_weight needs regions, which data does not have"):
        task.wants(SimpleNamespace(regions_known=0, dir="data"))
    assert task.wants(SimpleNamespace(regions_known=1)).region_grid == (2, 2)
    task.store = "store"
    with pytest.raises(UserError, match="which task.store does not read"):
        task.wants(SimpleNamespace(regions_known=1))


def make_control(several=None, **options):
    """A task whose model feeds ξ to nothing."""
    model = make_model(None, several={"unused_prior": True, **(several or {})})
    return VQATask(model, Preprocessing(16, ""), {}, Recipe(), **options)


def test_a_model_without_xi_asks_for_no_regions():
    task = make_control({"unused_prior": False}, region_prior_weight=1.0)
    assert set_up(task, known=7).region_grid is None


@pytest.mark.parametrize(
    ("several", "options", "trained"),
    [
        ({}, {}, False),
        ({}, {"focus_prior_weight": 1.0}, True),
        ({}, {"token_prior_weight": 1.0}, True),
        ({}, {"prior_bottom_up_weight": 1.0}, True),
        ({"prior_count": 2}, {}, True),  # kept apart
        ({"pool_heads": 2}, {}, True),
        ({"pool_heads": 2}, {"pool_prior_weight": 0.0}, False),
        ({"prior_tokens": True}, {}, True),  # the fusion reads them
    ],
)
def test_xi_is_frozen_only_where_no_loss_and_no_part_reads_it(several, options, trained):
    task = make_control(several, region_prior_weight=0.0, **options)
    assert task.model.prior.project.bias.requires_grad == trained


@pytest.mark.parametrize(
    ("topdown", "options", "prior", "head"),
    [
        (AbSTopDown, {}, True, None),
        (CrossAttention, {}, False, None),
        (CrossAttention, {"prior_weight": 1.0}, True, None),
        (CrossAttention, {"region_prior_weight": 1.0}, True, None),
        (QAViT, {}, False, None),
        (partial(CrossAttention, points="head"), {}, False, False),
        (partial(CrossAttention, points="head"), {"prior_weight": 1.0}, True, False),
        (partial(CrossAttention, points="head"), {"region_prior_weight": 1.0}, False, True),
    ],
)
def test_what_no_gradient_reaches_is_frozen_where_all_words_steer(topdown, options, prior, head):
    model = make_model(topdown())
    off = {"prior_weight": 0.0, "region_prior_weight": 0.0, "alive_prior_weight": 0.0}
    VQATask(model, Preprocessing(16, ""), {}, Recipe(), **(off | options))
    assert {one.requires_grad for one in model.prior.parameters()} == {prior}
    if head is not None:
        assert {one.requires_grad for one in model.vision.topdown.head.parameters()} == {head}
    # What is said of the variant is so: the answers' gradient reaches ξ, or does not.
    model.requires_grad_(True)
    ids = torch.randint(5, 30, (2, 6))
    model(torch.randn(2, 3, 16, 16), ids, torch.ones_like(ids)).logits.sum().backward()
    assert any(one.grad is not None for one in model.prior.parameters()) == model.vision.topdown.learns_prior


def test_the_focus_loss_of_no_xi_is_refused():
    with pytest.raises(UserError, match="task.focus_prior_weight=1 teaches ξ, which this model/topdown does not have"):
        make_control({"unused_prior": False}, focus_prior_weight=1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, []),
        ({"overlap_prior_weight": 5.0}, ["task.overlap_prior_weight=5 has no effect: a text has one ξ"]),
        ({"token_prior_weight": 1.0}, ["task.token_prior_weight=1 has no effect: this model/topdown has no ξ"]),
        (
            {"prior_weight": 0.5, "pool_prior_weight": 2.0},
            ["task.prior_weight=0.5 has", "task.pool_prior_weight=2 has"],
        ),
        ({"overlap_prior_weight": 0.0, "harmonizer_weight": 0.0}, []),
        (
            {"reconstruction_weight": 3.0},
            ["task.reconstruction_weight=3 has no effect: this model/topdown feeds nothing"],
        ),
        ({"focus_prior_floor": 0.2}, ["task.focus_prior_floor=0.2 has no effect: task.focus_prior_weight=0"]),
        ({"harmonizer_weight": 3.0}, ["task.harmonizer_weight=3 has no effect: there are no maps (task.human_maps)"]),
    ],
)
def test_a_weight_without_effect_is_said_unless_it_is_the_default(options, said, capsys):
    set_up(make_control({"unused_prior": False}, **options), known=7)
    told = "".join(capsys.readouterr())
    assert told.count("has no effect") == len(said)
    assert all(one in told for one in said)


@pytest.mark.parametrize(
    "option",
    [
        {"region_prior_weight": -1.0},
        {"token_prior_weight": float("nan")},
        {"region_prior_temperature": 0},
        {"token_prior_temperature": "hot"},
        {"alive_prior_margin": 2},
    ],
)
def test_a_weight_or_temperature_out_of_range_is_named(option):
    with pytest.raises(UserError, match=f"task.{next(iter(option))}="):
        make_task(**option)


@pytest.mark.parametrize(("dead", "warned"), [([100.0, 0, 100], True), ([100.0, 0, 0], False)])
def test_an_epoch_in_which_most_texts_steer_nothing_is_warned_of_once(dead, warned, capsys):
    task = make_task(alive_prior_weight=0.25)
    for expected in (warned, False):
        task.dead.update(torch.tensor(dead))
        task.on_train_epoch_end()
        said = "".join(capsys.readouterr())
        assert ("for 67% of this epoch's texts" in said and "which is 0.25" in said) == expected


@pytest.mark.parametrize(("given", "without_regions", "with_regions"), [(None, 1, 0), (0.25, 0.25, 0.25), (0, 0, 0)])
def test_xi_is_kept_alive_by_default_where_no_text_has_a_region(given, without_regions, with_regions):
    for known, expected in ((0, without_regions), (7, with_regions)):
        task = make_task(region_prior_weight=1.0, alive_prior_weight=given)
        set_up(task, known=known)
        assert task.alive_prior_weight == expected
    assert make_task(alive_prior_weight=given).alive_prior_weight == without_regions


# Where people looked


def halved_plainly(image):
    """Every second pixel after the filter (1 4 6 4 1)² / 256, where zeros lie beyond the edge, as TensorFlow's SAME."""
    height, width = image.shape
    out = np.zeros(((height + 1) // 2, (width + 1) // 2))
    up, left = (max(0, 2 * ((side + 1) // 2 - 1) + 5 - side) // 2 for side in image.shape)
    taps = np.array([1, 4, 6, 4, 1]) / 16
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            for a in range(5):
                for b in range(5):
                    y, x = 2 * r + a - up, 2 * c + b - left
                    if 0 <= y < height and 0 <= x < width:
                        out[r, c] += taps[a] * taps[b] * image[y, x]
    return out


def test_the_harmonizer_loss_is_its_recipe_on_a_pyramid_of_five_levels():
    rng = np.random.default_rng(0)
    saliency, human = rng.normal(size=(3, 17, 20)), rng.random((3, 17, 20)) ** 4
    human[1] = 0  # nobody was asked
    expected = []
    for n in (0, 2):
        a, b = ((one - one.mean()) / (one.std() + 1e-5) for one in (saliency[n], human[n]))
        a, b = np.maximum(a, 0), np.maximum(b, 0)
        b = b / (b.max() + 1e-6) * (a.max() + 1e-6)
        for _ in range(5):
            expected.append(((a - b) ** 2).mean())
            a, b = halved_plainly(a), halved_plainly(b)
    found = harmonizer_loss(torch.tensor(saliency), torch.tensor(human))
    assert float(found) == pytest.approx(sum(expected) / 5 / 3)
    flat = torch.zeros(1, 8, 8, requires_grad=True)
    harmonizer_loss(flat, torch.rand(1, 8, 8)).backward()
    assert torch.isfinite(flat.grad).all()


def test_a_map_on_which_nobody_looked_anywhere_is_named(tmp_path):
    (tmp_path / "hat").mkdir()
    for name, value in {"7_1": 0, "7_2": 90, "8_1": 0}.items():
        Image.new("L", (6, 4), value).save(tmp_path / f"hat/{name}.png")
    Image.fromarray(np.eye(4, 6, dtype=np.uint8) * 255).save(tmp_path / "hat/8_2.png")
    looked = People(list_hat(tmp_path / "hat"))
    assert looked(9) is None
    assert looked(8).max() == 0.5
    with pytest.raises(UserError, match=r"7_2.png: the map of question 7 is the same everywhere"):
        looked(7)


def test_a_map_that_is_the_same_everywhere_draws_nothing():
    assert float(harmonizer_loss(torch.rand(1, 8, 8), torch.full((1, 8, 8), 0.5))) == 0


def test_no_weight_needs_no_second_backward_pass():
    task = make_task(human_maps="nowhere", harmonizer_weight=0.0, recompute_activations=True)
    assert set_up(task, known=0).human_map is None


def test_training_draws_the_gradient_of_the_right_answers_to_where_people_looked(monkeypatch):
    task = make_task(human_maps="hat", harmonizer_weight=2.0, alive_prior_weight=0).train()
    task.log = lambda *_, **__: None
    task.model.eval()
    answers = task.model.head.num_answers
    images, human = torch.randn(3, 3, 16, 16), torch.rand(3, 16, 16)
    ids, mask, targets = torch.randint(5, 30, (3, 6)), torch.ones(3, 6, dtype=torch.int64), torch.rand(3, answers)
    batch = VQABatch(images, ids, mask, None, torch.arange(3), targets, None, [1, 2, 3], [], [], [], [], [], human)
    found = task.losses(batch).others["harmonizer"]
    maps = []
    for n in range(3):
        pixels = images[n : n + 1].detach().clone().requires_grad_()
        (task.model(pixels, ids[n : n + 1], mask[n : n + 1]).logits[0] @ targets[n]).backward()
        maps.append(pixels.grad[0].mean(dim=0))
    torch.testing.assert_close(found, harmonizer_loss(torch.stack(maps), human), rtol=1e-3, atol=1e-5)
    found.backward()
    trained = task.model.vision.vit.blocks[0].attn.qkv.weight.grad
    assert trained.abs().sum() > 0
    assert "harmonizer" not in task.eval().losses(batch).others


def test_a_model_trains_on_vqa_hats_files(tiny_options, tiny_data, tmp_path, in_process):
    """`QUESTION_NUMBER.png` in `vqahat_train`, of the size of the image, several people for a question."""
    (tmp_path / "vqahat_train").mkdir()
    rng, rows, maps = np.random.default_rng(0), load_split(tiny_data, "train"), {}
    for row in rows:
        for question_id in row["question_id"][:2]:
            maps[question_id] = rng.integers(0, 256, (2, 64, 64), dtype=np.uint8)
            for person, pixels in enumerate(maps[question_id], 1):
                Image.fromarray(pixels).save(tmp_path / f"vqahat_train/{question_id}_{person}.png")
    options = [*tiny_options, "logger=csv", "task.human_maps=vqahat_train", "callbacks.grounding=null"]
    alone = ["data.questions_per_image=1", "data.rand_augment=null", "data.batch_size=16", "trainer.max_epochs=1"]
    result = in_process("vlabs.train", [*options, *alone, "callbacks.predictions=null", "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "people looked for 80 of 320 training questions" in result.stdout + result.stderr
    assert any(float(row["train/harmonizer_loss"] or 0) > 0 for row in metrics_of(tmp_path / "run"))
    data = VQADataModule(tiny_data, image_size=32, num_workers=0)
    task = make_task(human_maps=str(tmp_path / "vqahat_train"))
    data.wants = task.wants(data)
    asked = [n for n, one in enumerate(rows[3]["question_id"])]
    batch = data.dataset(rows, data.image_reader(rows, True))[BatchSpec(0, [Group(3, tuple(asked))])]
    for question_id, found in zip(rows[3]["question_id"], batch.human, strict=True):
        looked = maps[question_id].mean(axis=0) / 255 if question_id in maps else np.zeros((64, 64))
        np.testing.assert_allclose(found, looked.reshape(32, 2, 32, 2).mean(axis=(1, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["data.questions_per_image=2"], ["task.human_maps=hat", "data.questions_per_image=1"]),
        (["data.rand_augment=rand-m9-n2"], ["task.human_maps=hat", "data.rand_augment=null"]),
        (["data.blind=true"], ["task.human_maps=hat", "data.blind=false"]),
        (["task.recompute_activations=true"], ["task.human_maps", "task.recompute_activations"]),
        ([], ["task.human_maps=hat has no map of a training question", "VQA v1"]),
        (["task.human_maps=nowhere"], ["task.human_maps=nowhere: there is no folder nowhere", "vqahat_val"]),
    ],
)
def test_what_harmonizer_cannot_train_on_is_one_line(options, parts, tiny_options, tmp_path, in_process):
    (tmp_path / "hat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "hat/999999999_1.png")
    given = [*tiny_options, "task.human_maps=hat", "data.questions_per_image=1", "data.rand_augment=null", *options]
    result = in_process("vlabs.train", [*given, "hydra.run.dir=run"], tmp_path)
    assert_one_line_error(result, *parts)
    assert "train: vqa" not in result.stdout + result.stderr  # nothing has begun
