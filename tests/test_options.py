"""Options: declared once, in a signature and its docstring, and checked, explained and printed by that."""

import inspect
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
from annotated_types import MinLen
from conftest import assert_one_line_error
from omegaconf import OmegaConf

from vlabs.data.preprocessing import PICTURE_OPTIONS, Preprocessing
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError
from vlabs.runs import reference
from vlabs.runs.groups import choices, config_dir
from vlabs.tasks.base import Task
from vlabs.tasks.optim import Recipe
from vlabs.tasks.vqa import VQATask
from vlabs.utils.options import (
    Count,
    Distinct,
    NonNegative,
    Part,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    Size,
    Some,
    check_names,
    check_type,
    checked,
)

PAGE = Path(__file__).parent.parent / "docs" / "options.md"


@pytest.mark.parametrize(
    ("hint", "good", "bad", "words"),
    [
        (Count, [0, 3], [-1, 1.5, True, "2"], "a whole number, at least 0"),
        (Size | None, [None, 1], [0, False], "a whole number, at least 1, or null"),
        (Seed, [0, 2**32 - 1], [-1, 2**32], "a whole number from 0 to 4294967295"),
        (Share, [0, 0.5, 1], [-0.1, 1.1, "half"], "a number in [0, 1]"),
        (ShareBelowOne, [0.0], [1], "a number in [0, 1)"),
        (
            Part | list[Part],
            [1, [0.5, 1]],
            [0, [0.5, 2]],
            "a number in (0, 1], or a list, each item a number in (0, 1]",
        ),
        (Positive, [1e-9, 7], [0, None], "a number above 0"),
        (tuple[Size, Size], [[2, 3]], [2, [2], [0, 3]], "a list of 2, each a whole number, at least 1"),
        (Literal["a", "b"], ["a"], ["c", None], "one of a, b"),
        (
            Annotated[list[Size], MinLen(1)],
            [[1]],
            [[], [0]],
            "a list, each item a whole number, at least 1; at least 1 of them",
        ),
        (Distinct[Size], [[], [1, 2]], [[1, 1], [0]], "a list, each item a whole number, at least 1; none twice"),
        (Some[str], [["a"]], [[], ["a", "a"]], "a list, each item text; at least 1 of them, none twice"),
        (dict[str, NonNegative], [{"x": 0}], [1], "a group of options"),
    ],
)
def test_a_value_is_taken_where_its_annotation_allows_it(hint, good, bad, words):
    for value in (*good, "${data.size}"):
        check_type("x.y", value, hint)
    for value in bad:
        with pytest.raises(UserError, match="x.y=") as refused:
            check_type("x.y", value, hint)
        assert str(refused.value).endswith(f"must be {words}")


def test_a_number_is_text_where_the_annotation_has_text():
    @checked("x")
    def made(names: Some[str], name: str | None = None, sizes: Size | list[Size] = 1):
        return names, name, sizes

    assert made([1, "a"], 2.5, [3]) == (["1", "a"], "2.5", [3])
    assert made(["a"], None, 4) == (["a"], None, 4)


def test_a_dictionary_is_checked_by_what_it_holds():
    with pytest.raises(UserError, match=r"lr\.head=-1 must be a number, at least 0"):
        check_type("lr", {"head": -1}, dict[str, NonNegative])


def test_tasks_and_data_of_your_own_are_checked_by_their_annotations():
    class MyTask(Task):
        def __init__(self, strength: Share = 0.5) -> None:
            raise AssertionError("made")

    class MyData(VQADataModule):
        def __init__(self, *, rows: Size = 3) -> None:
            raise AssertionError("made")

    with pytest.raises(UserError, match=r"task\.strength=2 must be a number in \[0, 1\]"):
        MyTask(2)
    with pytest.raises(UserError, match=r"data\.rows=0 must be a whole number, at least 1"):
        MyData(rows=0)
    with pytest.raises(AssertionError, match="made"):
        MyTask(strength=1)


def test_a_function_keeps_its_signature_when_it_is_checked():
    @checked("of")
    def some(a: Size, b: Share = 0.5) -> tuple[int, float]:
        return a, b

    assert [*inspect.signature(some).parameters] == ["a", "b"]
    assert some(2) == (2, 0.5)
    with pytest.raises(UserError, match=r"of\.b=3"):
        some(1, b=3)


def test_the_reference_page_is_as_the_source_says():
    assert PAGE.read_text(encoding="utf-8") == reference.page(config_dir()), "python -m vlabs.runs.reference"


def test_every_option_has_a_sentence():
    rows = [line.split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert len(rows) > 150
    of_timm = {"`model.vision.weight_init`", "`model.vision.dynamic_img_size`"}
    named = {row[0].removeprefix("| "): row[2].strip(" |") for row in rows}
    assert {name for name, said in named.items() if not said[:1].isalpha() or said.startswith(("a ", "Of "))} <= of_timm


BASE = [
    ("task/base/losses", "vlabs.tasks.vision_language.VisionLanguageTask"),
    ("task/base/captions", "vlabs.tasks.captions.CaptionTask"),
    ("task/classify", "vlabs.tasks.classify.ClassifyTask"),
    ("task/segment", "vlabs.tasks.segment.SegmentTask"),
    ("task/retrieval", "vlabs.tasks.retrieval.RetrievalTask"),
    ("task/pretrain", "vlabs.tasks.pretrain.PretrainTask"),
    ("task/vqa", "vlabs.tasks.vqa.VQATask"),
    ("task/recipe/finetune", "vlabs.tasks.optim.Recipe"),
    ("data/base/loader", "vlabs.data.loading.LoaderOptions"),
    ("data/base/loader", "vlabs.data.module.PreparedDataModule"),
    ("data/base/texts", "vlabs.data.loading.LoaderOptions"),
    ("data/vqav2", "vlabs.data.vqa.VQADataModule"),
    ("data/coco_captions", "vlabs.data.captions.CaptionDataModule"),
    ("data/snli_ve", "vlabs.data.statements.StatementDataModule"),
    ("callbacks/ema", "vlabs.training.callbacks.averaging.WeightAverage"),
    ("callbacks/early_stopping", "vlabs.training.callbacks.stopping.EarlyStopping"),
    ("model/fusion/base", "vlabs.models.fusion.CoAttentionFusion"),
]


@pytest.mark.parametrize(("file", "target"), BASE)
def test_a_constructor_has_the_defaults_of_its_config(file, target):
    config = OmegaConf.to_container(OmegaConf.load(Path(config_dir(), f"{file}.yaml")), resolve=False)
    part = next((part for part in (config.get("task"), *config.values()) if isinstance(part, dict)), {})
    options = config if target.rsplit(".", 1)[1] == config.get("_target_", "").rsplit(".", 1)[-1] else part | config
    signatures = []
    for kind in pkgutil.resolve_name(target).__mro__:
        declared = inspect.signature(kind.__init__).parameters
        of_this = vars(kind).get("__annotations__", {}) if "__dataclass_fields__" in vars(kind) else declared
        signatures.append({name: one for name, one in declared.items() if name in of_this})
    own = next(one for one in signatures if {*options} & {*one})
    compared = 0
    for name, value in options.items():
        of = own.get(name)
        is_plain = of is not None and not isinstance(value, dict) and "${" not in str(value)
        is_plain &= name not in PICTURE_OPTIONS.values()  # whose defaults are those of configs of before
        if is_plain and of.default is not inspect.Parameter.empty and not callable(of.default):
            default = list(of.default) if isinstance(of.default, tuple) else of.default
            assert default == value, f"{name}: {default} in the signature, {value} in {file}.yaml"
            compared += 1
    assert compared


@pytest.mark.parametrize("task", choices("task"))
def test_the_signature_of_a_task_names_all_its_options(task):
    config = OmegaConf.load(Path(config_dir(), f"task/{task}.yaml"))
    parameters = inspect.signature(pkgutil.resolve_name(config.task._target_)).parameters
    assert {name for name in config.task if name != "_target_"} <= {*parameters}
    assert all(one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) for one in parameters.values())


def test_an_option_that_is_not_there_is_answered_with_the_one_that_was_meant(in_process, tmp_path):
    for given, meant in (
        ("image_size=32", "did you mean data.image_size?"),
        ("data.img_size=32", "did you mean data.image_size?"),
        ("task.prior_wieght=1", "did you mean task.prior_weight?"),
        ("+task.region_prior=1", "did you mean task.region_prior_weight?"),
        ("+task.prior_loss.norm=1", "choose from temperature, learnable, directions, normalize"),
        ("+callbacks.speed.every=1", "there is no option callbacks.speed.every"),
    ):
        assert_one_line_error(in_process("vlabs.train", [given], tmp_path), given.partition("=")[0].strip("+"), meant)


def test_a_task_of_ones_own_takes_the_options_of_its_bases_and_no_others():
    class Own(VQATask):
        def __init__(self, *args, gamma=1.0, **kwargs):
            super().__init__(*args, **kwargs)

    check_names("task", ["_target_", "gamma", "label_smoothing", "freeze"], Own)
    with pytest.raises(
        UserError, match=r"no option task.gama \(did you mean task.gamma\?\): choose from .*freeze, .*gamma"
    ):
        check_names("task", ["gama"], Own)

    class Bare(VQATask):
        gamma: float = 2.0

    with pytest.raises(UserError, match="task.gamma is declared in Bare, which is no dataclass: write @dataclass"):
        check_names("task", ["gamma"], Bare)
    with pytest.raises(UserError, match="no option task.monitor"):  # declared, but no field
        check_names("task", ["monitor"], Bare)


def test_a_wrong_option_is_told_of_the_plus_only_where_it_may_be_added(in_process, tmp_path):
    refused = in_process("vlabs.train", ["task.nonsense=3", "logger=csv"], tmp_path)
    assert_one_line_error(refused, "no option 'task.nonsense'", "label_smoothing")
    assert "plus" not in refused.stderr
    assert "+callbacks.bset=" in in_process("vlabs.train", ["callbacks.bset=3", "logger=csv"], tmp_path).stderr


def test_a_task_with_a_plain_dataclass_is_compared_and_hashed_as_a_module():
    @dataclass(kw_only=True)
    class Plain(Task):
        gamma: float = 2.0

    model = torch.nn.ModuleDict({"vision": torch.nn.Linear(1, 1)})
    fits = Preprocessing(image_size=32, tokenizer="")
    one, other = (Plain(model, fits, {}, Recipe(lr={"vision": 1e-3})) for _ in range(2))
    assert len({one, other}) == 2
    assert one != other
    assert set(one.modules()) >= {one, model}


def test_help_explains_the_options_of_what_is_chosen(in_process, tmp_path):
    said = in_process("vlabs.train", ["--help", "model=photo", "task.recipe.warmup=0.3"], tmp_path).stdout
    assert "callbacks=      [default]*" in said
    assert "hydra/launcher= basic*, slurm" in said
    assert "vlabs train -m" in said
    assert "photo*" in said
    assert "data/base" not in said
    line = next(line for line in said.splitlines() if "task.recipe.warmup=" in line)
    assert line.split()[:2] == ["task.recipe.warmup=0.3", "Share"]
    assert said.count("checkpoints.every_n_steps=") == 1
    assert not list(tmp_path.iterdir())


def test_help_of_a_choice_that_is_not_there_is_one_line_and_of_a_sweep_is_help(in_process, tmp_path):
    assert_one_line_error(in_process("vlabs.evaluate", ["--help", "task=nonsense"], tmp_path), "task=nonsense", "vqa")
    assert_one_line_error(in_process("vlabs.train", ["--help", "data.img_size=1"], tmp_path), "data.image_size")
    said = in_process("vlabs.train", ["-m", "--help", "seed=0,1", "model=base"], tmp_path)
    assert (said.returncode, "base*" in said.stdout) == (0, True)
