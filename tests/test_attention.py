"""The paper's figures from the command line, and what they show."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vlabs.attention import __main__ as program
from vlabs.attention.figures import overlay
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.prepared import load_split
from vlabs.errors import run_cli


@pytest.fixture
def run(tiny_run, tiny_data, tmp_path, monkeypatch, capsys):
    """Run `python -m vlabs.attention` in this process, in a folder with two pictures."""
    for name, row in zip(("a.jpg", "b.jpg"), load_split(tiny_data, "val"), strict=False):
        (tmp_path / name).write_bytes(row["image"])
    monkeypatch.chdir(tmp_path)

    def start(*options, image=("a.jpg",), checkpoints=()):
        images = [part for name in image for part in ("--image", name)]
        named = [part for name in checkpoints or (str(tiny_run[0]),) for part in ("--ckpt", name)]
        monkeypatch.setattr(sys, "argv", ["attention", *named, *images, "--question", "what's red, here?", *options])
        try:
            run_cli(program.main)
        except SystemExit as stop:
            return stop.code, capsys.readouterr()
        return 0, capsys.readouterr()

    return start


@pytest.mark.parametrize(
    ("figure", "image", "extra"),
    [
        ("questions", ("a.jpg", "b.jpg"), ["--map", "rollout"]),
        ("pathway", ("a.jpg",), []),
        ("alpha", ("a.jpg",), ["--alpha", "1", "--alpha", "20"]),
        ("side-by-side", ("a.jpg", "b.jpg"), ["--map", "gradient"]),
        ("reconstruction", ("a.jpg",), []),
    ],
)
def test_every_figure_is_drawn(run, tmp_path, figure, image, extra):
    code, output = run("--figure", figure, "--out", "out.png", *extra, image=image)
    assert code == 0, output.err
    with Image.open(tmp_path / "out.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 10


def test_several_checkpoints_share_a_figure_and_it_can_be_svg(run, tiny_run, tmp_path):
    named = (f"first={tiny_run[0]}", f"second={tiny_run[0]}")
    code, output = run("--figure", "checkpoints", "--out", "out.svg", checkpoints=named)
    assert code == 0, output.err
    assert "<svg" in (tmp_path / "out.svg").read_text()


@pytest.mark.parametrize(
    ("options", "image", "part"),
    [
        (["--figure", "alpha"], ("a.jpg", "b.jpg"), "takes --image 1 times, not 2"),
        (["--figure", "side-by-side"], ("a.jpg",), "takes --image 2 times, not 1"),
        (["--out", "x.bmp"], ("a.jpg",), "name a .png or .svg file"),
        (["--question", " "], ("a.jpg",), "a --question is empty"),
        ([], ("nowhere.jpg",), "nowhere.jpg cannot be read"),
    ],
)
def test_wrong_options_are_one_line(run, options, image, part):
    code, output = run(*options, image=image)
    assert code == 1
    assert part in output.err.splitlines()[-1]


def test_one_scale_makes_equal_values_look_equal():
    picture = Image.new("RGB", (8, 8), (200, 200, 200))
    low, high = np.full((2, 2), 0.2), np.full((2, 2), 0.9)
    assert overlay(picture, high, scale=(0, 1)).mean() > overlay(picture, low, scale=(0, 1)).mean()
    assert np.array_equal(overlay(picture, low, scale=(0, 1)), overlay(picture, low * 2, scale=(0, 2)))


def test_the_first_top_down_signal_is_what_the_first_block_is_given(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    vision = model.vision
    with torch.no_grad():
        bottom_up = vision.encode(torch.randn(1, 3, 32, 32))
        prior = torch.randn(2, vision.width)
        signal = vision.topdown.signal(bottom_up.tokens, prior, bottom_up.prepared, None, vision.feedback)
        whole = vision.first_signal(bottom_up, prior)
        weight = vision.vit.blocks[0].attn.qkv.weight[-vision.width :]
        torch.testing.assert_close(whole @ weight.T, signal.value(0), atol=1e-5, rtol=1e-4)
