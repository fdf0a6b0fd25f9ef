"""One page about a sweep: what every variant is worth, how sure that is, and what it costs.

Every run is evaluated on the splits that its data has, and for grounding; what is there already is not done again, so
a report that was stopped goes on. Runs that differ in their seed alone are one row, mean ± standard deviation; each
variant is compared with the baseline by a paired bootstrap over questions. Of classifiers it says how they bear
corruptions and attacks, and whether a class that is asked for steers them.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

from vlabs.attention.figures import save_figure
from vlabs.attention.pictures import checkpoints_figure
from vlabs.checkpoints.checkpoint import load_checkpoint
from vlabs.data.classes import ClassDataModule
from vlabs.data.prepared import load_split, read_manifest
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError, show
from vlabs.evaluate import evaluate_checkpoint
from vlabs.evaluation.control import LAYOUTS
from vlabs.evaluation.grounding import find_instances
from vlabs.evaluation.robustness import ATTACKS
from vlabs.metrics.bootstrap import paired_bootstrap
from vlabs.metrics.robustness import CORRUPTIONS
from vlabs.runs.config import hydra_quoted
from vlabs.runs.groups import config_dir
from vlabs.runs.logging import read_metrics
from vlabs.runs.record import find_runs, read_config, read_json, read_summary, say_left_out
from vlabs.utils.files import write_text

SPLITS = ("val", "distractors", "systematic", "productive")
GROUNDING_MAPS = ("norm", "weights", "rollout", "fusion")
ALPHAS = (0, 1, 3, 10, 30)  # strengths of feedback, where a variant has one
# The evaluations of a classifier, and ImageNet-C's kinds of corruptions.
OF_CLASSIFIERS = {
    "robustness": ["evaluation@task=robustness", "task.num_images=300", "task.severities=[1,3,5]"],
    "control": ["evaluation@task=control"],
}
KINDS = {
    "noise": CORRUPTIONS[:3],
    "blur": CORRUPTIONS[3:7],
    "weather": CORRUPTIONS[7:11],
    "digital": CORRUPTIONS[11:],
}


@dataclass
class Run:
    """A finished run of a sweep.

    Attributes:
        path: its folder.
        variant: the overrides in which it differs from other runs, without the seed, or `default`.
        summary: of summary.json.
        data_dir: the prepared folder that it was trained on.
    """

    path: Path
    variant: str
    summary: dict[str, Any]
    data_dir: str


def read_runs(sweep: Path) -> list[Run]:
    """The finished runs of a sweep, at any depth within its folder, by name.

    Raises:
        UserError: there is no such folder, or no finished run in it.
    """
    if not sweep.is_dir():
        raise UserError(f"{sweep}: there is no such folder")
    runs = []
    for folder in find_runs(sweep):
        summary = read_summary(folder)
        if summary is None or not (folder / "config.yaml").is_file():
            continue
        if summary["status"] != "done":
            show(f"left out: {folder} ({summary['status']}: {summary.get('error', '')})", file=sys.stderr)
            continue
        config = read_config(folder)
        if config is None:
            say_left_out(folder / "config.yaml")
            continue
        runs.append(Run(folder, "", summary, str(config.data.dir)))
    if not runs:
        raise UserError(f"{sweep} holds no finished run (a folder with config.yaml and summary.json)")
    common = set.intersection(*(set(run.summary["overrides"]) for run in runs))
    for run in runs:
        own = [item for item in run.summary["overrides"] if item not in common and not item.startswith("seed=")]
        run.variant = " ".join(own) or "default"
    return runs


def _wanted(splits: Sequence[str], instances: Path | None, num_texts: int) -> dict[str, list[str]]:
    """The evaluations of a run on questions: the name of each and its options."""
    wanted = {split: [f"split={split}"] for split in splits}
    if instances is not None:
        masks = ["split=val", f"task.num_texts={num_texts}", f"task.instances={hydra_quoted(instances)}"]
        wanted["grounding"] = ["evaluation@task=grounding", *masks, f"task.maps=[{','.join(GROUNDING_MAPS)}]"]
        wanted["steering"] = ["evaluation@task=steering", *masks, f"task.alphas={list(ALPHAS)}"]
    return wanted


def evaluate_run(run: Run, wanted: dict[str, list[str]]) -> None:
    """Evaluate a run where that was not done yet, as `vlabs evaluate` would.

    Args:
        wanted: by name, the options of each evaluation.
    """
    for name, options in wanted.items():
        out = run.path / "evaluation" / name
        done = read_json(out / "metrics.json")
        # A report of before may have measured fewer maps.
        if done and (name != "grounding" or all(f"{one}/energy" in done for one in GROUNDING_MAPS)):
            continue
        fixed = [f"ckpt={hydra_quoted(run.path)}", f"data.dir={hydra_quoted(run.data_dir)}", "data.num_workers=0"]
        with initialize_config_dir(config_dir(), version_base="1.3"):
            config = compose("evaluate", [*fixed, *options, "trainer.enable_progress_bar=false"])
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate_checkpoint(config, out)


def build_report(
    sweep: Path, out: Path, baseline: str, num_texts: int = 500, instances: Path | None = None
) -> list[Path]:
    """Evaluate what is missing, and write report.md, report.html and the figures.

    Args:
        sweep: the sweep's folder.
        out: where the report goes.
        baseline: what the variants are compared with: a part of its overrides.
        num_texts: questions that grounding is measured on.
        instances: COCO's instances of the corpus; `annotations.zip` of the raw corpus beside the data if not given.
            Without either there is nothing about grounding.

    Returns:
        The files.
    """
    runs = read_runs(sweep)
    if read_manifest(runs[0].data_dir)["kind"] == ClassDataModule.kind:
        return _of_classifiers(sweep, runs, out)
    splits = [name for name in SPLITS if name in read_manifest(runs[0].data_dir)["splits"]]
    instances = find_instances(instances, runs[0].data_dir)
    for run in tqdm(runs, desc="evaluating", unit="run"):
        evaluate_run(run, _wanted(splits, instances, num_texts))
    groups = _by_variant(runs)
    base = next((name for name in groups if baseline in name), None)
    groups = dict(sorted(groups.items(), key=lambda item: item[0] != base))  # what is compared with comes first
    sections = [_accuracy(groups, splits)]
    sections.append(_by_type(groups, "val"))
    if instances is not None:
        sections += [_grounding(groups), _steering(groups), *_strengths(groups)]
    if base is not None:
        sections.append(_against(groups, base, splits))
        if instances is not None:
            sections.append(_grounding_against(groups, base))
    sections.append(_cost(groups))
    figures = {"where they look (fusion attention)": _figure(groups, out / "attention.png")}
    if curves := _curves(groups, out / "curves.png"):
        figures = {"accuracy against what was seen": curves} | figures
    return _write(sweep, runs, sections, figures, out)


def _of_classifiers(sweep: Path, runs: Sequence[Run], out: Path) -> list[Path]:
    """The report of runs of `task=classify`."""
    for run in tqdm(runs, desc="evaluating", unit="run"):
        evaluate_run(run, OF_CLASSIFIERS)
    groups = _by_variant(runs)
    layouts = [name for name in LAYOUTS if f"{name}/area" in _metrics(runs[0], "control")]
    sections = [_robustness(groups), *[_control(groups, layout) for layout in layouts], _cost(groups)]
    return _write(sweep, runs, sections, {}, out)


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.variant].append(run)
    return groups


def _write(
    sweep: Path, runs: Sequence[Run], sections: Sequence[Section], figures: dict[str, Path], out: Path
) -> list[Path]:
    commands = list(dict.fromkeys(run.summary["command"] for run in runs))
    files = [out / "report.md", out / "report.html"]
    title = f"{sweep.name}: {len(runs)} runs, {len(_by_variant(runs))} variants"
    write_text(files[0], _markdown(title, sections, figures, commands))
    write_text(files[1], _html(title, sections, figures, commands))
    return [*files, *figures.values()]


@dataclass
class Section:
    """A table: title, what it says, header and rows."""

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]


def _metrics(run: Run, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run.path / "evaluation" / name / "metrics.json").read_text())
    return content


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def _interval(values: Sequence[float]) -> str:
    """The mean ± half of its 95% interval by Student's t, which few seeds make wide."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.1f} ± {half:.1f}"


def _robustness(groups: dict[str, list[Run]]) -> Section:
    def cells(runs: Sequence[Run]) -> list[str]:
        found = [_metrics(run, "robustness") for run in runs]
        kinds = [[_corrupted(one, names) for one in found] for names in KINDS.values()]
        whole = [[one[name] for one in found] for name in ("clean", "corrupted")]
        attacked = [[one[name] for one in found] for name in ATTACKS]
        return [_interval(values) for values in (*whole, *kinds, *attacked)]

    rows = [[name, str(len(runs)), *cells(runs)] for name, runs in groups.items()]
    header = ["variant", "seeds", "clean", "corrupted", *KINDS, *[name.upper() for name in ATTACKS]]
    text = "Top-1 on val in percent, mean ± half of its 95% interval over seeds."
    return Section("Robustness", text, header, rows)


def _corrupted(metrics: dict[str, Any], names: Sequence[str]) -> float:
    return statistics.mean(value for name in names for value in metrics["corruptions"][name].values())


def _control(groups: dict[str, list[Run]], layout: str) -> Section:
    columns = {
        "norm energy, bottom-up": "norm_energy/before", "under ξ": "norm_energy/after",
        "weights energy": "weights_energy/after", "weights pointing": "weights_pointing/after",
        "top-1 is asked for, bottom-up": "top1/before", "top-1, under ξ": "top1/after",
        "chosen, bottom-up": "chosen/before", "chosen, under ξ": "chosen/after",
    }  # fmt: skip

    def cells(runs: Sequence[Run]) -> list[str]:
        found = [_metrics(run, "control") for run in runs]
        names = [f"{layout}/{name}" for name in columns.values()]
        values = [_interval([one[name] for one in found]) if name in found[0] else "–" for name in names]
        moved = [one[f"{layout}/chosen/after"] - one[f"{layout}/chosen/before"] for one in found]
        return [*values, _interval(moved)]

    rows = [[name, str(len(runs)), *cells(runs)] for name, runs in groups.items()]
    area = _metrics(next(iter(groups.values()))[0], "control")[f"{layout}/area"]
    text = f"A class asked for, in percent as before; a map that looks everywhere alike has {area:.1f} on it."
    return Section(f"Control, {layout}", text, ["variant", "seeds", *columns, "chosen, difference"], rows)


def _accuracy(groups: dict[str, list[Run]], splits: Sequence[str]) -> Section:
    rows = []
    for name, runs in groups.items():
        cells = [_mean([_metrics(run, split)["overall"] for run in runs]) for split in splits]
        rows.append([name, str(len(runs)), *cells])
    text = "Official VQA accuracy in percent, mean ± standard deviation over seeds."
    return Section("Accuracy", text, ["variant", "seeds", *splits], rows)


def _by_type(groups: dict[str, list[Run]], split: str) -> Section:
    first = next(iter(groups.values()))[0]
    types = list(_metrics(first, split)["per_question_type"])
    rows = [
        [name, *[_mean([_metrics(run, split)["per_question_type"][kind] for run in runs]) for kind in types]]
        for name, runs in groups.items()
    ]
    return Section(f"Accuracy by question type ({split})", "In percent.", ["variant", *types], rows)


def _grounding(groups: dict[str, list[Run]]) -> Section:
    header = ["variant", *[f"{name} {measure}" for name in GROUNDING_MAPS for measure in ("energy", "pointing", "ap")]]
    rows = []
    for name, runs in groups.items():
        found = [_metrics(run, "grounding") for run in runs]
        rows.append([name, *[_mean([one[column.replace(" ", "/")] for one in found]) for column in header[1:]]])
    area = _metrics(next(iter(groups.values()))[0], "grounding")["area"]
    text = (
        f"Of the objects that a question is about, in percent; a map that looks everywhere alike scores {area:.1f},"
        " as do the token weights of a variant without any."
    )
    return Section("Grounding (val)", text, header, rows)


def _steering(groups: dict[str, list[Run]]) -> Section:
    columns = ("accuracy", "answers_other", "fusion/own", "fusion/other")
    rows = []
    for name, runs in groups.items():
        found = [_metrics(run, "steering") for run in runs]
        keys = [_trained_strength(one) for one in found]
        cells = [
            _mean([one[f"{key}/{whose}/{column}"] for one, key in zip(found, keys, strict=True)])
            for whose in ("own", "other")
            for column in columns
        ]
        rows.append([name, *cells])
    questions = _metrics(next(iter(groups.values()))[0], "steering")["questions"]
    text = (
        f"{questions} questions of val under their own ξ and under that of a question about another object of the same"
        " picture, in percent: accuracy; how many are given the other question's answer, of those whose types agree and"
        " answers differ; and the fusion map's energy on the own and on the other object."
    )
    header = [f"{whose} ξ: {column}" for whose in ("own", "other's") for column in columns]
    return Section("When ξ is another question's", text, ["variant", *header], rows)


def _strengths(groups: dict[str, list[Run]]) -> list[Section]:
    """Accuracy by the strength of feedback, of the variants that have one; none where none has."""
    rows = []
    for name, runs in groups.items():
        found = [_metrics(run, "steering") for run in runs]
        if all(f"α={alpha}/own/accuracy" in one for one in found for alpha in ALPHAS):
            cells = [_mean([one[f"α={alpha}/own/accuracy"] for one in found]) for alpha in ALPHAS]
            rows.append([name, *cells])
    text = "Accuracy on the same questions where α, with which nothing was trained again, is another."
    header = ["variant", *[f"α = {alpha}" for alpha in ALPHAS]]
    return [Section("Strength of feedback", text, header, rows)] if rows else []


def _trained_strength(metrics: dict[str, Any]) -> str:
    """What the steering of a run is listed under for the strength that it was trained with: the first."""
    return next(key for key in metrics if key.endswith("/own/accuracy")).removesuffix("/own/accuracy")


def _against(groups: dict[str, list[Run]], base: str, splits: Sequence[str]) -> Section:
    rows = []
    for name, runs in groups.items():
        if name == base:
            continue
        rows.append(
            [name, *[_difference(*(_per_question(group, split) for group in (runs, groups[base]))) for split in splits]]
        )
    text = (
        "Difference of accuracy in points, with its 95% interval by a paired bootstrap over questions (seeds averaged"
        " first); * marks intervals without 0. It says nothing of the spread between seeds, which is above."
    )
    return Section(f"Against {base}", text, ["variant", *splits], rows)


def _grounding_against(groups: dict[str, list[Run]], base: str) -> Section:
    columns = [(name, measure) for name in GROUNDING_MAPS for measure in ("energy", "pointing")]
    rows = []
    for name, runs in groups.items():
        if name != base:
            pairs = [[_per_text(group, *column) for group in (runs, groups[base])] for column in columns]
            rows.append([name, *[_difference(*pair) for pair in pairs]])
    text = "The same for grounding, over the questions that it was measured on."
    return Section(
        f"Grounding against {base}", text, ["variant", *[f"{name} {measure}" for name, measure in columns]], rows
    )


def _difference(ours: dict[str, float], theirs: dict[str, float]) -> str:
    """Mean difference over what both were asked, with its interval; * where that is without 0."""
    asked = sorted(ours.keys() & theirs.keys())
    interval = paired_bootstrap([ours[key] for key in asked], [theirs[key] for key in asked])
    sure = "" if interval.low <= 0 <= interval.high else " *"
    return f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]{sure}"


def _per_text(runs: Sequence[Run], name: str, measure: str) -> dict[str, float]:
    """A measure of a map in percent by id of the text, mean over runs."""
    found: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        for line in (run.path / "evaluation" / "grounding" / "grounding.jsonl").read_text().splitlines():
            record = json.loads(line)
            found[str(record["id"])].append(100 * record["maps"][name][measure])
    return {key: float(np.mean(values)) for key, values in found.items()}


def _per_question(runs: Sequence[Run], split: str) -> dict[str, float]:
    found = [json.loads((run.path / "evaluation" / split / "per_question.json").read_text()) for run in runs]
    return {question: float(np.mean([one[question] for one in found])) for question in found[0]}


def _cost(groups: dict[str, list[Run]]) -> Section:
    rows = [
        [
            name,
            f"{runs[0].summary['parameters'] / 1e6:.2f}",
            _mean([run.summary["fit_seconds"] / 60 for run in runs]),
        ]
        for name, runs in groups.items()
    ]
    text = "Minutes of training on the machine of the sweep: to be compared only if nothing else ran beside it."
    return Section("Cost", text, ["variant", "million parameters", "minutes"], rows)


def _figure(groups: dict[str, list[Run]], path: Path) -> Path:
    """The first validation image that has two questions, as the first run of every variant sees it."""
    named = [(name, load_checkpoint(runs[0].path)) for name, runs in groups.items()]
    row = next(row for row in load_split(next(iter(groups.values()))[0].data_dir, "val") if len(row["question"]) > 1)
    image = decode_image(row["image"], f"image {row['image_id']}")
    return save_figure(checkpoints_figure(named, image, row["question"][:2], "fusion"), path)


def _curves(groups: dict[str, list[Run]], path: Path) -> Path | None:
    """Accuracy on val against questions and minutes, the mean over seeds with their range; None without any."""
    figure = Figure(figsize=(11, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2, sharey=True)
    drawn = False
    for name, runs in groups.items():
        courses = [course for run in runs if len(course := _course(run))]
        if not courses:
            continue
        length = min(map(len, courses))
        together = np.stack([course[:length] for course in courses])  # (runs, validations, 3)
        mean, drawn = together.mean(axis=0), True
        for axis, column in zip(axes, (0, 1), strict=True):
            (line,) = axis.plot(mean[:, column], mean[:, 2], marker="o", markersize=3, label=name)
            low, high = together[..., 2].min(axis=0), together[..., 2].max(axis=0)
            axis.fill_between(mean[:, column], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if not drawn:
        return None
    axes[0].set_xlabel("thousand questions seen")
    axes[1].set_xlabel("minutes of training")
    axes[0].set_ylabel("official accuracy on val, %")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return save_figure(figure, path)


def _course(run: Run) -> np.ndarray:
    """(validations, 3): thousand texts seen, minutes and accuracy, from metrics.csv; (0, 3) where it has none."""
    columns = ("seen/texts", "seen/minutes", "val/vqa_accuracy")
    path = run.path / "metrics.csv"
    rows = [[row.get(column) for column in columns] for row in (read_metrics(path).rows if path.is_file() else [])]
    course = np.array([row for row in rows if all(row)], dtype=float).reshape(-1, 3)
    course[:, 0] /= 1000
    return course


def _markdown(title: str, sections: Sequence[Section], figures: dict[str, Path], commands: Sequence[str]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", "", section.text, ""]
        lines.append("| " + " | ".join(section.header) + " |")
        lines.append("| " + " | ".join("---" for _ in section.header) + " |")
        lines += ["| " + " | ".join(row) + " |" for row in section.rows]
        lines.append("")
    for name, figure in figures.items():
        lines += [f"## {name[0].upper()}{name[1:]}", "", f"![{name}]({figure.name})", ""]
    lines += ["## Commands", "", "```"]
    return "\n".join([*lines, *commands, "```", ""])


def _html(title: str, sections: Sequence[Section], figures: dict[str, Path], commands: Sequence[str]) -> str:
    style = (
        "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child"
        "{text-align:left}img{max-width:100%}pre{overflow:auto;background:#f6f6f6;padding:1em}"
    )
    parts = [f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"]
    parts.append(f"<h1>{html.escape(title)}</h1>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p><table>")
        for tag, row in [("th", section.header), *[("td", row) for row in section.rows]]:
            parts.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
        parts.append("</table>")
    for name, figure in figures.items():
        parts.append(f"<h2>{name[0].upper()}{name[1:]}</h2><img src='{figure.name}' alt='{name}'>")
    parts.append(f"<h2>Commands</h2><pre>{html.escape(chr(10).join(commands))}</pre>")
    return "\n".join(parts) + "\n"
