"""Evaluation under another question's ξ and other strengths, against the model written out and against invariants."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, command

from vlabs.attention.maps import attention_map
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import decode_image
from vlabs.evaluation.grounding import find_targets
from vlabs.evaluation.judging import Scores
from vlabs.evaluation.steering import _measure, _pairs


@pytest.fixture(scope="module")
def steered(tiny_run, tmp_path_factory):
    """What the command measures and prints of the tiny run."""
    cwd = tmp_path_factory.mktemp("steering")
    result = command(
        "vlabs.evaluate", "task=steering", f"ckpt={tiny_run[0]}", "split=val", "task.alphas=[0,2]",
        "task.num_texts=null", "hydra.run.dir=out", cwd=cwd,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads((cwd / "out/metrics.json").read_text()), result


def test_without_feedback_it_does_not_matter_whose_xi_it_is(steered):
    metrics, result = steered
    for name in ("accuracy", "norm/own", "norm/other", "fusion/own", "fusion/other"):
        assert metrics[f"α=0/own/{name}"] == pytest.approx(metrics[f"α=0/other/{name}"], abs=1e-4)
    # The token weights follow ξ whatever its strength, and with it they do matter.
    assert metrics["α=0/own/weights/own"] == pytest.approx(metrics["α=10/own/weights/own"], abs=1e-4)
    assert metrics["α=0/own/weights/own"] != pytest.approx(metrics["α=0/other/weights/own"], abs=1e-4)
    assert "questions, under their own ξ" in result.stdout
    low, high = metrics["α=10/own/accuracy_interval"]
    assert low <= metrics["α=10/own/accuracy"] <= high


def test_pairs_are_about_different_parts_and_measured_as_the_model_says(tiny_run, tiny_data):
    checkpoint = load_checkpoint(tiny_run[0])
    model, preprocessing = checkpoint.model, checkpoint.preprocessing
    rows = load_split(tiny_data, "val")
    targets = find_targets(rows, tiny_data, None, None)
    images = _pairs(targets, preprocessing, None)
    for pairs in images:
        for pair in pairs:
            assert pair.own.row == pair.other.row
            assert not (pair.masks["own"] & pair.masks["other"]).any()
            assert set(pair.own.targets).isdisjoint(pair.other.targets)
    pairs = images[0]
    found = list(_measure(checkpoint, Scores(rows), pairs))
    pair, row = pairs[0], rows[pairs[0].own.row]
    image = preprocessing.image(decode_image(row["image"], "image"))[None]
    ids, mask = preprocessing.pad(preprocessing.token_ids([pair.own.text, pair.other.text]))
    for whose, n in (("own", 0), ("other", 1)):
        with torch.no_grad():
            states = model.text(ids, mask)
            output = model.join(
                model.vision.encode(image),
                model.prior(states, ids, mask)[n : n + 1],
                states[:1],
                mask[:1],
                read_image=True,
            )
        pixels = (
            torch.nn.functional.interpolate(
                attention_map(output, model.vision, "fusion")[None], size=image.shape[-1], mode="nearest"
            )[0, 0]
            .double()
            .numpy()
        )
        for whom in ("own", "other"):
            expected = 100 * pixels[pair.masks[whom]].sum() / pixels.sum()
            values = [row[f"fusion/{whom}"] for row in found if row["xi"] == whose]
            assert values[0] == pytest.approx(expected, rel=1e-4)
        answer = preprocessing.names[int(output.logits.argmax())]
        human = row["answers"][pair.own.position]
        official = np.mean([min(1, (human.count(answer) - (human[k] == answer)) / 3) for k in range(10)])
        accuracies = [row["accuracy"] for row in found if row["xi"] == whose]
        assert accuracies[0] == pytest.approx(100 * official, abs=0.01)


def test_what_texts_are_about_is_the_same_in_the_rows_and_in_cocos_instances(tiny_data):
    rows = load_split(tiny_data, "val")
    own = find_targets(rows, tiny_data, None, None)
    of_file = find_targets(rows, tiny_data, str(tiny_data.parent / "raw/annotations.zip"), None)
    assert own.instances is None
    assert own.asked == of_file.asked
    for item in own.asked:
        np.testing.assert_array_equal(own.region(item) > 0.5, of_file.region(item))
    assert find_targets(rows.remove_columns("region"), tiny_data, None, None) is None


def test_wrong_inputs_are_one_line(tiny_run, tmp_path, in_process):
    for options, part in (
        (["task.instances=nowhere.zip"], "nowhere.zip"),
        (["split=nowhere"], "nowhere"),
        (["task.alphas=[strong]"], "must be a list"),
        (["task.alphas=[-1]"], "task.alphas=[-1] must be a list"),
        (["task.num_texts=0"], "task.num_texts=0"),
    ):
        result = in_process("vlabs.evaluate", ["task=steering", f"ckpt={tiny_run[0]}", *options], tmp_path)
        assert_one_line_error(result, part)


def test_a_variant_that_mixes_by_alpha_is_not_measured_beyond(tiny_run, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("vlabs.models.topdown.AbSTopDown.most_alpha", 10.0)
    options = ["task=steering", f"ckpt={tiny_run[0]}", "task.num_texts=4", "task.alphas=[0,20]", "hydra.run.dir=out"]
    result = in_process("vlabs.evaluate", options, tmp_path)
    assert "α above 10 left out" in result.stdout, result.stderr
    assert {key.split("/")[0] for key in json.loads((tmp_path / "out/metrics.json").read_text()) if "α" in key} == {
        "α=0", "α=10",
    }  # fmt: skip
