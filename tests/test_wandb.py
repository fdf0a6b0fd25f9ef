"""W&B that is not there, or goes away: training does not care."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from conftest import LOOKS, command

from vlabs.runs import logging


class Handler(BaseHTTPRequestHandler):
    """As much of W&B's server as makes its client believe that a run is online."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        entity = {"id": "e", "name": "me"}
        project = {"id": "p", "name": "vlabs", "entity": entity}
        reply: dict = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            if "upsertBucket" in asked["query"]:
                name = asked["variables"].get("name")
                bucket = {"id": "x", "name": name, "displayName": "d", "config": "{}", "project": project}
                reply = {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0}, "inserted": True}}
            elif "viewer" in asked["query"]:
                user = {"id": "v", "username": "me", "entity": "me", "flags": "{}", "teams": {"edges": []}}
                reply = {"viewer": user}
            elif "model(" in asked["query"]:
                reply = {"model": project | {"bucket": None}}
            reply = {"data": reply}
        content = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if "file_stream" in self.path:
            # The run is online; from now on nobody answers.
            threading.Thread(target=self.server.shutdown).start()
            self.server.socket.close()

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server():
    """A server that goes away as soon as it has been sent a run's first data."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever)
    thread.start()
    yield found, thread
    found.shutdown()
    found.server_close()


def train(options, cwd, port):
    return command(
        "vlabs.train", *options, "hydra.run.dir=run", cwd=cwd, WANDB_API_KEY="a" * 40,
        WANDB_BASE_URL=f"http://127.0.0.1:{port}", WANDB_INIT_TIMEOUT="10", WANDB_FINISH_TIMEOUT="3",
        WANDB__GRAPHQL_RETRY_MAX="1", WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS="1",
    )  # fmt: skip


def test_wandb_that_goes_away_in_mid_run_costs_nothing_but_its_upload(tiny_options, tmp_path, server):
    # Figures and tables at every validation: W&B would wait for its server at each.
    found, thread = server
    result = train([*tiny_options, *LOOKS[:1]], tmp_path, found.server_port)
    assert result.returncode == 0, result.stderr
    assert not thread.is_alive(), "the run was never online"
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 6
    assert list((tmp_path / "run/wandb").glob("run-*/run-*.wandb"))


def test_a_server_that_was_waited_for_is_not_asked_again_until_much_later(capsys, monkeypatch):
    monkeypatch.setattr(logging, "_silent_until", 0.0)
    now = [100.0]
    monkeypatch.setattr(logging, "time", SimpleNamespace(monotonic=lambda: now[0]))
    asked = []

    def wait():
        asked.append(now[0])
        now[0] += 3
        raise OSError("nobody answers")

    for later in (0, 30, 40):
        now[0] += later
        logging.send("a figure", wait)
    assert asked == [100, 173]
    assert capsys.readouterr().out.count("W&B: a figure cannot be sent (nobody answers)") == 2


def test_wandb_that_cannot_be_reached_means_a_run_recorded_offline(tiny_options, tmp_path):
    result = train(tiny_options, tmp_path, 9)
    assert result.returncode == 0, result.stderr
    assert "cannot be reached" in result.stdout
    assert list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"


def test_a_run_that_continues_is_the_same_run_of_the_same_variant(tiny_run, tmp_path):
    shutil.copytree(tiny_run[0], tmp_path / "run")
    less = [f"callbacks.{name}.every_n_validations=0" for name in ("predictions", "grounding")]
    known = (tmp_path / "run/wandb/run_id").read_text()
    result = command("vlabs.train", "resume=run", "trainer.max_epochs=3", *less, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "wandb:" not in result.stdout + result.stderr  # only what vlabs says of it
    assert (tmp_path / "run/wandb/run_id").read_text() == known
    first, second = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert first.name.endswith(f"-{known}")
    assert second.name.endswith(f"-{known}")
    for part in (first, second):
        logged = (part / f"run-{known}.wandb").read_bytes()
        assert b"variant" in logged
        assert b'"absvit"' in logged
