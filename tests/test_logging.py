"""W&B goes online with credentials only; metrics.csv survives a resume."""

import csv

import pytest

from vlabs.runs.logging import csv_logger, logged_in


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("nobody")
def test_nobody_is_logged_in_without_credentials():
    assert not logged_in()


@pytest.mark.usefixtures("nobody")
def test_an_api_key_or_the_netrc_of_wandb_login_counts(monkeypatch, tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert logged_in()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not logged_in()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert logged_in()


def test_a_resumed_csv_keeps_the_rows_before_the_checkpoint(tmp_path):
    logger = csv_logger(tmp_path)
    for step in range(5):
        logger.log_metrics({"train/loss": float(step)}, step=step)
    again = csv_logger(tmp_path, resumed_step=3)
    again.log_metrics({"train/loss": 30.0, "val/new": 1.0}, step=3)
    again.save()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [float(row["train/loss"]) for row in rows] == [0, 1, 2, 30]
    assert rows[3]["val/new"] == "1.0"


def test_a_validation_that_is_done_again_is_logged_once(tmp_path):
    logger = csv_logger(tmp_path)
    for step, metrics in enumerate([{"train/loss": 1.0, "val/loss": 5.0}, {"train/loss": 2.0}]):
        logger.log_metrics(metrics, step=step)
    logger.log_metrics({"val/loss": 6.0}, step=1)
    again = csv_logger(tmp_path, resumed_step=2, validates=True)
    again.log_metrics({"val/loss": 6.0}, step=1)
    again.save()
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = [(row["step"], row["train/loss"], row["val/loss"]) for row in csv.DictReader(file)]
    assert rows == [("0", "1.0", "5.0"), ("1", "2.0", ""), ("1", "", "6.0")]
