"""A sweep from one shared start, and the page about it."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, command
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from vlabs.checkpoints.checkpoint import find_checkpoint
from vlabs.errors import UserError
from vlabs.evaluation import report
from vlabs.evaluation.control import MEASURES
from vlabs.evaluation.report import OF_CLASSIFIERS, build_report, read_runs
from vlabs.metrics.robustness import CORRUPTIONS
from vlabs.models.absvit import AbSViT
from vlabs.models.fusion import CoAttentionFusion, Fused
from vlabs.models.heads import VQAHead
from vlabs.models.text import RobertaEncoder
from vlabs.models.vlm import assemble
from vlabs.runs.groups import config_dir


@pytest.fixture(scope="module")
def sweep(tiny_options, tiny_data, tmp_path_factory):
    """Two variants, two seeds of one of them, all started from a run that the sweep trains first."""
    cwd = tmp_path_factory.mktemp("sweep")
    start = [o for o in tiny_options if not o.startswith("trainer.max_epochs")] + ["trainer.max_epochs=1", "logger=csv"]
    quoted = ",".join(f"'{option}'" for option in [*start, "model/topdown=none"])
    options = [o for o in start if not o.startswith("task=")]
    result = command(
        "vlabs.train", "-m", *options, "model/topdown=none,qa_vit", "seed=0,1", "init=start", f"init_by=[{quoted}]",
        "hydra.sweep.dir=sweep", cwd=cwd,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return cwd, result


def test_the_common_start_is_trained_once(sweep):
    cwd, result = sweep
    assert result.stdout.count("is not there yet, so it is trained first") == 1
    assert json.loads((cwd / "start/summary.json").read_text())["status"] == "done"
    assert (
        result.stdout.count(f"parameters loaded from {cwd / 'start'}")
        + result.stdout.count("parameters loaded from start")
        == 4
    )


def test_a_start_that_is_missing_is_not_trained_by_every_process(tiny_options, tmp_path, in_process, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    options = [*tiny_options, "logger=csv", "init=start", "init_by=['task=vqa']", "hydra.run.dir=run"]
    result = in_process("vlabs.train", options, tmp_path)
    assert_one_line_error(result, "init=start is not there yet", "vlabs train task=vqa hydra.run.dir=start")
    assert not list(tmp_path.iterdir())  # no lock either


def test_the_report_compares_variants_over_seeds(sweep, tiny_data):
    cwd, _ = sweep
    instances = tiny_data.parent / "raw/annotations.zip"
    files = build_report(cwd / "sweep", cwd / "report", "model/topdown=none", 20, instances)
    text = (cwd / "report/report.md").read_text()
    assert {file.name for file in files} == {"report.md", "report.html", "attention.png", "curves.png"}
    runs = read_runs(cwd / "sweep")
    assert {run.variant for run in runs} == {f"model/topdown={name}" for name in ("none", "qa_vit")}
    found = [
        json.loads((run.path / "evaluation/val/metrics.json").read_text())["overall"]
        for run in runs
        if "qa_vit" in run.variant
    ]
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "topdown=qa_vit |" in line]
    assert rows[0][1:4] == ["model/topdown=qa_vit", "2", f"{np.mean(found):.1f} ± {np.std(found, ddof=1):.1f}"]
    for part in (
        "distractors",
        "systematic",
        "productive",
        "Grounding",
        "Against model/topdown=none",
        "Grounding against model/topdown=none",
        "When ξ is another question's",
        "Accuracy against what was seen",
        "What is asked for",
        "vlabs train -m",
    ):
        assert part in text
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert titles[:2] == ["## Summary", "## Accuracy against what was seen"]  # the table and the picture come first
    head = next(line for line in text.splitlines() if line.startswith("| variant"))
    for column in ("val", "minutes of training", "multiply-adds", "precision at 1", "rank among 6", "pointing", "GMAC"):
        assert column in head
    other = text.split("## When ξ is another question's")[1].split("## ")[0]
    words = next(line for line in other.splitlines() if "topdown=qa_vit |" in line)
    assert {cell.strip() for cell in words.split("|")[3:-1]} == {"–"}  # all words steer it, not ξ
    theirs = [run.path / "evaluation/asymmetry/metrics.json" for run in runs if "qa_vit" in run.variant]
    ranks = [json.loads(path.read_text())["weights/6/rank"] for path in theirs]
    shown = next(line for line in text.split("## What is asked for")[1].splitlines() if "topdown=qa_vit |" in line)
    assert f"| {np.mean(ranks):.1f} ± {np.std(ranks, ddof=1):.1f} |" in re.sub(" +", " ", shown)


def some_runs(*variants):
    """Runs of variants, which have `task=vqa` in common."""
    runs = [report.Run(Path(name), name, {"overrides": ["task=vqa", *name.split(" ")]}, None) for name in variants]
    return [run for run in runs for _ in range(2)]


STUDY = some_runs(
    "model/topdown=absvit_qkv", "model/topdown=absvit", "model/topdown=none task.weight=1.0",
    "model/topdown=none task.weight=0.0", "model/topdown=film task.prompt=is it",
)  # fmt: skip


@pytest.mark.parametrize(
    ("named", "base"),
    [
        ("model/topdown=absvit", "model/topdown=absvit"),
        ("task=vqa model/topdown=absvit", "model/topdown=absvit"),
        ("task.weight=1.0 model/topdown=none", "model/topdown=none task.weight=1.0"),
        ("task.weight=1.0", "model/topdown=none task.weight=1.0"),
        ("task.prompt=is it", "model/topdown=film task.prompt=is it"),
        (None, "model/topdown=none task.weight=0.0"),
    ],
)
def test_the_baseline_is_the_variant_that_has_all_overrides_that_are_named(named, base):
    assert report.find_baseline(STUDY, named) == base


def test_that_several_variants_fit_where_none_is_named_is_said(capsys):
    assert report.find_baseline(some_runs("default", "task.weight=0.5"), None) is None
    report.find_baseline(STUDY, None)
    none = "model/topdown=none task.weight"
    assert capsys.readouterr().err == (
        f"compared with {none}=0.0; --baseline names another one of {none}=0.0; {none}=1.0\n"
    )


@pytest.mark.parametrize(
    ("named", "part"),
    [
        ("model/topdown=nope", "no variant of these runs: name one by its overrides: model/topdown=absvit; "),
        ("topdown=absvit", "no variant"),
        ("model/topdown=none", "several variants .*: model/topdown=none task.weight=0.0; model/topdown=none task.we"),
        ("task=vqa", "several variants"),
    ],
)
def test_a_baseline_that_is_no_variant_or_several_is_one_line(named, part):
    with pytest.raises(UserError, match=f"--baseline '{named}' fits {part}"):
        report.find_baseline(STUDY, named)


def test_a_map_that_an_encoder_does_not_have_is_a_dash_and_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "evaluate_checkpoint", None)
    data = OmegaConf.create({"dir": "data"})
    runs = [report.Run(tmp_path / name, name, {}, data) for name in ("swin", "vit", "base")]
    for run in runs:
        folder = run.evaluation("grounding")
        folder.mkdir(parents=True)
        names = [name for name in report.GROUNDING_MAPS if run.variant != "swin" or name != "rollout"]
        maps = {name: {"energy": 0.5, "pointing": 1.0} for name in names}
        lines = [json.dumps({"id": n, "text": "?", "maps": maps}) for n in range(3)]
        (folder / "grounding.jsonl").write_text("\n".join(lines))
        (folder / "metrics.json").write_text(json.dumps({f"{name}/energy": 50.0 for name in names}))
        OmegaConf.save({"task": {"maps": list(report.GROUNDING_MAPS)}, "data": {}}, folder / "config.yaml")
        report.evaluate_run(run, {"grounding": []})
    table = report._against(runs, "base", [], True)[-1].cells.set_index("variant")
    assert list(table.loc["swin", ["rollout energy", "rollout pointing"]]) == ["–", "–"]
    assert table.loc["swin", "weights energy"] == table.loc["vit", "rollout energy"] == "+0.0 [+0.0, +0.0]"
    below = report._against(runs[:2], "swin", [], True)[-1].cells
    assert "rollout energy" not in below
    assert "weights energy" in below


class Joined(nn.Module):
    """A fusion that is two maps."""

    def __init__(self, text_dim, image_dim, width):
        super().__init__()
        self.text_map, self.image_map = nn.Linear(text_dim, width), nn.Linear(image_dim, width)

    def forward(self, text, mask, image, picture, **options):
        text, image = self.text_map(text), self.image_map(image)
        return Fused(torch.cat([text[:, 0], image[:, 0]], dim=1), text, image)


def test_multiply_adds_per_question_are_those_of_every_product_of_matrices_with_the_image_shared():
    width, hidden, fused, answers, tokens, words = 8, 32, 16, 5, 5, 12
    model = assemble(
        AbSViT("vit_tiny_patch16_224", 32, 16, embed_dim=width, depth=1, num_heads=2),
        RobertaEncoder(30, 24, 1, 2, 48, 20), partial(CoAttentionFusion, width=fused, depth=1, num_heads=2),
        partial(VQAHead, num_answers=answers), "cls",
    )  # fmt: skip
    model.fusion = Joined(24, width, fused)

    def block(n, d, inner):  # q, k, v and the output; attention; the feed-forward layer
        return n * 4 * d * d + 2 * n * n * d + 2 * n * d * inner

    of_image = 4 * (3 * 16 * 16) * width + block(tokens, width, hidden)
    of_text = block(words, 24, 48) + words * 24 * fused
    rest = tokens * width * fused + (2 * fused) ** 2 + 2 * fused * answers
    for questions in (1, 4):
        work = of_image / questions + of_text + rest
        assert report.gmac(model, 32, questions) == pytest.approx(work / 1e9, rel=1e-12)


def test_at_equal_cost_a_course_is_read_at_the_least_that_all_have_seen(sweep, monkeypatch):
    cwd, _ = sweep
    runs = read_runs(cwd / "sweep")[:2]
    courses = [
        pd.DataFrame({"questions": [1.0, 2.0], "minutes": [3.0, 6.0], "macs": [5.0, 10.0], "val": [40.0, 60.0]}),
        pd.DataFrame({"questions": [1.0, 2.0], "minutes": [2.0, 4.0], "macs": [11.0, 18.0], "val": [30.0, 50.0]}),
    ]
    for run, variant in zip(runs, "ab", strict=True):
        run.variant = variant
    monkeypatch.setattr(report, "_course", lambda run: courses["ab".index(run.variant)])
    (section,) = report._at_equal_cost(runs)
    assert section.cells.columns[2:].tolist() == [
        "2 thousand questions seen", "4 minutes of training", "10 10¹² multiply-adds of forward passes",
    ]  # fmt: skip
    # Nothing is known of the second before its first validation, at 11.
    assert section.cells.to_numpy()[:, 2:].tolist() == [["60.0", "46.7", "60.0"], ["50.0", "50.0", "–"]]


def test_the_difference_of_grounding_is_that_of_the_means(sweep, tiny_data):
    cwd, _ = sweep
    build_report(cwd / "sweep", cwd / "report", "model/topdown=none", 20, tiny_data.parent / "raw/annotations.zip")
    means = {"none": [], "qa_vit": []}
    for run in read_runs(cwd / "sweep"):
        metrics = json.loads((run.path / "evaluation/grounding/metrics.json").read_text())
        means[run.variant.removeprefix("model/topdown=")].append(metrics["fusion/energy"])
    text = (cwd / "report/report.md").read_text()
    lines = text[text.index("## Grounding against") :].splitlines()
    header, row = ([cell.strip() for cell in line.split("|")] for line in (lines[4], lines[6]))
    assert row[1] == "model/topdown=qa_vit"
    shown = float(row[header.index("fusion energy")].split()[0])
    assert shown == pytest.approx(np.mean(means["qa_vit"]) - np.mean(means["none"]), abs=0.051)


def test_a_report_says_once_what_all_runs_have_and_compares_other_tasks_by_their_validation(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text(json.dumps({"format": 1, "kind": "captions", "splits": {}}))
    for topdown, best in (("none", 50.0), ("absvit", 60.0)):
        for seed in range(2):
            run = tmp_path / f"sweep/{topdown}-{seed}"
            run.mkdir(parents=True)
            overrides = ["task=size", "data=sized", f"model/topdown={topdown}", f"seed={seed}"]
            found = {"best/val/close": best + seed, "fit_seconds": 60.0, "parameters": 10}
            summary = {"status": "done", "command": "train", "overrides": overrides, **found}
            (run / "summary.json").write_text(json.dumps(summary))
            (run / "config.yaml").write_text(f"data: {{dir: {tmp_path / 'data'}}}\n")
    text = build_report(tmp_path / "sweep", tmp_path / "out", "model/topdown=none")[0].read_text()
    assert text.count("task=size") == 1
    assert "All runs: `task=size data=sized`" in text
    table = text.split("## Validation")[1].split("## Cost")[0].replace(" ", "")
    assert "|variant|seeds|val/close|" in table
    assert "|model/topdown=absvit|2|60.5±0.7|" in table


def test_runs_of_different_kinds_are_named_before_any_work(tmp_path):
    for name, kind in (("a", "captions"), ("b", "captions"), ("c", "classes")):
        (tmp_path / f"data/{name}").mkdir(parents=True)
        (tmp_path / f"sweep/{name}").mkdir(parents=True)
        (tmp_path / f"data/{name}/manifest.json").write_text(json.dumps({"format": 1, "kind": kind, "splits": {}}))
        summary = {"status": "done", "command": "train", "overrides": [], "fit_seconds": 1.0, "parameters": 1}
        (tmp_path / f"sweep/{name}/summary.json").write_text(json.dumps(summary))
        (tmp_path / f"sweep/{name}/config.yaml").write_text(f"data: {{dir: {tmp_path / 'data' / name}}}\n")
    with pytest.raises(UserError, match=r"sweep/a \(a model of captions\) and .*sweep/c \(a model of classes\): name"):
        build_report(tmp_path / "sweep", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_figure_takes_an_image_with_one_question_where_there_is_no_other(sweep, tmp_path, monkeypatch):
    runs = read_runs(sweep[0] / "sweep")
    row = dict(report.load_split(runs[0].data_dir, "val")[0])
    monkeypatch.setattr(report, "load_split", lambda *_: [row | {"question": row["question"][:1]}])
    assert report._figure({"one": runs[:1]}, tmp_path / "figure.png").is_file()


def test_what_is_evaluated_is_not_evaluated_again(sweep, monkeypatch):
    cwd, _ = sweep
    build_report(cwd / "sweep", cwd / "report", "model/topdown=none", 20)
    monkeypatch.setattr("vlabs.evaluation.report.evaluate_checkpoint", lambda *_: pytest.fail("evaluated again"))
    build_report(cwd / "sweep", cwd / "again", "model/topdown=none", 20)


def test_newer_weights_and_other_options_are_evaluated_again(sweep, tiny_data, monkeypatch, capsys):
    (cwd, _), instances = sweep, tiny_data.parent / "raw/annotations.zip"
    build_report(cwd / "sweep", cwd / "report", "model/topdown=none", 20, instances)
    again = []
    monkeypatch.setattr(report, "evaluate_checkpoint", lambda config, out: again.append((out, config.data.blind)))
    build_report(cwd / "sweep", cwd / "again", "model/topdown=none", 10, instances)
    assert {out.name for out, _ in again} == {"grounding", "steering"}
    assert "evaluated again, because task.num_texts was 20" in capsys.readouterr().err
    again.clear()
    run = read_runs(cwd / "sweep")[0]
    report.evaluate_run(run, {"val": ["split=val"]})
    assert not again
    run.data.blind = True  # a run without images is not shown any afterwards
    report.evaluate_run(run, {"val": ["split=val"]})
    assert [blind for _, blind in again] == [True]
    run.data.blind = False
    weights, measured = find_checkpoint(run.path), run.evaluation("val") / "metrics.json"
    os.utime(weights, (measured.stat().st_mtime + 1,) * 2)
    report.evaluate_run(run, {"val": ["split=val"]})
    assert "because the weights are newer" in capsys.readouterr().err
    os.utime(weights, (measured.stat().st_mtime - 1,) * 2)
    config = run.evaluation("val") / "config.yaml"
    before = config.read_text()
    config.write_text(re.sub("(?m)^split: val$", "split: ${oc.env:HOME}", before))
    report.evaluate_run(run, {"val": ["split=val"]})
    assert "because split was ${oc.env:HOME}" in capsys.readouterr().err  # nothing in it is resolved
    config.write_text(before)


@pytest.mark.parametrize("kept", ["minival", "val"])
def test_the_split_of_a_report_is_that_of_validation(kept, sweep, tiny_data, tmp_path, monkeypatch, capsys):
    runs, instances = read_runs(sweep[0] / "sweep"), tiny_data.parent / "raw/annotations.zip"
    for run in runs:
        run.data = OmegaConf.merge(run.data, {"val_split": kept, "minival_images": 3, "blind": kept == "minival"})
    wanted = {}

    def look(runs, of_each):
        wanted.update(of_each)
        raise UserError("that is all")

    monkeypatch.setattr(report, "read_runs", lambda _: runs)
    monkeypatch.setattr(report, "_evaluated", look)
    with pytest.raises(UserError, match="that is all"):
        build_report(sweep[0] / "sweep", tmp_path, None, 20, instances)
    said = capsys.readouterr().err
    if kept == "val":
        assert wanted["val"] == ["split=val"]
        assert wanted["grounding"][1] == "split=val"
    else:  # of train+val, whose val was trained on, and without images
        assert wanted["minival"] == ["split=minival", "data.minival_images=3"]
        assert not wanted.keys() & {"val", "grounding", "steering"}
        assert "data.blind=true: nothing is said of where" in said
    runs[-1].data.val_split = "test"
    with pytest.raises(UserError, match=f"data.val_split={kept}.* and .*data.val_split=test"):
        build_report(sweep[0] / "sweep", tmp_path, None, 20, instances)


def test_questions_of_different_data_are_not_paired(sweep, tiny_data, tmp_path, monkeypatch, capsys):
    runs = read_runs(sweep[0] / "sweep")
    shutil.copytree(tiny_data, tmp_path / "other")
    for run in runs[:2]:
        run.data.dir = str(tmp_path / "other")
    monkeypatch.setattr(report, "read_runs", lambda _: runs)
    monkeypatch.setattr(report, "evaluate_run", lambda *_: None)
    build_report(sweep[0] / "sweep", tmp_path / "out", "model/topdown=none", 20)
    assert "the runs read different data" in capsys.readouterr().err
    page = (tmp_path / "out/report.md").read_text()
    assert "## Accuracy" in page
    assert "Against" not in page


def test_a_folder_without_runs_is_one_line(tmp_path):
    assert_one_line_error(command("vlabs.report", tmp_path, cwd=tmp_path), "holds no finished run")


def test_the_report_of_classifiers_has_intervals_over_seeds(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text(json.dumps({"format": 1, "kind": "classes", "splits": {}}))
    for topdown, start in (("none", 50.0), ("absvit", 60.0)):
        for seed in range(3):
            run = tmp_path / f"sweep/{topdown}-{seed}"
            overrides = ["experiment=objects_classify", f"model/topdown={topdown}", f"seed={seed}"]
            for name in ("robustness", "control"):
                (run / "evaluation" / name).mkdir(parents=True)
                (run / "evaluation" / name / "config.yaml").write_text("data: {}\n")
            summary = {
                "status": "done",
                "command": "train",
                "overrides": overrides,
                "fit_seconds": 60.0,
                "parameters": 10,
            }
            (run / "summary.json").write_text(json.dumps(summary))
            (run / "config.yaml").write_text(f"data: {{dir: {tmp_path / 'data'}}}\n")
            corruptions = {name: {"1": start + seed, "5": start - seed} for name in CORRUPTIONS}
            corruptions["fog"] = {"1": 10.0 * seed, "5": 10.0 * seed}
            robustness = {
                "clean": start + 2 * seed,
                "corrupted": 1.0,
                "fgsm": 2.0,
                "pgd": 3.0,
                "corruptions": corruptions,
            }
            (run / "evaluation/robustness/metrics.json").write_text(json.dumps(robustness))
            control = {f"pairs/{name}/{when}": start + seed for name in MEASURES for when in ("before", "after")}
            control |= {"pairs/area": 25.0, "pairs/chosen/before": 50.0}
            if topdown == "none":
                control = {name: value for name, value in control.items() if "weights" not in name}
            (run / "evaluation/control/metrics.json").write_text(json.dumps(control))
    files = build_report(tmp_path / "sweep", tmp_path / "out", "model/topdown=none")
    assert [path.name for path in files] == ["report.md", "report.html"]
    lines = [line for line in files[0].read_text().splitlines() if line.startswith("| model")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    by_hand = {0.0: "50.0 ± 0.0", 2.0: f"52.0 ± {4.302653 * 2 / 3**0.5:.1f}"}  # t of two degrees of freedom
    robust, control = ({row[0]: row for row in rows[n : n + 2]} for n in (0, 2))
    assert robust["model/topdown=none"][1:5] == ["3", by_hand[2.0], "1.0 ± 0.0", by_hand[0.0]]
    assert robust["model/topdown=none"][6].startswith(f"{(3 * 50 + 10) / 4:.1f} ± ")  # the weather, fog among it
    assert control["model/topdown=none"][4] == "–"
    assert control["model/topdown=absvit"][-1] == f"11.0 ± {4.302653 / 3**0.5:.1f}"
    assert "a uniform map scores 25.0" in files[0].read_text()
    for options in OF_CLASSIFIERS.values():
        with initialize_config_dir(config_dir(), version_base="1.3"):
            instantiate(compose("evaluate", ["ckpt=any", *options]).task, _convert_="all")


def test_a_legend_names_options_by_their_last_part_where_these_differ():
    assert (
        report._short("model/topdown=absvit task.region_prior_weight=1.0") == "topdown=absvit region_prior_weight=1.0"
    )
    assert report._short("model.vision.depth=2 model.fusion.depth=4") == "model.vision.depth=2 model.fusion.depth=4"
