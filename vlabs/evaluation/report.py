"""A report about a sweep: accuracy of each variant, its uncertainty, grounding and cost.

Each run is evaluated on its validation split and the test splits of its data, and for grounding. Finished evaluations
are not repeated unless weights or options have changed, so a report that was stopped continues. Runs that differ only
in their seed are one row, mean ± standard deviation; each variant is compared with the baseline by a paired bootstrap
over questions. For classifiers the report has robustness and control instead, and for other tasks the best validation
of each run.
"""

from __future__ import annotations

import contextlib
import html
import io
import json
import math
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from scipy import stats
from tqdm import tqdm

from vlabs.attention.figures import save_figure
from vlabs.attention.pictures import checkpoints_figure
from vlabs.checkpoints.abilities import ABILITIES
from vlabs.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from vlabs.data.classes import ClassDataModule
from vlabs.data.prepared import load_split, read_manifest
from vlabs.data.preprocessing import decode_image
from vlabs.data.vqa import VQADataModule
from vlabs.errors import UserError, show
from vlabs.evaluate import evaluate_checkpoint, numbers_of
from vlabs.evaluation.control import LAYOUTS
from vlabs.evaluation.grounding import find_instances
from vlabs.evaluation.robustness import ATTACKS
from vlabs.metrics.bootstrap import paired_bootstrap
from vlabs.metrics.robustness import CORRUPTIONS
from vlabs.models.vlm import VisionLanguageModel
from vlabs.runs.config import hydra_quoted
from vlabs.runs.groups import config_dir
from vlabs.runs.logging import read_metrics
from vlabs.runs.record import find_runs, read_config, read_json, read_summary, say_left_out
from vlabs.utils.files import write_text
from vlabs.utils.flops import flop_counter
from vlabs.utils.options import as_given
from vlabs.utils.table import table

SPLITS = ("distractors", "systematic", "productive")  # besides the validation split
GROUNDING_MAPS = ("norm", "weights", "rollout", "fusion")
_BETWEEN = re.compile(r"\s+(?=[+~]{0,2}[\w./@]+=)")  # overrides, whose values may have spaces
_COSTS = {
    "questions": "thousand questions seen",
    "minutes": "minutes of training",
    "macs": "10¹² multiply-adds of forward passes",
}
_TOKENS, _WORD = 12, 5  # of a question, and the number of some word, for the count of multiply-adds
_SCENES = "vlabs.data.embedded.scenes_data"
BASELINE = "model/topdown=none"  # what other variants are compared with, where nothing else is named
ALPHAS = (0, 1, 3, 10, 30)  # strengths of the top-down signal, for variants that have one
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
        variant: the overrides that differ from other runs, without the seed; or `default`.
        summary: content of summary.json.
        data: the config of its training data.
    """

    path: Path
    variant: str
    summary: dict[str, Any]
    data: DictConfig

    @property
    def data_dir(self) -> str:
        """The prepared folder of its training data."""
        return str(self.data.dir)

    @property
    def val_split(self) -> str:
        """The split that it was validated on."""
        return str(self.data.get("val_split") or "val")

    @property
    def blind(self) -> bool:
        """Whether it was shown no images."""
        return bool(self.data.get("blind"))

    def evaluation(self, name: str) -> Path:
        """The folder of one of its evaluations."""
        return self.path / "evaluation" / name

    @property
    def gmac(self) -> float:
        """Multiply-adds of a question's forward pass, in 1e9, with as many questions per image as in training."""
        return self._of_model.gmac

    @property
    def has_one_prior(self) -> bool:
        """Whether ξ steers alone, so that another one can take its place."""
        return self._of_model.has_one_prior

    @cached_property
    def kind(self) -> str:
        """The kind of its data, and `answers` if it answers questions: how it is evaluated."""
        kind = str(read_manifest(self.data_dir)["kind"])
        return "answers" if kind == VQADataModule.kind and self._of_model.answers else kind

    @cached_property
    def _of_model(self) -> _Model:
        checkpoint = load_checkpoint(self.path)
        if not ABILITIES["answers"].has(checkpoint.network):
            return _Model(False, math.nan, False)
        cost = gmac(checkpoint.model, checkpoint.preprocessing.image_size, int(self.data.questions_per_image))
        return _Model(True, cost, ABILITIES["one prior"].has(checkpoint.network))


class _Model(NamedTuple):
    """What a report needs to know of a model."""

    answers: bool
    gmac: float
    has_one_prior: bool


@torch.inference_mode()
def gmac(model: VisionLanguageModel, side: int, questions: int) -> float:
    """Multiply-adds of a forward pass per question of 12 tokens, in 1e9.

    Args:
        side: side of the image in pixels.
        questions: number of questions that share the image, and its first pass.
    """
    ids = torch.full((questions, _TOKENS), _WORD)
    with flop_counter() as counter:
        model(torch.zeros(1, 3, side, side), ids, torch.ones_like(ids), torch.zeros(questions, dtype=torch.int64))
    return float(counter.get_total_flops()) / 2e9 / questions


def read_runs(sweep: Path) -> list[Run]:
    """The finished runs of a sweep, at any depth in its folder, sorted by name.

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
        runs.append(Run(folder, "", summary, config.data))
    if not runs:
        raise UserError(f"{sweep} holds no finished run (a folder with config.yaml and summary.json)")
    common = _of_all(runs)
    for run in runs:
        own = [item for item in run.summary["overrides"] if item not in common and not item.startswith("seed=")]
        run.variant = " ".join(own) or "default"
    return runs


def _of_all(runs: Sequence[Run]) -> list[str]:
    """The overrides that all runs have in common, in the order of the first."""
    return [item for item in runs[0].summary["overrides"] if all(item in run.summary["overrides"] for run in runs)]


def _wanted(
    splits: Sequence[str], minival: int, instances: Path | None, num_texts: int, scenes: str | None, out: Path
) -> dict[str, list[str]]:
    """The evaluations of a run on questions: their options by name; two more if it was trained on scenes of a size,
    with phrases that are prepared in the folder of the report."""
    on = {split: [f"split={split}", *[f"data.minival_images={minival}"] * (split == "minival")] for split in splits}
    wanted = dict(on)
    if scenes is not None and instances is not None and (instances.parent / "scenes.json").is_file():
        asked, raw, phrases = "task.prompt='Is there a PHRASE?'", instances.parent, out.absolute() / "phrases"
        data = ["data=scenes_phrases", f"data.size={scenes}"]
        data += [f"data.dir={hydra_quoted(phrases)}", f"data.raw_dir={hydra_quoted(raw)}"]
        wanted["conditional"] = ["evaluation@task=conditional", "split=val", asked, *data]
        wanted["asymmetry"] = ["evaluation@task=asymmetry", asked, f"task.size={scenes}"]
    if instances is not None:
        masks = [*on[splits[0]], f"task.num_texts={num_texts}", f"task.instances={hydra_quoted(instances)}"]
        wanted["grounding"] = ["evaluation@task=grounding", *masks, f"task.maps=[{','.join(GROUNDING_MAPS)}]"]
        wanted["steering"] = ["evaluation@task=steering", *masks, f"task.alphas={list(ALPHAS)}"]
    return wanted


def evaluate_run(run: Run, wanted: dict[str, list[str]]) -> None:
    """Do the evaluations of a run that are not done yet, as `vlabs evaluate` would.

    Args:
        run: the run.
        wanted: the options of each evaluation, by name.
    """
    for name, options in wanted.items():
        out = run.evaluation(name)
        config = _evaluation_config(*options, *["data.blind=true"] * run.blind)
        if (why := _is_due(run, out, config)) is None:
            continue
        if why:
            show(f"{out}: evaluated again, because {why}", file=sys.stderr)
        config.ckpt, config.data.dir = str(run.path), config.data.dir or run.data_dir
        with contextlib.redirect_stdout(io.StringIO()):
            evaluate_checkpoint(config, out)


def _evaluation_config(*options: str) -> DictConfig:
    """The config of `vlabs evaluate` with some options, without checkpoint."""
    fixed = ["ckpt=RUN", "data.num_workers=0", "trainer.enable_progress_bar=false"]
    with initialize_config_dir(config_dir(), version_base="1.3"):
        return compose("evaluate", [*fixed, *options])


def _is_due(run: Run, out: Path, config: DictConfig) -> str | None:
    """Why an evaluation has to be done again; empty if it is not there, None if it is as wanted."""
    saved = read_config(out)
    if saved is None or not read_json(out / "metrics.json"):
        return ""
    with contextlib.suppress(UserError):  # the checkpoint is gone
        if find_checkpoint(run.path).stat().st_mtime > (out / "metrics.json").stat().st_mtime:
            return "the weights are newer"
    asked = _options(saved)
    for name, now in _options(config).items():
        # An older version did not have all options.
        if name in asked and asked[name] != now:
            return f"{name} was {as_given(asked[name])}"
    return None


def _options(config: DictConfig) -> dict[str, Any]:
    """What an evaluation measures, from its config, which is not trusted: interpolations are not resolved."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    found = {"split": plain["split"]} if "split" in plain else {}
    found |= {f"data.{name}": plain["data"][name] for name in ("blind", "minival_images") if name in plain["data"]}
    if isinstance(task := plain.get("task"), dict):
        found |= {f"task.{name}": value for name, value in task.items() if name != "ranker"}
    if isinstance(file := found.get("task.instances"), str):
        found["task.instances"] = str(Path(file).resolve())
    return found


def find_baseline(runs: Sequence[Run], named: str | None) -> str | None:
    """The variant to compare with: the one with exactly these overrides, else the only one that has them all.

    Overrides that all runs have in common, and seeds, may be among them or not.

    Args:
        runs: the runs of a sweep.
        named: overrides, separated by spaces, or `default`; None for `BASELINE`. If several variants have this, it is
            the one with the fewest other overrides, by name the first, which is said; if none has it, None.

    Raises:
        UserError: no variant has the overrides that are named, or several have and none has no others.
    """
    asked = set(_BETWEEN.split((named or BASELINE).strip()))
    more = {}
    for run in runs:
        own, every = set(_BETWEEN.split(run.variant)), set(run.summary["overrides"])
        if asked <= own | every:
            more[run.variant] = len(own - asked)
    fitting = sorted(more, key=lambda variant: (more[variant], variant))
    if fitting and (len(fitting) == 1 or not more[fitting[0]]):
        return fitting[0]
    if named is not None:
        those = fitting or sorted({run.variant for run in runs})
        raise UserError(
            f"--baseline '{named}' fits {'several variants' if fitting else 'no variant'} of these runs: name one by "
            f"its overrides: {'; '.join(those)}"
        )
    if fitting:
        show(f"compared with {fitting[0]}; --baseline names another one of {'; '.join(fitting)}", file=sys.stderr)
    return fitting[0] if fitting else None


def build_report(
    sweep: Path, out: Path, baseline: str | None = None, num_texts: int = 500, instances: Path | None = None
) -> list[Path]:
    """Evaluate what is missing, and write report.md, report.html and the figures.

    Args:
        sweep: the sweep's folder.
        out: folder of the report.
        baseline: the variant to compare with, see `find_baseline`.
        num_texts: number of questions for grounding.
        instances: COCO's instances; None for `annotations.zip` of the raw data beside the prepared data. Without
            either, the report has no grounding.

    Returns:
        Paths of the written files.

    Raises:
        UserError: there are no runs, they are not all of a kind, or the baseline is none of them.
    """
    runs = read_runs(sweep)
    base = find_baseline(runs, baseline)
    kind = _kind(runs)
    main = _val_split(runs)
    if kind == ClassDataModule.kind:
        frame = _evaluated(runs, {name: [*options, f"split={main}"] for name, options in OF_CLASSIFIERS.items()})
        return _write(sweep, runs, [_robustness(frame, main), *_control(frame), _cost(frame)], {}, out)
    if kind != "answers":
        return _write(sweep, runs, [*_validations(runs), _cost(_evaluated(runs, {}))], {}, out)
    folders = {str(Path(run.data_dir).resolve()): run.data_dir for run in runs}
    splits = [main, *(name for name in SPLITS if all(name in read_manifest(one)["splits"] for one in folders))]
    if blind := any(run.blind for run in runs):
        show("data.blind=true: nothing is said of where models look that are shown no images", file=sys.stderr)
    if alike := len(folders) == 1:
        instances = find_instances(instances, runs[0].data_dir)
    else:
        show(f"the runs read different data ({', '.join(folders.values())}), so no question is compared, nor grounding",
             file=sys.stderr)  # fmt: skip
    instances = instances if alike and not blind else None
    runs.sort(key=lambda run: run.variant != base)  # the baseline comes first
    scenes = runs[0].data.size if runs[0].data.get("_target_") == _SCENES else None
    minival = int(runs[0].data.get("minival_images") or 0)
    wanted = _wanted(splits, minival, instances, num_texts, scenes, out)
    frame = _evaluated(runs, wanted)
    sections = [_accuracy(frame, splits), *_at_equal_cost(runs), _by_type(frame, main)]
    if instances is not None:
        sections += [_grounding(frame, main), *_steering(frame), *_strengths(frame)]
    if "asymmetry" in wanted:
        sections.append(_asked_for(frame))
    if base is not None and alike:
        sections += _against(runs, base, splits, instances is not None)
    sections.append(_cost(frame))
    figures = {}
    if not blind:
        figures = {"Where they look (fusion attention)": _figure(_by_variant(runs), out / "attention.png")}
    if curves := _curves(_by_variant(runs), out / "curves.png"):
        figures = {"Accuracy against what was seen": curves} | figures
    return _write(sweep, runs, [_summary(sections), *sections], figures, out)


def _val_split(runs: Sequence[Run]) -> str:
    """The split that all runs were validated on.

    Raises:
        UserError: a run was validated on another one than the first.
    """
    for run in runs:
        if run.val_split != runs[0].val_split:
            both = " and ".join(f"{one.path} (data.val_split={one.val_split})" for one in (runs[0], run))
            raise UserError(
                f"a report is about runs that are validated on one split, not {both}: name a folder of such"
            )
    return runs[0].val_split


def _kind(runs: Sequence[Run]) -> str:
    """The kind of all runs, see `Run.kind`.

    Raises:
        UserError: a run is of another kind than the first.
    """
    for run in runs:
        if run.kind != runs[0].kind:
            both = " and ".join(f"{one.path} (a model of {one.kind})" for one in (runs[0], run))
            raise UserError(f"a report is about runs of one kind, not {both}: name a folder with runs of one kind")
    return runs[0].kind


def _evaluated(runs: Sequence[Run], wanted: dict[str, list[str]]) -> pd.DataFrame:
    """A table with a row per run: its variant, cost, and metrics of its evaluations, such as `grounding/norm/energy`.

    The metrics of steering at the trained strength, which is the first, are also under `trained/`.
    """
    rows = []
    for run in tqdm(runs, desc="evaluating", unit="run"):
        able = {name: options for name, options in wanted.items() if name != "steering" or run.has_one_prior}
        evaluate_run(run, able)
        found = {name: json.loads((run.evaluation(name) / "metrics.json").read_text()) for name in able}
        steering = found.get("steering", {})
        for strength in [key.split("/")[0] for key in steering if key.endswith("/own/accuracy")][:1]:
            found["trained"] = {
                key.removeprefix(f"{strength}/"): value
                for key, value in steering.items()
                if key.startswith(f"{strength}/")
            }
        cost = {"parameters": run.summary["parameters"] / 1e6, "minutes": run.summary["fit_seconds"] / 60}
        if run.val_split in wanted:
            cost["gmac"] = run.gmac
        rows.append({"variant": run.variant, **cost, **numbers_of(found, "")})
    return pd.DataFrame(rows)


def _by_variant(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.variant].append(run)
    return groups


@dataclass
class Section:
    """A table of strings with one row per variant, its title, an explanation, and its columns that the summary has."""

    title: str
    text: str
    cells: pd.DataFrame
    main: Sequence[str] = ()


def _half_interval(values: pd.Series) -> float:
    """Half the 95% interval of a mean by Student's t distribution, which is wide for few seeds."""
    return float(stats.t.ppf(0.975, len(values) - 1) * values.sem())


def _over_seeds(
    frame: pd.DataFrame, columns: Mapping[str, str], spread: Callable[[pd.Series], float] = pd.Series.std
) -> pd.DataFrame:
    """A row per variant: its number of seeds, and the means of columns ± their spread.

    Args:
        frame: a table of runs.
        columns: columns of the table, by header; "–" if a variant has no value.
        spread: computes the spread of a column's values.
    """

    def cell(values: pd.Series) -> str:
        if values.isna().any():
            return "–"
        return f"{values.mean():.1f}" + (f" ± {spread(values):.1f}" if len(values) > 1 else "")

    groups = frame.reindex(columns=["variant", *columns.values()]).groupby("variant", sort=False)
    cells = groups.agg(cell).set_axis(list(columns), axis=1)
    cells.insert(0, "seeds", groups.size().astype(str))
    return cells.reset_index()


def _robustness(frame: pd.DataFrame, split: str) -> Section:
    columns = {name: f"robustness/{name}" for name in ("clean", "corrupted")}
    for kind, names in KINDS.items():
        starts = tuple(f"robustness/corruptions/{name}/" for name in names)
        columns[kind] = f"kinds/{kind}"
        frame[columns[kind]] = frame[[name for name in frame if name.startswith(starts)]].mean(axis=1)
    columns |= {name.upper(): f"robustness/{name}" for name in ATTACKS}
    text = f"Top-1 on {split} in percent, mean ± half of its 95% interval over seeds."
    return Section("Robustness", text, _over_seeds(frame, columns, _half_interval))


def _control(frame: pd.DataFrame) -> list[Section]:
    columns = {
        "norm energy, bottom-up": "norm_energy/before", "under ξ": "norm_energy/after",
        "weights energy": "weights_energy/after", "weights pointing": "weights_pointing/after",
        "top-1 is asked for, bottom-up": "top1/before", "top-1, under ξ": "top1/after",
        "chosen, bottom-up": "chosen/before", "chosen, under ξ": "chosen/after", "chosen, difference": "chosen/moved",
    }  # fmt: skip
    sections = []
    for start in (f"control/{layout}" for layout in LAYOUTS if f"control/{layout}/area" in frame):
        frame[f"{start}/chosen/moved"] = frame[f"{start}/chosen/after"] - frame[f"{start}/chosen/before"]
        area = frame[f"{start}/area"][0]
        text = f"For the class that is asked for, in percent; a uniform map scores {area:.1f}."
        cells = _over_seeds(frame, {title: f"{start}/{name}" for title, name in columns.items()}, _half_interval)
        sections.append(Section(f"Control, {start.removeprefix('control/')}", text, cells))
    return sections


def _summary(sections: Sequence[Section]) -> Section:
    """The main columns of all sections."""
    tables = [section.cells.set_index("variant")[list(section.main)] for section in sections]
    cells = pd.concat([sections[0].cells.set_index("variant")[["seeds"]], *tables], axis=1).reset_index()
    text = "What to compare first; each column is explained in its section below."
    return Section("Summary", text, cells.fillna("–"))


def _accuracy(frame: pd.DataFrame, splits: Sequence[str]) -> Section:
    text = "Official VQA accuracy in percent, mean ± standard deviation over seeds."
    return Section("Accuracy", text, _over_seeds(frame, {split: f"{split}/overall" for split in splits}), splits[:1])


def _validations(runs: Sequence[Run]) -> list[Section]:
    """The best validation of each variant, for tasks that the report does not evaluate; empty if none has one."""
    found = [{key: value for key, value in run.summary.items() if key.startswith("best/")} for run in runs]
    names = dict.fromkeys(key for best in found for key, value in best.items() if value is not None)
    frame = pd.DataFrame([{"variant": run.variant, **best} for run, best in zip(runs, found, strict=True)])
    text = "The best validation of each run, mean ± standard deviation over seeds."
    cells = _over_seeds(frame, {name.removeprefix("best/"): name for name in names})
    return [Section("Validation", text, cells)] if names else []


def _by_type(frame: pd.DataFrame, split: str) -> Section:
    start = f"{split}/per_question_type/"
    columns = {name.removeprefix(start): name for name in frame if name.startswith(start)}
    return Section(f"Accuracy by question type ({split})", "In percent.", _over_seeds(frame, columns))


def _grounding(frame: pd.DataFrame, split: str) -> Section:
    columns = {
        f"{name} {measure}": f"grounding/{name}/{measure}"
        for name in GROUNDING_MAPS
        for measure in ("energy", "pointing", "ap", "right_energy")
        if f"grounding/{name}/{measure}" in frame  # a report of an older version measured less
    }
    text = (
        f"Energy, pointing and average precision for the objects of a question, in percent; a uniform map scores"
        f" {frame['grounding/area'][0]:.1f}, and so do the token weights of variants that have none."
    )
    return Section(f"Grounding ({split})", text, _over_seeds(frame, columns), ["weights pointing"])


def _steering(frame: pd.DataFrame) -> list[Section]:
    """What another question's ξ does, to variants that ξ alone steers; empty if it steers none."""
    if "steering/questions" not in frame:
        return []
    columns = {
        f"{title} ξ: {column}": f"trained/{whose}/{column}"
        for title, whose in (("own", "own"), ("other's", "other"))
        for column in ("accuracy", "answers_other", "fusion/own", "fusion/other")
    }
    text = (
        f"{frame['steering/questions'].max():.0f} questions of val under their own ξ and under that of a question about"
        " another object of the same image, in percent: accuracy; how often the answer is the other question's, over"
        " pairs of the same type with different answers; and the fusion map's energy on the own and the other object."
    )
    return [Section("When ξ is another question's", text, _over_seeds(frame, columns))]


def _strengths(frame: pd.DataFrame) -> list[Section]:
    """Accuracy by strength of the top-down signal, for variants that have one; empty if none has."""
    columns = {f"α = {alpha}": f"steering/α={alpha}/own/accuracy" for alpha in ALPHAS}
    cells = _over_seeds(frame, columns)
    cells = cells[(cells != "–").all(axis=1)]
    text = "Accuracy on the same questions with other strengths α, without training again."
    return [] if cells.empty else [Section("Strength of feedback", text, cells)]


def _asked_for(frame: pd.DataFrame) -> Section:
    """Conditional retrieval and visual search."""
    columns = {
        f"precision at 1: {kind}, {when} pass": f"conditional/{when}/{kind}"
        for when, kind in (("first", "cls"), ("second", "cls"), ("second", "mean"), ("second", "weighted"))
    }
    counts = sorted(int(name.split("/")[1]) for name in frame if re.fullmatch(r"asymmetry/\d+/chance", name))
    columns |= {f"rank among {n} others": f"asymmetry/weights/{n}/rank" for n in counts}
    plain, striped = "red square/striped red square", "striped red square/red square"
    columns["striped among plain"] = f"asymmetry/weights/{striped}/{counts[-1]}/rank"
    columns["plain among striped"] = f"asymmetry/weights/{plain}/{counts[-1]}/rank"
    text = (
        "Conditional retrieval: how often the nearest other image, under a phrase, holds what it names, in percent; at "
        f"random {frame['conditional/chance'][0]:.1f}. Visual search: the rank of the target by the token weights; at "
        f"random {', '.join(f'{1 + n / 2:g}' for n in counts)}; the last two columns with {counts[-1]} others."
    )
    main = [*(f"precision at 1: {kind}, second pass" for kind in ("cls", "mean")), f"rank among {counts[-1]} others"]
    return Section("What is asked for", text, _over_seeds(frame, columns), main)


def _cost(frame: pd.DataFrame) -> Section:
    cells = _over_seeds(frame, {"minutes": "minutes"})
    groups = frame.groupby("variant", sort=False)
    cells.insert(2, "million parameters", [f"{millions:.2f}" for millions in groups["parameters"].first()])
    if "gmac" in frame:
        cells.insert(3, "GMAC per question", [f"{gmac:.4f}" for gmac in groups["gmac"].first()])
    text = (
        "Minutes of training can be compared only if nothing else ran on the machine at the same time. Multiply-adds "
        "are those of a forward pass with the questions per image of training."
    )
    return Section("Cost", text, cells, [name for name in cells if name.startswith("GMAC")])


def _at_equal_cost(runs: Sequence[Run]) -> list[Section]:
    """Accuracy in validation when all variants have seen as many questions, minutes or multiply-adds as the least."""
    courses = [(run.variant, course) for run in runs if len(course := _course(run))]
    if len(courses) < len(runs):
        return []
    least = {name: min(course[name].iloc[-1] for _, course in courses) for name in _COSTS}
    rows = [
        {
            "variant": variant,
            **{name: float(np.interp(most, course[name], course["val"], left=np.nan)) for name, most in least.items()},
        }
        for variant, course in courses
    ]
    columns = {f"{least[name]:.3g} {title}": name for name, title in _COSTS.items()}
    text = (
        "Official accuracy in validation in percent, between two validations by a straight line; – where a run was "
        "first validated later."
    )
    return [Section("At equal cost", text, _over_seeds(pd.DataFrame(rows), columns), list(columns))]


def _against(runs: Sequence[Run], base: str, splits: Sequence[str], grounded: bool) -> list[Section]:
    """Compare each variant with the baseline, question by question."""
    groups = _by_variant(runs)

    def compare(read: Callable[[Sequence[Run]], Mapping[str, pd.Series]]) -> pd.DataFrame:
        theirs = read(groups[base])
        ours = {name: read(of_variant) for name, of_variant in groups.items() if name != base}
        rows = [
            [name, *(_difference(of[one], theirs[one]) if one in of else "–" for one in theirs)]
            for name, of in ours.items()
        ]
        return pd.DataFrame(rows, columns=["variant", *theirs])

    text = (
        "Difference of accuracy in points, with its 95% interval by a paired bootstrap over questions (seeds averaged"
        " first); * marks intervals without 0. The spread between seeds is not included; see the first table."
    )
    sections = [Section(f"Against {base}", text, compare(lambda runs: _per_question(runs, splits)))]
    if grounded:
        text = "The same for grounding, over the measured questions."
        sections.append(Section(f"Grounding against {base}", text, compare(_per_text)))
    return sections


def _difference(ours: pd.Series, theirs: pd.Series) -> str:
    """Mean difference over common questions, with its interval, and * if the interval does not contain 0."""
    both = pd.concat([ours, theirs], axis=1, join="inner").sort_index()
    interval = paired_bootstrap(both.iloc[:, 0], both.iloc[:, 1])
    sure = "" if interval.low <= 0 <= interval.high else " *"
    return f"{interval.mean:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]{sure}"


def _per_question(runs: Sequence[Run], splits: Sequence[str]) -> dict[str, pd.Series]:
    """Accuracy by question, mean over runs, for each split."""
    return {
        split: _mean([pd.Series(json.loads((run.evaluation(split) / "per_question.json").read_text())) for run in runs])
        for split in splits
    }


def _per_text(runs: Sequence[Run]) -> dict[str, pd.Series]:
    """Values by text in percent, mean over runs, for each map and measure."""
    frames = []
    for run in runs:
        lines = (run.evaluation("grounding") / "grounding.jsonl").read_text().splitlines()
        frame = pd.json_normalize([json.loads(line) for line in lines], sep=" ")
        frames.append(frame.set_index(frame["id"].astype(str)).drop(columns=["id", "text"]))
    found = 100 * _mean(frames)
    columns = [f"{name} {measure}" for name in GROUNDING_MAPS for measure in ("energy", "pointing")]
    return {column: found[f"maps {column}"] for column in columns if f"maps {column}" in found}


def _mean(of_runs: Sequence[Any]) -> Any:
    """The mean over tables with the same index."""
    return pd.concat(of_runs).groupby(level=0).mean()


def _figure(groups: dict[str, list[Run]], path: Path) -> Path:
    """Figure of the first validation image with two questions (else the first), as seen by a run of each variant."""
    named = [(name, load_checkpoint(runs[0].path)) for name, runs in groups.items()]
    run = next(iter(groups.values()))[0]
    rows = load_split(run.data_dir, run.val_split if run.val_split != "minival" else "val")
    if run.val_split == "minival":  # its last ones
        rows = rows.select(range(max(0, len(rows) - int(run.data.minival_images)), len(rows)))
    row = next((row for row in rows if len(row["question"]) > 1), rows[0])
    image = decode_image(row["image"], f"image {row['image_id']}")
    return save_figure(checkpoints_figure(named, image, row["question"][:2], "fusion"), path)


def _curves(groups: dict[str, list[Run]], path: Path) -> Path | None:
    """Figure of accuracy in validation against questions, minutes and multiply-adds, mean and range over seeds; None
    without data."""
    figure = Figure(figsize=(13, 4 + 0.2 * math.ceil(len(groups) / 3)), layout="constrained", dpi=150)
    axes = figure.subplots(1, len(_COSTS), sharey=True)
    drawn = False
    for number, (name, runs) in enumerate(groups.items()):
        courses = [course for run in runs if len(course := _course(run))]
        if not courses:
            continue
        length = min(map(len, courses))
        together = np.stack([course[:length] for course in courses])  # (runs, points, costs and accuracy)
        mean, drawn = together.mean(axis=0), True
        for column, axis in enumerate(axes):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}  # 30 that differ
            (line,) = axis.plot(mean[:, column], mean[:, -1], marker="o", markersize=3, label=_short(name), **style)
            low, high = together[..., -1].min(axis=0), together[..., -1].max(axis=0)
            axis.fill_between(mean[:, column], low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if not drawn:
        return None
    axes[0].set_ylabel("official accuracy in validation, %")
    for axis, title in zip(axes, _COSTS.values(), strict=True):
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return save_figure(figure, path)


def _short(name: str) -> str:
    """The name of a variant, with its options by the last part of their names if these differ."""
    short = re.sub(r"[\w.]+[./](?=\w+=)", "", name)
    options = re.findall(r"\w+(?==)", short)
    return short if len({*options}) == len(options) else name


def _course(run: Run) -> pd.DataFrame:
    """A row per validation: `_COSTS` so far, and `val`; none if metrics.csv has none."""
    columns = ("seen/texts", "seen/minutes", "val/vqa_accuracy")
    path = run.path / "metrics.csv"
    rows = [[row.get(column) for column in columns] for row in (read_metrics(path).rows if path.is_file() else [])]
    seen = np.array([row for row in rows if all(row)], dtype=float).reshape(-1, 3)
    thousands = seen[:, 0] / 1000
    return pd.DataFrame(
        dict(zip([*_COSTS, "val"], [thousands, seen[:, 1], thousands * run.gmac, seen[:, 2]], strict=True))
    )


def _write(
    sweep: Path, runs: Sequence[Run], sections: Sequence[Section], figures: dict[str, Path], out: Path
) -> list[Path]:
    title = f"{sweep.name}: {len(runs)} runs, {len(_by_variant(runs))} variants"
    commands = "\n".join(dict.fromkeys(run.summary["command"] for run in runs))
    page, site = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]
    if len(runs) > 1 and (common := " ".join(_of_all(runs))):
        page.append(f"All runs: `{common}`")
        site.append(f"<p>All runs: <code>{html.escape(common)}</code></p>")
    for number, section in enumerate(sections):
        page += [f"## {section.title}", section.text, table(section.cells.columns, section.cells.to_numpy())]
        site += [f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>"]
        with pd.option_context("display.max_colwidth", None):
            site.append(section.cells.to_html(index=False, border=0))
        for name, figure in figures.items() if number == 0 else ():
            page += [f"## {name}", f"![{name}]({figure.name})"]
            site.append(f"<h2>{name}</h2><img src='{figure.name}' alt='{name}'>")
    page.append(f"## Commands\n\n```\n{commands}\n```")
    site.append(f"<h2>Commands</h2><pre>{html.escape(commands)}</pre>")
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    files = {out / "report.md": "\n\n".join(page), out / "report.html": "\n".join([head, *site])}
    return [*(write_text(path, f"{text}\n") for path, text in files.items()), *figures.values()]


_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:75em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child"
    "{text-align:left}img{max-width:100%}pre{overflow:auto;background:#f6f6f6;padding:1em}"
)
