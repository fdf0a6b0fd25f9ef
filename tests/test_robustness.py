"""Corruption errors by hand, attacks against a model whose worst case is known, and the command line."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error
from PIL import Image
from test_classify import TINY, command, objects, picture, run  # noqa: F401  (fixtures)

from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.corruptions import CorruptedDataset
from vlabs.data.images import read_bytes
from vlabs.data.prepared import load_split, read_classes
from vlabs.data.sampling import BatchSpec, Group
from vlabs.errors import UserError
from vlabs.evaluate import numbers_of
from vlabs.evaluation.robustness import RobustnessEvaluation
from vlabs.metrics.robustness import ALEXNET_ERRORS, CORRUPTIONS, fgsm, mean_corruption_error, pgd


def test_mce_is_the_mean_of_errors_over_alexnets():
    assert mean_corruption_error({name: dict.fromkeys(range(1, 6), e) for name, e in ALEXNET_ERRORS.items()}) == 100
    errors = {name: dict.fromkeys(range(1, 6), 0.0) for name in CORRUPTIONS}
    errors["fog"] = {1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4, 5: 0.5}
    errors["snow"] = dict.fromkeys(range(1, 6), 0.866816)
    assert mean_corruption_error(errors) == pytest.approx(100 * (0.3 / 0.819324 + 1) / 15)
    rounded = [88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7]
    assert [round(100 * error, 1) for error in ALEXNET_ERRORS.values()] == pytest.approx(rounded, abs=0.11)
    del errors["fog"][3]
    with pytest.raises(ValueError, match="fog is not whole"):
        mean_corruption_error(errors)


@pytest.fixture
def linear():
    """Two classes, the difference of whose logits is linear in the pixels; where every pixel must go is known."""
    torch.manual_seed(0)
    weight = torch.randn(3 * 4 * 4).double()
    pixels = torch.rand(5, 3, 4, 4).double()
    pixels[0, 0, 0] = torch.tensor([0.0, 1.0, 0.001, 0.999])  # at and near the edge of what a pixel can be

    def logits_of(x):
        score = (x.flatten(1) - 0.5) @ weight
        return torch.stack([score, -score], dim=1)

    labels = torch.tensor([0, 1, 0, 1, 0])
    away = torch.where(labels[:, None] == 0, -weight.sign(), weight.sign()).view_as(pixels)
    return logits_of, pixels, labels, away


@pytest.mark.parametrize("start", [None, 0, 1])
def test_pgd_finds_the_worst_case_of_a_linear_model(linear, start):
    logits_of, pixels, labels, away = linear
    generator = None if start is None else torch.Generator().manual_seed(start)
    moved = pgd(logits_of, pixels, labels, generator=generator)
    worst = (pixels + away / 255).clamp(0, 1)
    torch.testing.assert_close(moved, worst, rtol=0, atol=1e-9)


def test_fgsm_is_one_step_and_all_stays_valid(linear):
    logits_of, pixels, labels, away = linear
    moved = fgsm(logits_of, pixels, labels, 0.1)
    torch.testing.assert_close(moved, (pixels + 0.1 * away).clamp(0, 1), rtol=0, atol=1e-9)
    assert moved.min() >= 0
    assert moved.max() <= 1
    one = pgd(logits_of, pixels, labels, epsilon=1 / 255, step=0.5 / 255, steps=1)
    torch.testing.assert_close(one, (pixels + 0.5 / 255 * away).clamp(0, 1), rtol=0, atol=1e-9)


def test_corruptions_are_a_function_of_the_image_and_grow_with_severity(objects, run):  # noqa: F811
    pytest.importorskip("imagecorruptions")
    rows, preprocessing = load_split(objects, "val"), load_checkpoint(run).preprocessing
    spec = BatchSpec(0, [Group(n, (0,)) for n in range(4)])
    state = np.random.get_state()[1].tolist()

    def read(name, severity, seed=0):
        return CorruptedDataset(rows, preprocessing, name, severity, seed)[spec].images

    for name in ("gaussian_noise", "impulse_noise", "glass_blur"):
        assert torch.equal(read(name, 3), read(name, 3)), name
    assert not torch.equal(read("gaussian_noise", 3), read("gaussian_noise", 3, seed=1))
    assert np.random.get_state()[1].tolist() == state
    image = Image.open(io.BytesIO(read_bytes(rows[0]))).convert("RGB")
    clean = preprocessing.image(image)
    moved = [float((read("contrast", severity)[0] - clean).abs().mean()) for severity in range(1, 6)]
    assert moved == sorted(moved)


def test_robustness_is_measured_from_the_command_line(objects, run, in_process, tmp_path):  # noqa: F811
    pytest.importorskip("imagecorruptions")
    names = read_classes(objects)
    for name, color in zip(names[:2], ("red", "blue"), strict=True):
        for split in ("imagenet_c/fog/1", "imagenet_c/fog/2", "other"):
            (tmp_path / split / name).mkdir(parents=True)
            for number in (1, 2):
                (tmp_path / split / name / f"{number}.jpg").write_bytes(picture(color))
    options = ["task=robustness", f"ckpt={run}", "trainer.enable_progress_bar=false", "data.num_workers=0"]
    few = ["task.corruptions=[brightness,contrast]", "task.severities=[1,5]", "task.num_images=20"]
    result = in_process("vlabs.evaluate", [*options, *few, "+task.sets.o=other", "hydra.run.dir=out"], tmp_path)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(found["corruptions"]) == {"brightness", "contrast"}
    values = [value for one in found["corruptions"].values() for value in one.values()]
    assert found["corrupted"] == pytest.approx(np.mean(values))
    assert "mce" not in found
    assert found["pgd"] <= found["clean"]
    assert found["o"] in (0, 50, 100)
    assert (tmp_path / "out/figures/severities.png").is_file()
    logged = numbers_of(found, "val/")
    assert logged["val/corruptions/contrast/5"] == found["corruptions"]["contrast"]["5"]
    assert logged["val/clean"] == found["clean"]
    assert "| FGSM " in (tmp_path / "out/robustness.md").read_text()
    given = ["task.imagenet_c=imagenet_c", "task.corruptions=[fog]", "task.severities=[1,2]", "task.attacks=[]"]
    result = in_process("vlabs.evaluate", [*options, *given, "hydra.run.dir=c"], tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "c/metrics.json").read_text())["corruptions_by"] == "imagenet-c"
    evaluation = RobustnessEvaluation(imagenet_c=str(tmp_path / "imagenet_c"), num_images=3)
    assert len(evaluation._corrupted("fog", 1, None, load_checkpoint(run), "error").rows) == 3  # of four
    missing = in_process("vlabs.evaluate", [*options, *given, "task.severities=[3]"], tmp_path)
    assert_one_line_error(missing, "has no fog/3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task.corruptions=[rain]", "task.corruptions names rain: choose of gaussian_noise"),
        ("task.severities=[6]", "task.severities=[6] must be a list, each item a whole number from 1 to 5"),
        ("task.attacks=[cw]", "must be a list, each item one of fgsm, pgd"),
        ("+task.sets.clean=other", "task.sets.clean: a metric has this name: give the set another one"),
        ("+task.sets.a=nowhere", "nowhere is neither a folder of class folders nor a .tar file"),
    ],
)
def test_wrong_options_are_one_line(override, message, run, in_process, tmp_path):  # noqa: F811
    options = ["task=robustness", f"ckpt={run}", "task.num_images=4", "trainer.enable_progress_bar=false"]
    quick = [] if "corruptions" in override else ["task.corruptions=[]"]
    assert_one_line_error(in_process("vlabs.evaluate", [*options, *quick, override], tmp_path), message)


def test_without_the_library_it_is_said_what_to_install(objects, run, monkeypatch, in_process, tmp_path):  # noqa: F811
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    result = in_process("vlabs.evaluate", ["task=robustness", f"ckpt={run}"], tmp_path)
    assert_one_line_error(result, "pip install 'vlabs[robustness]'")


@pytest.mark.parametrize("option", [{"severities": [1, 1]}, {"corruptions": ["fog", "fog"]}, {"attacks": ["pgd"] * 2}])
def test_nothing_is_measured_twice(option):
    with pytest.raises(UserError, match=f"task.{next(iter(option))}=.* none twice"):
        RobustnessEvaluation(**option)
