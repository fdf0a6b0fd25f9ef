"""`make demo`, at the tiny size: every step, the picture and the numbers it prints."""

import json

from conftest import command
from PIL import Image


def test_demo_leaves_run_metrics_and_picture(tiny_options, tiny_data, tmp_path):
    options = [option for option in tiny_options if not option.startswith("task=")]
    result = command("vlabs.demo", "--out", "demo", *options, "predictions.every_n_validations=0", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all(f"== {step}/3" in result.stdout for step in (1, 2, 3))
    assert result.stdout.count("   took ") == 2
    metrics = json.loads((tmp_path / "demo/evaluation/metrics.json").read_text())
    assert f"not yes/no: {metrics['not_yes_no']:.1f}%" in result.stdout
    assert (tmp_path / "demo/run/checkpoints/best.ckpt").is_file()
    with Image.open(tmp_path / "demo/picture.png") as picture:
        assert picture.width > 2 * picture.height


def test_demo_does_not_touch_a_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("ten years of work")
    result = command("vlabs.demo", "--out", "mine", cwd=tmp_path)
    assert result.returncode == 1
    assert (tmp_path / "mine/thesis.txt").read_text() == "ten years of work"
