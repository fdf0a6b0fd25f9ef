"""The paper's figures from the command line, and what they show."""

import io
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import vlabs
from vlabs.attention import __main__ as program
from vlabs.attention.figures import as_view, overlay
from vlabs.attention.maps import look_by
from vlabs.attention.pictures import alpha_figure
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.decoding import as_shown
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError, run_cli


@pytest.fixture
def run(tiny_run, tiny_data, tmp_path, monkeypatch, capsys):
    """Run `vlabs attention` in this process, in a folder with two images."""
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
        (["--figure", "pathway", "--map", "norm"], ("a.jpg",), "--map is read by --figure questions, alpha, side-by"),
        (["--alpha", "2"], ("a.jpg",), "--alpha is read by --figure alpha, control, not by --figure questions"),
        (["--figure", "alpha", "--class", "star"], ("a.jpg",), "--class is read by --figure control, not by"),
        (["--data", "nowhere"], ("a.jpg",), "--data is read by --figure reconstruction, not by --figure questions"),
        (["--figure", "control"], ("a.jpg",), "--question is read by --figure questions, pathway,"),
        ([], ("nowhere.jpg",), "nowhere.jpg cannot be read"),
    ],
)
def test_wrong_options_are_one_line(run, options, image, part):
    code, output = run(*options, image=image)
    assert code == 1
    assert part in output.err.splitlines()[-1]


def test_one_scale_makes_equal_values_look_equal():
    view = as_view(Image.new("RGB", (500, 500), (200, 200, 200)))
    low, high = np.full((2, 2), 0.2), np.full((2, 2), 0.9)
    assert overlay(view, high, scale=(0, 1)).mean() > overlay(view, low, scale=(0, 1)).mean()
    assert np.array_equal(overlay(view, low, scale=(0, 1)), overlay(view, low * 2, scale=(0, 2)))


@pytest.mark.parametrize("crop", [1.0, 0.5])
@pytest.mark.parametrize("size", [(4000, 1000), (300, 900), (40, 30), (150, 1000), (640, 640)])
def test_a_map_lies_where_the_model_saw_it_in_the_whole_image(size, crop):
    # The right lower quarter of what the model sees is white; its map, taken from its input, has to lie there.
    preprocessing = Preprocessing(32, "", crop=crop)
    left, top, right, bottom = preprocessing.box(size)
    white = Image.new("L", size)
    white.paste(255, (round((left + right) / 2), round((top + bottom) / 2), round(right), round(bottom)))
    seen = np.asarray(preprocessing.resize(white.convert("RGB")))[..., 0]
    view = as_view(Image.new("RGB", size, (120, 120, 120)), preprocessing.box(size))
    assert 448 <= max(view.image.size) <= 1024
    assert view.image.height == max(1, round(view.image.width * size[1] / size[0]))
    drawn = overlay(view, seen.reshape(4, 8, 4, 8).mean(axis=(1, 3)))
    assert drawn.shape[1::-1] == view.image.size
    x, y = ((0.15 * view.box[n] + 0.85 * view.box[n + 2]) for n in range(2))
    other = 0.85 * view.box[0] + 0.15 * view.box[2]
    assert drawn[int(y), int(x)].mean() > 1.5 * drawn[int(y), int(other)].mean()
    outside = [drawn[:, 0], drawn[0], drawn[:, -1], drawn[-1]] if crop < 1 else []
    assert all(edge.min() > 180 for edge in outside)  # pale


def test_many_models_are_several_rows_of_a_figure(tiny_run):
    from PIL import Image

    from vlabs.attention.pictures import checkpoints_figure
    from vlabs.checkpoints.checkpoint import load_checkpoint

    named = [(f"model {n}", load_checkpoint(tiny_run[0])) for n in range(8)]
    figure = checkpoints_figure(named, Image.new("RGB", (40, 40), "red"), ["What is it?", "Is it red?"], "fusion")
    drawn = [[axis.get_title() for axis in part.axes if axis.get_visible()] for part in figure.subfigs[:-1]]
    first = ["image", *(f"model {n}" for n in range(5))]
    assert drawn == [first, ["model 5", "model 6", "model 7"]] * 2
    assert [part._suptitle and part._suptitle.get_text() for part in figure.subfigs[:-1]] == [
        "What is it?", None, "Is it red?", None,
    ]  # fmt: skip


@pytest.mark.parametrize(("most", "titles"), [(1.0, ["α = 1"]), (3.0, ["α = 1", "α = 3"])])
def test_the_usual_strengths_are_those_that_a_variant_can_have(most, titles, tiny_run, monkeypatch):
    monkeypatch.setattr("vlabs.models.topdown.AbSTopDown.most_alpha", most)
    given = load_checkpoint(tiny_run[0]), Image.new("RGB", (40, 40), "red"), ["What is it?"]
    figure = alpha_figure(*given, None, "fusion")
    drawn = [axis.get_title() for part in figure.subfigs[:-1] for axis in part.axes if axis.get_visible()]
    assert drawn == ["image", *titles]
    with pytest.raises(UserError, match=f"alpha 10: AbSTopDown mixes by α, which is at most {most:g}"):
        alpha_figure(*given, [10.0], "fusion")


def test_a_question_whose_prior_is_like_no_patch_says_so_and_shows_another_map(tiny_run, tiny_data, monkeypatch):
    predictor = vlabs.load(tiny_run[0])
    picture = Image.open(io.BytesIO(load_split(tiny_data, "val")[0]["image"]))
    asked = ["What color is the square?", "Which color is the zebra?"]
    before = predictor.answer(picture, asked)
    real = predictor.model.prior.forward

    def dead(states, *tokens):
        prior = real(states, *tokens)
        z = predictor.model.vision.encode(predictor.preprocessing.image(as_shown(picture))[None]).tokens[0]
        prior[1] = -z.mean(dim=0) * 100
        return prior

    monkeypatch.setattr(predictor.model.prior, "forward", dead)
    alive, other = predictor.answer(picture, asked)
    assert (alive.map_name, alive.steers) == (before[0].map_name, before[0].steers)
    assert (other.map_name, other.steers) == ("normgrad", False)
    assert other.map.any()
    assert other.warnings == [
        "its training never had: zebra",
        "this question does not steer: its ξ is not similar to any patch; the map is normgrad",
    ]
    assert not alive.new_words


def test_token_weights_of_a_model_without_a_prior_are_not_drawn(tiny_run):
    model = load_checkpoint(tiny_run[0]).model
    model.prior = None
    given = torch.zeros(1, 3, 32, 32), torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(UserError, match="weights needs a ξ"):
        look_by(model, *given, "weights")


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
