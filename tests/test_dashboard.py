"""What goes to W&B beside numbers: the workspace of a project, and which data and checkpoint belong to a run."""

import sys

import pytest
import wandb_workspaces.reports.v2 as wr

from vlabs import dashboard
from vlabs.data.loading import identity_of
from vlabs.errors import run_cli
from vlabs.runs.logging import log_data, log_outcome


class Online:
    """A W&B run that keeps what it is given."""

    def __init__(self, offline=False):
        self.offline, self.id = offline, "abc"
        self.used, self.logged, self.summary = [], [], {}
        self.use_artifact = self.used.append

    def log_artifact(self, artifact, aliases):
        self.logged.append((artifact, aliases))


def keys(panel):
    """The names of what a panel shows."""
    metrics = [*getattr(panel, "y", []), *getattr(panel, "metrics", []), *getattr(panel, "media_keys", [])]
    names = [getattr(metric, "name", metric) for metric in metrics]
    return [*names, *([panel.table_name] if isinstance(panel, wr.WeavePanelSummaryTable) else [])]


def test_the_workspace_shows_only_what_runs_log(tiny_run):
    """Offline W&B keeps a binary file, so what is logged is read from metrics.csv and the figures."""
    run, _ = tiny_run
    logged = set((run / "metrics.csv").read_text().splitlines()[0].split(","))
    logged |= {f"figures/{path.name.split('_step')[0]}" for path in (run / "figures").iterdir()}
    logged |= {"fit_seconds", "parameters"}  # of the summary, see below
    logged |= {"val/ir@1", "val/tr@1", "val/predictions"}  # of the caption tasks, and a table
    workspace = dashboard.build_workspace("me", "project")
    shown = {key for section in workspace.sections for panel in section.panels for key in keys(panel)}
    assert shown <= logged, shown - logged
    assert {"val/vqa_accuracy", "val/grounding/norm_energy", "val/predictions", "fit_seconds"} <= shown


def test_curves_and_bars_are_grouped_by_variant():
    workspace = dashboard.build_workspace("me", "project")
    panels = [panel for section in workspace.sections for panel in section.panels if hasattr(panel, "groupby")]
    assert len(panels) > 5
    assert {panel.groupby.name for panel in panels} == {"variant"}


def test_the_workspace_can_be_sent():
    sent = dashboard.build_workspace("me", "project")._to_model().model_dump_json(by_alias=True)
    assert "val/vqa_accuracy" in sent


def test_without_an_account_there_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("vlabs.runs.logging.logged_in", lambda: False)
    monkeypatch.setattr(sys, "argv", ["dashboard", "--project", "vlabs"])
    with pytest.raises(SystemExit) as stop:
        run_cli(dashboard.main)
    assert stop.value.code == 1
    assert "wandb login" in capsys.readouterr().err


def test_data_and_checkpoint_of_an_online_run_are_its_lineage(tiny_data, tiny_run):
    run = Online()
    identity = identity_of(tiny_data)
    thread = log_data(run, [identity])
    assert thread is not None
    thread.join(60)
    summary = {"parameters": 3, "fit_seconds": 1.5, "epochs": 1, "steps": 2, "status": "done"}
    log_outcome(run, summary, str(tiny_run[0] / "checkpoints/best.ckpt"))
    (used,) = run.used
    assert used.type == "dataset"
    assert used.metadata["manifest_sha256"] == identity["manifest_sha256"]
    assert list(used.manifest.entries) == ["manifest.json"]
    ((logged, aliases),) = run.logged
    assert (logged.type, list(logged.manifest.entries), aliases) == ("model", ["best.ckpt"], ["best"])
    assert run.summary["fit_seconds"] == 1.5


def test_an_offline_run_has_no_artifacts(tiny_data):
    run = Online(offline=True)
    assert log_data(run, [identity_of(tiny_data)]) is None
    log_outcome(run, dict.fromkeys(("parameters", "fit_seconds", "epochs", "steps"), 1), "missing.ckpt")
    assert not run.used
    assert not run.logged
