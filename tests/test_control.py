"""Classifiers that are asked for one class of an image: images of several objects, measures, and the figure."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY_MODEL, assert_one_line_error, command
from omegaconf import OmegaConf
from PIL import Image
from test_classify import TINY, objects  # noqa: F401  (a fixture)

from data_prep.scenes.objects import SIZES, draw_several, make_several
from vlabs.attention.classes import class_maps, look_for
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.classes import ClassDataModule
from vlabs.data.prepared import load_split
from vlabs.data.several import open_several, pairs, read_several
from vlabs.errors import UserError
from vlabs.evaluation.control import ControlEvaluation
from vlabs.evaluation.results import Setting
from vlabs.metrics.grounding import energy_inside, to_pixels
from vlabs.models.topdown import AbSTopDown, MaskAttention
from vlabs.models.variants.codebook import Codebook

TRAINER = {"_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "enable_progress_bar": False}


@pytest.fixture(scope="module")
def run(objects, tmp_path_factory):  # noqa: F811
    """A classifier of the mean token, a few steps old."""
    cwd = tmp_path_factory.mktemp("control")
    result = command(
        "vlabs.train", "task=classify", *TINY, f"data.dir={objects}", "model.vision.global_pool=avg",
        "trainer.max_epochs=1", "hydra.run.dir=run", cwd=cwd,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return cwd / "run"


def test_images_of_several_objects_are_a_function_of_the_seed_and_do_not_overlap():
    counts = set()
    for number in range(12):
        jpeg, labels, masks = draw_several("small", number, 0)
        assert (jpeg, labels) == draw_several("small", number, 0)[:2]
        assert jpeg != draw_several("small", number, 1)[0]
        assert len(set(labels)) == len(labels) == len(masks)
        assert max(np.sum(masks, axis=0).flatten()) == 1
        assert min(mask.sum() for mask in masks) > 40
        counts.add(len(labels))
    assert counts == {2, 3, 4}


def test_several_objects_are_read_as_the_model_sees_them(run, tmp_path):
    preprocessing = load_checkpoint(run).preprocessing
    make_several("tiny", tmp_path / "several", 6)
    marked = tmp_path / "several/instances.json"
    marked.write_text(marked.read_text(), encoding="utf-8-sig")  # a byte order mark, as some editors write
    shown = read_several(tmp_path / "several", preprocessing)
    for number, (path, by_class) in enumerate(shown):
        picture = open_several(path, by_class, preprocessing)
        _, labels, masks = draw_several("tiny", number, 0)
        assert picture.labels == labels
        assert [preprocessing.names[n].replace("_", " ") for n in labels] == [SIZES["tiny"].classes[n] for n in labels]
        for mask, own in zip(masks, picture.masks, strict=True):
            assert np.array_equal(mask, own)
    assert len(read_several(tmp_path / "several", preprocessing, 3)) == 3


def test_a_pair_is_two_classes_side_by_side(run, objects):  # noqa: F811
    preprocessing, rows = load_checkpoint(run).preprocessing, load_split(objects, "val")
    found = list(pairs(rows, preprocessing, 5, seed=3))
    again = list(pairs(rows, preprocessing, 5, seed=3))
    for picture, same in zip(found, again, strict=True):
        assert picture.labels == same.labels
        assert picture.labels[0] != picture.labels[1]
        left, right = picture.masks
        assert left.sum() == right.sum() == 16 * 16
        assert not (left & right).any()
        pixels = np.asarray(picture.image).astype(int)
        assert (abs(pixels[~(left | right)] - 127) == 0).all()
        assert abs(pixels[left] - 127).mean() > 1


@torch.no_grad()
def test_a_class_is_asked_for_by_its_row_of_the_last_layer(run):
    model = load_checkpoint(run).classifier
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = look_for(model, image, [4, 1], alpha=7.0)
    weight = model.encoder.vit.head.weight
    for n, label in enumerate((4, 1)):
        logits, before, seen = model(image, weight[label][None], alpha=7.0)
        torch.testing.assert_close(found.after[n], logits[0].softmax(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.before, before[0].softmax(-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.norm[n].flatten(), seen.hidden[0, 1:].norm(dim=-1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.weights[n].flatten(), seen.token_weights[0, 1:], rtol=1e-4, atol=1e-5)
    assert model.encoder.topdown.alpha == 1.0
    assert (found.norm[0] - found.norm[1]).abs().max() > 0


def test_maps_of_a_class_explain_its_own_logit_under_its_own_prior(run):
    model = load_checkpoint(run).classifier
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels, names = [4, 1], ["norm", "weights", "gradient"]
    _, maps = class_maps(model, image.expand(2, -1, -1, -1), names, labels, alpha=7.0)
    found = look_for(model, image, labels, alpha=7.0)
    torch.testing.assert_close(maps["norm"], found.norm, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps["weights"], found.weights, rtol=1e-4, atol=1e-5)
    for n, label in enumerate(labels):
        attention: list[torch.Tensor] = []
        logits, *_ = model(image, model.class_priors([label]), alpha=7.0, record=attention)
        gradient = torch.autograd.grad(logits[0, label], attention[-1])[0]
        plain = (gradient * attention[-1]).clamp(min=0).sum(dim=(0, 1, 2))[1:]
        torch.testing.assert_close(maps["gradient"][n].flatten(), plain, rtol=1e-3, atol=1e-6)


def test_control_is_measured_from_the_command_line(run, tmp_path, in_process):
    make_several("tiny", tmp_path / "several", 8)
    options = ["task=control", f"ckpt={run}", "task.several=several", "trainer.enable_progress_bar=false"]
    result = in_process("vlabs.evaluate", [*options, "task.num_images=6", "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    table = (tmp_path / "out/control.md").read_text()
    assert "6 images of several objects" in table
    assert table.strip() in result.stdout
    checkpoint = load_checkpoint(run)
    model, preprocessing = checkpoint.classifier, checkpoint.preprocessing
    energy, before, chosen = [], [], []
    for path, by_class in read_several(tmp_path / "several", preprocessing, 6):
        picture = open_several(path, by_class, preprocessing)
        of_picture = []
        for label, mask in zip(picture.labels, picture.masks, strict=True):
            found = look_for(model, preprocessing.normalize(picture.image)[None], [label], alpha=10.0)
            pixels = to_pixels(found.norm[0].numpy(), 32)
            best = max(picture.labels, key=lambda n: found.after[0, n])
            of_picture.append((energy_inside(pixels, mask), best == label))
            first = to_pixels(found.bottom_up.numpy(), 32)
            before.append((energy_inside(first, mask), 1 / len(picture.labels)))
        energy.append(np.mean([e for e, _ in of_picture]))
        chosen.append(np.mean([c for _, c in of_picture]))
    assert metrics["several/norm_energy/after"] == pytest.approx(100 * np.mean(energy), rel=1e-3)
    assert metrics["several/chosen/after"] == pytest.approx(100 * np.mean(chosen))
    low, high = metrics["several/norm_energy/after_interval"]
    assert low <= metrics["several/norm_energy/after"] <= high
    # Before anything is asked, one of an image's classes is the best of them, whichever is asked for.
    assert metrics["pairs/chosen/before"] == 50
    assert metrics["pairs/area"] == 25


def test_alpha_is_that_of_a_variant_that_has_one(run, objects, tmp_path):  # noqa: F811
    checkpoint, trainer = load_checkpoint(run), OmegaConf.create(TRAINER)
    data = ClassDataModule(objects, preprocessing=checkpoint.preprocessing, num_workers=0)

    def measured(variant, asked=None):
        encoder = checkpoint.classifier.encoder
        encoder.topdown = variant
        if variant is not None:
            variant.build(encoder.backbone, 1)
        return ControlEvaluation(alpha=asked, num_images=2).run(checkpoint, data, Setting("val", tmp_path, trainer))

    assert measured(AbSTopDown())["alpha"] == 10
    assert measured(AbSTopDown(), 3.0)["alpha"] == 3
    assert measured(Codebook())["alpha"] == 1
    assert "alpha" not in measured(MaskAttention())
    for variant, said in ((MaskAttention(), "has no α: leave it out"), (Codebook(), "Codebook mixes by α.* at most 1")):
        with pytest.raises(UserError, match=said):
            measured(variant, 3.0)


def test_the_figure_has_a_row_a_model_and_a_column_a_class(run, objects, tmp_path):  # noqa: F811
    (tmp_path / "a.png").unlink(missing_ok=True)
    for name, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 32), color).save(tmp_path / f"{name}.png")
    arguments = ["--figure", "control", "--ckpt", f"one={run}", "--ckpt", f"two={run}", "--class", "solid_star"]
    both = [*arguments, "--class", "solid_circle", "--image", "a.png", "--image", "b.png", "--out", "out.svg"]
    result = command("vlabs.attention", *both, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    svg = (tmp_path / "out.svg").read_text()
    for text in ("bottom-up", "solid star", "solid circle", "one", "two"):
        assert f"<!-- {text} -->" in svg
    assert "(relevance): " in svg
    wrong = command("vlabs.attention", *arguments, "--class", "cat", "--image", "a.png", cwd=tmp_path)
    assert_one_line_error(wrong, "--class cat", "solid_circle")


def test_images_that_cannot_be_used_are_named_and_nothing_is_written(run, tmp_path, in_process):
    options = ["task=control", f"ckpt={run}", "task.num_images=2", "trainer.enable_progress_bar=false"]
    wrong_size, cut_off = tmp_path / "wrong_size", tmp_path / "cut_off"
    make_several("tiny", wrong_size, 2)
    Image.new("RGB", (20, 20)).save(wrong_size / "000000.jpg")
    make_several("tiny", cut_off, 2)
    (cut_off / "000001.jpg").write_bytes((cut_off / "000001.jpg").read_bytes()[:300])
    for folder, *parts in ((wrong_size, "000000.jpg has 20x20 pixels", "32x32"), (cut_off, "000001.jpg")):
        result = in_process("vlabs.evaluate", [*options, f"task.several={folder}", "hydra.run.dir=out"], tmp_path)
        assert_one_line_error(result, *parts)
        assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["task.alpha=-1"], "task.alpha=-1"),
        (["task.num_images=1"], "task.num_images=1"),
        (["task.several=nowhere", "task.num_images=2"], "nowhere/instances.json cannot be read"),
    ],
)
def test_wrong_options_are_one_line(options, message, run, tmp_path, in_process):
    options = ["task=control", f"ckpt={run}", "trainer.enable_progress_bar=false", *options]
    assert_one_line_error(in_process("vlabs.evaluate", options, tmp_path), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not an instances file"),
        ('{"categories": [], "images": [], "annotations": [{"category_id": 1}]}', "is not an instances file"),
        ('{"categories": [{"id": 1, "name": "cat"}], "images": [{"id": 1, "file_name": "a", "width": 4, "height": 4}],'
         ' "annotations": [{"id": 1, "category_id": 1, "image_id": 1, "area": 1, "segmentation": []}]}',
         "no image shows two classes"),
    ],
)  # fmt: skip
def test_other_files_of_instances_are_one_line(content, message, run, tmp_path, in_process):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/instances.json").write_text(content)
    options = [
        "task=control",
        f"ckpt={run}",
        "task.several=s",
        "task.num_images=2",
        "trainer.enable_progress_bar=false",
    ]
    assert_one_line_error(in_process("vlabs.evaluate", options, tmp_path), message)


def test_a_model_is_what_its_option_says(tmp_path, tiny_data, in_process):
    """Encoders by name, at a size that trains in seconds, through the same command as every other."""
    options = ["task=vqa", "data=scenes", "data.size=tiny", f"data.dir={tiny_data}", "data.image_size=64",
               "data.batch_size=16", "data.num_workers=0", "trainer.max_epochs=1", "trainer.limit_train_batches=1",
               "trainer.limit_val_batches=1", "logger=csv", "trainer.enable_progress_bar=false",
               "model/vision=rvt_small", "+model.vision.widths=[16,32]", "+model.vision.depths=[1,1]",
               "+model.vision.heads=[2,2]", *TINY_MODEL[4:]]  # fmt: skip
    result = in_process("vlabs.train", [*options, "hydra.run.dir=run"], tmp_path)
    assert result.returncode == 0, result.stderr
    vision = load_checkpoint(tmp_path / "run").model.vision
    assert vision.grid_size == (2, 2)
    assert vision.decoders[1].unpool.weight.shape == (32, 16, 2, 2)
