"""`make demo`, at the tiny size: every step, the image and the numbers it prints."""

import json

import datasets
from conftest import command
from PIL import Image

from vlabs.demo import three_questions


def test_demo_leaves_run_metrics_and_image(tiny_options, tiny_data, tmp_path):
    options = [option for option in tiny_options if not option.startswith("task=")]
    options += ["callbacks.predictions.every_n_validations=0", "init=null"]  # a model of another size than the start
    result = command("vlabs.demo", "--out", "demo", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(f"== {step}/4" in result.stdout for step in (1, 2, 3, 4))
    assert result.stdout.count("   took ") == 3
    metrics = json.loads((tmp_path / "demo/evaluation/metrics.json").read_text())
    assert f"not yes/no: {metrics['not_yes_no']:.1f}%" in result.stdout
    looked = json.loads((tmp_path / "demo/grounding/metrics.json").read_text())
    assert f"{looked['weights/energy']:.1f}% of the prior's map" in result.stdout
    assert f"a uniform map: {looked['area']:.1f}%" in result.stdout
    assert (tmp_path / "demo/run/checkpoints/best.ckpt").is_file()
    with Image.open(tmp_path / "demo/picture.png") as picture:
        assert picture.width > 2 * picture.height


def test_the_three_questions_are_the_first_about_three_objects_and_no_answer_is_looked_at():
    rows = datasets.Dataset.from_dict(
        {
            "image_id": [1, 2, 3],
            "target_instances": [
                [[10], [10], [11], [12, 13]],
                [[20], [21], [20], [22, 23], [22], [23]],
                [[30], [31], [32]],
            ],
            "answer_type": [["other"] * 4, ["number", "other", "other", "other", "other", "other"], ["other"] * 3],
        }
    )
    row, positions = three_questions(rows)
    assert (row["image_id"], positions) == (2, [1, 2, 4])
    assert three_questions(rows.select([0])) == (rows[0], [0, 2])


def test_demo_does_not_touch_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("ten years of work")
    result = command("vlabs.demo", "--out", "mine", cwd=tmp_path)
    assert result.returncode == 1
    assert (tmp_path / "mine/thesis.txt").read_text() == "ten years of work"
