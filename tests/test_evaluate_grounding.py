"""Grounding from the command line, and the maps that are measured."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error, command
from PIL import Image

from vlabs.attention.maps import MAPS, look
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.instances import crop_map, crop_mask, read_instances
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import decode_image
from vlabs.metrics.grounding import energy_inside, rank_correlation, read_hat, to_pixels


@pytest.fixture(scope="module")
def measured(tiny_run, tiny_data, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("grounding")
    result = command(
        "vlabs.evaluate", "task=grounding", f"ckpt={tiny_run[0]}", "split=val", "task.num_texts=30",
        f"task.instances={tiny_data.parent / 'raw/annotations.zip'}", "hydra.run.dir=out", cwd=cwd,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (cwd / "out/grounding.jsonl").read_text().splitlines()]
    return json.loads((cwd / "out/metrics.json").read_text()), records, result


def test_the_table_has_every_map_and_measure_with_an_interval_around_the_mean(measured):
    metrics, records, result = measured
    for name in MAPS:
        assert f"\n| {name} " in result.stdout
        for measure in ("energy", "pointing", "ap", "iou"):
            low, high = metrics[f"{name}/{measure}_interval"]
            mean = 100 * np.mean([record["maps"][name][measure] for record in records])
            assert metrics[f"{name}/{measure}"] == pytest.approx(mean)
            assert low <= mean <= high


def test_grounding_in_validation_is_what_evaluation_finds(tiny_run, tiny_data, tmp_path, in_process):
    run = tiny_run[0]
    result = in_process(
        "vlabs.evaluate",
        ["task=grounding", f"ckpt={run / 'checkpoints/last.ckpt'}", "split=val", "task.num_texts=30",
         f"task.instances={tiny_data.parent / 'raw/annotations.zip'}", "task.maps=[norm,fusion]", "hydra.run.dir=out"],
        tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out/metrics.json").read_text())
    logged = json.loads((run / "summary.json").read_text())["metrics"]
    for name in ("norm", "fusion"):
        assert logged[f"val/grounding/{name}_energy"] == pytest.approx(found[f"{name}/energy"], rel=1e-4)
    assert logged["val/grounding/area"] == pytest.approx(found["area"], rel=1e-4)


def test_a_record_is_what_the_map_and_the_mask_say(measured, tiny_run, tiny_data):
    _, records, _ = measured
    checkpoint = load_checkpoint(tiny_run[0])
    record = records[0]
    row = next(row for row in load_split(tiny_data, "val") if record["id"] in row["question_id"])
    position = row["question_id"].index(record["id"])
    targets = row["target_instances"][position]
    found = read_instances(tiny_data.parent / "raw/annotations.zip", targets)
    size = checkpoint.preprocessing.image_size
    mask = crop_mask(np.logical_or.reduce([found[n].mask() for n in targets]), size)
    image = checkpoint.preprocessing.image(decode_image(row["image"], "image"))[None]
    ids, attention = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids([record["text"]]))
    _, maps = look(checkpoint.model, image, ids, attention, ["norm"])
    energy = energy_inside(to_pixels(maps["norm"][0].numpy(), size), mask)
    assert record["maps"]["norm"]["energy"] == pytest.approx(float(energy), abs=1e-6)


def test_maps_of_recorded_attention_equal_their_definitions(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    image = torch.randn(1, 3, 32, 32)
    ids, mask = torch.randint(5, 50, (2, 6)), torch.ones(2, 6, dtype=torch.int64)
    attention = []
    written_out = model(image.expand(2, -1, -1, -1), ids, mask, record=attention)
    assert len(attention) == len(model.vision.vit.blocks)
    torch.testing.assert_close(attention[0].sum(-1), torch.ones_like(attention[0].sum(-1)))
    plain = model(image.expand(2, -1, -1, -1), ids, mask)
    torch.testing.assert_close(written_out.logits, plain.logits, atol=1e-5, rtol=1e-5)
    _, maps = look(model, image, ids, mask, MAPS)
    torch.testing.assert_close(maps["cls"].flatten(1), attention[-1].mean(1)[:, 0, 1:])
    rolled = torch.eye(attention[0].shape[-1])
    for weights in attention:
        rolled = ((weights.mean(1) + torch.eye(weights.shape[-1])) / 2) @ rolled
    torch.testing.assert_close(maps["rollout"].flatten(1), rolled[:, 0, 1:])
    for name in MAPS:
        assert (maps[name] >= 0).all()
        assert not maps[name].requires_grad


def test_a_text_has_the_same_maps_alone_as_beside_others(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    image = torch.randn(1, 3, 32, 32)
    ids, mask = torch.randint(5, 50, (3, 6)), torch.ones(3, 6, dtype=torch.int64)
    _, together = look(model, image, ids, mask, MAPS)
    for name in MAPS:
        _, alone = look(model, image, ids[1:2], mask[1:2], [name])
        torch.testing.assert_close(together[name][1:2], alone[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["task.maps=[norm,heat]"], ["heat", "fusion"]),
        (["task.instances=nowhere.zip"], ["nowhere.zip"]),
        (["task=grounds"], ["grounds", "choose one of classify, control, "]),
    ],
)
def test_wrong_options_are_one_line(options, parts, tiny_run, tiny_data, tmp_path, in_process):
    instances = f"task.instances={tiny_data.parent / 'raw/annotations.zip'}"
    group = [] if options[0].startswith("task=") else ["task=grounding", instances]
    result = in_process("vlabs.evaluate", [*group, f"ckpt={tiny_run[0]}", *options], tmp_path)
    assert_one_line_error(result, *parts)


@pytest.fixture(scope="module")
def people(tiny_data, tmp_path_factory):
    """Made-up human maps of six questions of val in VQA-HAT's form, two people each."""
    folder = tmp_path_factory.mktemp("hat")
    rows = load_split(tiny_data, "val")
    rng = np.random.default_rng(0)
    for row in (rows[0], rows[2]):
        for question_id in row["question_id"][:3]:
            for n in (1, 2):
                pixels = rng.integers(0, 256, (14, 14), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(folder / f"{question_id}_{n}.png")
    return folder


def test_maps_are_compared_with_where_people_looked(tiny_run, tiny_data, people, tmp_path):
    result = command(
        "vlabs.evaluate", "task=grounding", f"ckpt={tiny_run[0]}", "split=val", f"task.human_maps={people}",
        "task.maps=[norm,fusion]", "hydra.run.dir=out", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "out/grounding.jsonl").read_text().splitlines()]
    assert metrics["texts"] == len(records) == 6
    checkpoint = load_checkpoint(tiny_run[0])
    row = next(row for row in load_split(tiny_data, "val") if records[0]["id"] in row["question_id"])
    image = checkpoint.preprocessing.image(decode_image(row["image"], ""))
    ids, mask = checkpoint.preprocessing.pad(checkpoint.preprocessing.token_ids([records[0]["text"]]))
    _, maps = look(checkpoint.model, image[None], ids, mask, ["norm", "fusion"])
    (human,) = read_hat(people, {records[0]["id"]})
    expected = rank_correlation(maps["norm"][0].numpy(), crop_map(human.mean, 32))
    assert records[0]["maps"]["norm"] == pytest.approx(float(expected), abs=1e-5)
    mean = np.mean([record["maps"]["fusion"] for record in records])
    assert metrics["fusion/rank_correlation"] == pytest.approx(mean)
    assert "| fusion " in result.stdout


def test_human_maps_of_other_questions_are_one_line(tiny_run, tmp_path):
    (tmp_path / "hat").mkdir()
    Image.new("L", (14, 14)).save(tmp_path / "hat/1_1.png")
    options = ["task=grounding", f"ckpt={tiny_run[0]}", "split=val", "task.human_maps=hat"]
    assert_one_line_error(command("vlabs.evaluate", *options, cwd=tmp_path), "task.human_maps=hat", "VQA v1")
