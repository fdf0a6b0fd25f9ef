"""The W&B workspace of a project, from code: `vlabs dashboard --project vlabs`.

Accuracy by variant, grounding over training, the figures and prediction tables, and cost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlabs.errors import UserError, run_cli
from vlabs.utils.arguments import Parser

if TYPE_CHECKING:
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

# The key in a W&B run's config under which `vlabs train` writes the choice of model/topdown.
VARIANT = "variant"


def build_workspace(entity: str, project: str) -> ws.Workspace:
    """The workspace, not yet saved; runs are grouped by variant."""
    from wandb_workspaces import workspaces as ws
    from wandb_workspaces.reports import v2 as wr

    by_variant = {"groupby": wr.Config(VARIANT), "groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}

    def lines(title: str, *metrics: str) -> wr.LinePlot:
        return wr.LinePlot(title=title, x="trainer/global_step", y=list(metrics), **by_variant)

    def bars(title: str, metric: str) -> wr.BarPlot:
        return wr.BarPlot(title=title, metrics=[wr.SummaryMetric(metric)], **by_variant)

    accuracy = [
        bars("VQA accuracy (val), %", "val/vqa_accuracy"),
        lines("VQA accuracy (val), %", "val/vqa_accuracy"),
        *[lines(f"{kind}, %", f"val/vqa_accuracy/{kind}") for kind in ("yes/no", "number", "other")],
        lines("image retrieval R@1 (val), %", "val/ir@1"),
        lines("text retrieval R@1 (val), %", "val/tr@1"),
    ]
    grounding = [
        lines(f"energy of the {name} map inside the region, %", f"val/grounding/{name}_energy")
        for name in ("norm", "fusion")
    ]
    seen = [
        wr.WeavePanelSummaryTable(table_name="val/predictions"),
        wr.MediaBrowser(media_keys=[f"figures/{name}" for name in ("questions", "pathway", "alpha")]),
    ]
    cost = [
        bars("training, s", "fit_seconds"),
        bars("parameters", "parameters"),
        lines("texts per second", "train/samples_per_second"),
        lines("training loss", "train/loss"),
    ]
    sections = [
        ws.Section(name="Accuracy by variant", panels=accuracy, is_open=True),
        ws.Section(name="Grounding over training", panels=grounding, is_open=True),
        ws.Section(name="What it answers, and where it looks", panels=seen, is_open=True),
        ws.Section(name="Cost", panels=cost),
    ]
    return ws.Workspace(entity=entity, project=project, name="vlabs", sections=sections)


def main() -> None:
    """Entry point of `vlabs dashboard`."""
    parser = Parser("dashboard", __doc__.splitlines()[0])
    parser.add_argument("--project", required=True, help="the W&B project, as in logger.project")
    parser.add_argument("--entity", help="the user or team that owns it (default: your own)")
    arguments = parser.read()
    import wandb

    from vlabs.runs.logging import logged_in

    if not logged_in():
        raise UserError("W&B: not logged in, so no workspace can be made: run `wandb login`")
    workspace = build_workspace(arguments.entity or str(wandb.Api().default_entity), arguments.project)
    workspace.save()
    print(workspace.url)


if __name__ == "__main__":
    run_cli(main)
