"""Visual search: the rank of a target among other objects, by where the model looks."""

import json

import numpy as np
import pytest
import torch
from conftest import assert_one_line_error

from data_prep.scenes.displays import draw_display
from data_prep.scenes.render import COLORS
from vlabs.data.embedded import search_displays
from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError
from vlabs.evaluation import asymmetry
from vlabs.evaluation.asymmetry import rank_of_first


@pytest.mark.parametrize(
    ("values", "rank"), [([3, 1, 2], 1), ([1, 3, 2], 3), ([2, 2, 2], 2), ([0, 0], 1.5), ([5, 5, 9, 1], 2.5)]
)
def test_the_rank_counts_what_is_larger_and_half_of_what_is_equal(values, rank):
    assert rank_of_first(values) == rank


def test_a_display_is_a_function_of_its_seed_and_has_the_target_first():
    image, masks = draw_display("small", "striped red circle", "green square", 6, "0")
    assert np.array_equal(image, draw_display("small", "striped red circle", "green square", 6, "0")[0])
    assert not np.array_equal(image, draw_display("small", "striped red circle", "green square", 6, "1")[0])
    assert len(masks) == 7
    assert np.sum(masks, axis=0).max() == 1  # they do not overlap
    means = [np.asarray(image)[mask].mean(axis=0) for mask in masks]
    red, green = (np.linalg.norm(np.array(means) - COLORS[name], axis=1) for name in ("red", "green"))
    assert (red < green).tolist() == [True] + 6 * [False]


@pytest.mark.parametrize(
    ("phrases", "others", "part"),
    [
        (("red blob", "red circle"), 1, "'red blob' must name a color and a shape, .* but 'blob' is none"),
        (("small red circle", "red circle"), 1, "but 'small' is none"),
        (("red blue circle", "red circle"), 1, "but 'blue' is a second color"),
        (("red", "red circle"), 1, "'red' must name a color and a shape"),
        (("red circle", "red square"), 60, "61 objects find no room"),
    ],
)
def test_a_display_that_cannot_be_drawn_is_one_line(phrases, others, part):
    with pytest.raises(UserError, match=part):
        list(search_displays("small", *phrases, others, 1))


def test_a_map_on_the_target_ranks_it_first_and_a_map_beside_it_last(tiny_run, tmp_path, in_process, monkeypatch):
    def maps(output, vision, name):
        target = next(targets) if name == "weights" else None
        kept.append(target) if target is not None else None
        return target if target is not None else 1 - kept[-1]

    both = [("red circle", "red square"), ("red square", "red circle")]
    targets, kept = iter([drawn(*about) for about in both]), []
    monkeypatch.setattr(asymmetry, "attention_map", maps)
    options = ["task=asymmetry", f"ckpt={tiny_run[0]}", "task.size=tiny", "task.others=[2]", "task.images=3"]
    result = in_process(
        "vlabs.evaluate", [*options, "task.pairs=[[red circle,red square]]", "hydra.run.dir=out"], tmp_path
    )
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["weights/2/rank"], metrics["weights/2/first"]) == (1, 100)
    assert (metrics["fusion/2/rank"], metrics["fusion/2/first"], metrics["2/chance"]) == (3, 0, 2)
    assert metrics["weights/red circle/red square/2/rank"] == 1
    assert len((tmp_path / "out/asymmetry.jsonl").read_text().splitlines()) == 6


def drawn(target, other):
    """Maps of three displays, a pixel each, that are 1 on the target alone."""
    return torch.tensor(np.stack([masks[0] for _, masks in search_displays("tiny", target, other, 2, 3)])).float()


def test_the_model_is_asked_for_the_target(tiny_run, tmp_path, in_process, monkeypatch):
    asked = []
    pad = Preprocessing.token_ids
    monkeypatch.setattr(Preprocessing, "token_ids", lambda self, texts: (asked.extend(texts), pad(self, texts))[1])
    options = ["task=asymmetry", f"ckpt={tiny_run[0]}", "task.size=tiny", "task.others=[1]", "task.images=2"]
    given = ["task.prompt=is there a PHRASE?", "task.pairs=[[red circle,blue star]]", "hydra.run.dir=out"]
    assert in_process("vlabs.evaluate", [*options, *given], tmp_path).returncode == 0
    assert [text for text in asked if "there" in text] == ["is there a red circle?"] * 2 + ["is there a blue star?"] * 2


RED, BLUE = ["red circle", "red square"], ["blue star", "red star"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"pairs": [RED, ["small red circle", "red star"]]}, "'small' is none"),
        ({"pairs": [[1, 2]]}, "'1' must name a color and a shape"),
        ({"pairs": [[" ", ""]]}, "' ' must name a color and a shape"),
        ({"pairs": [["red circle", "circle solid red"]]}, "both name the same object"),
        ({"pairs": [RED, BLUE, RED[::-1]]}, "[red square, red circle] is there twice"),
        ({"others": [3, 3]}, "task.others=[3, 3] must be a list, .* none twice"),
        ({"maps": ["norm", "norm"]}, "task.maps=.* none twice"),
        ({"others": [1, 60]}, "61 objects find no room"),
    ],
)
def test_what_cannot_be_drawn_or_would_be_measured_twice_is_refused_before_anything_is_loaded(options, part):
    with pytest.raises(UserError, match=part.replace("[", r"\[")):
        asymmetry.AsymmetryEvaluation(**{"pairs": [RED], **options})


@pytest.mark.parametrize(
    ("option", "parts"),
    [
        ("task.prompt=where", ["task.prompt=where", "where the phrase goes"]),
        ("task.pairs=[[red circle]]", ["task.pairs", "two different phrases"]),
        ("task.pairs=[red circle]", ["task.pairs", "each item a list"]),
        ("task.pairs=[[red circle,red blob]]", ["'red blob' must name a color and a shape"]),
        ("task.maps=[rollout]", ["task.maps", "rollout", "weights, norm, fusion"]),
        ("task.others=[]", ["task.others=[]", "at least 1 of them"]),
        ("task.maps=[]", ["task.maps=[]", "at least 1 of them"]),
        ("task.others=[0]", ["task.others", "at least 1"]),
    ],
)
def test_a_wrong_option_is_one_line(option, parts, tiny_run, tmp_path, in_process):
    result = in_process("vlabs.evaluate", ["task=asymmetry", f"ckpt={tiny_run[0]}", option], tmp_path)
    assert_one_line_error(result, *parts)
