"""Treat trainings as people do, at random, again and again, and compare what must be equal.

    python benchmarks/soak.py            20 rounds; the last line is JSON with `same`

In every round two small runs on the embedded corpus (dropout, augmentation, two loader processes, a moving average, a
checkpoint after every step) continue for a while, each until something is done to it: SIGKILL, half of the time while a
checkpoint is written; SIGTERM; Ctrl-C to all its processes, as a terminal sends it; a full disk; and when it has
stopped, a cut metrics.csv or summary.json, or another place.

- One continues as it was: it must end with the weights, the average and the optimizer's state, bit for bit, of a run
  that nothing stopped, and with no step logged twice.
- The other continues with another batch size and accumulation every time: every question must come once an epoch, and
  its rate must continue where it was and end at 0.

A run that is refused, or that does not stop with the status that it should, fails the soak.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

OPTIONS = [
    "task=vqa", "data=scenes", "data.size=tiny", "data.dir=data", "data.image_size=32", "data.batch_size=16",
    "data.questions_per_image=4", "data.num_workers=2", "data.rand_augment=rand-m9-n2", "model.fusion.dropout=0.1",
    "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "logger=csv",
    "checkpoints.every_minutes=null", "checkpoints.every_n_steps=1", "callbacks=[default,ema]",
    "callbacks.predictions=null", "callbacks.grounding=null",
]  # fmt: skip
WAYS = ("kill", "kill while writing", "SIGTERM", "Ctrl-C", "full disk")
MISHAPS = ("", "", "move", "cut metrics.csv", "empty summary.json", "no last.ckpt")
# Runs vlabs.train and writes down what every batch was of, and at which rate.
CHILD = """
import json, os, sys
import vlabs.train
from vlabs.tasks.base import Task

step = Task.training_step
def recorded(self, batch, batch_idx):
    rate = self.trainer.optimizers[0].param_groups[0]["lr"]
    found = [self.trainer.current_epoch, self.trainer.global_step, rate, self.sample_ids(batch)]
    with open(os.environ["SOAK_SEEN"], "a") as file:
        file.write(json.dumps(found) + "\\n")
    return step(self, batch, batch_idx)

Task.training_step = recorded
vlabs.train.main()
"""


class Run:
    """A training that is treated badly.

    Attributes:
        path: where its folder is now.
        seen: of every batch, the epoch, the steps before it, the rate and the questions.
    """

    def __init__(self, cwd: Path, name: str, arguments: list[str]) -> None:
        self.cwd, self.name, self.arguments = cwd, name, arguments
        self.path = cwd / name
        self.seen: list[tuple[int, int, float, list[int]]] = []
        self.process: subprocess.Popen[bytes] | None = None
        self.moves = 0

    @property
    def last(self) -> Path:
        """Its last checkpoint."""
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def step(self) -> int:
        """Optimiser steps in the last checkpoint; 0 without one."""
        for path in (self.last, self.last.with_name("last.ckpt.previous")):
            if path.is_file():
                return int(torch.load(path, weights_only=True)["global_step"])
        return 0

    def start(self, *options: str, file_bytes: int | None = None) -> None:
        """Begin it, or continue with it, in a process group of its own."""
        self.read()
        began = self.step > 0
        self.seen = [one for one in self.seen if one[1] < self.step]
        place = [f"resume={self.path}"] if began else [*self.arguments, f"hydra.run.dir={self.path}"]

        def limit() -> None:
            if file_bytes is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD, *place, *options], cwd=self.cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "SOAK_SEEN": str(self.cwd / f"{self.name}.jsonl")},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=limit,
        )  # fmt: skip

    def read(self) -> None:
        """Take over what the processes have written down since."""
        path = self.cwd / f"{self.name}.jsonl"
        if path.is_file():
            lines = path.read_text().splitlines()
            path.unlink()
            self.seen += [tuple(json.loads(line)) for line in lines if line.endswith("]")]  # type: ignore[misc]

    def end(self, *statuses: int) -> None:
        """Wait for the process, which must end with one of the statuses.

        Raises:
            SystemExit: it ended with another.
        """
        assert self.process is not None
        _, said = self.process.communicate()
        if self.process.returncode not in statuses:
            sys.exit(f"error: {self.name} ended with {self.process.returncode}, not {statuses}:\n{said.decode()}")
        if b"Traceback" in said:
            sys.exit(f"error: {self.name} showed a traceback:\n{said.decode()}")

    def stop(self, way: str, draw: random.Random) -> bool:
        """Let it continue a little and stop it; False where it ended before."""
        assert self.process is not None
        since, writing = self.step, self.last.parent
        until = time.perf_counter() + 60
        while self.process.poll() is None and self.step <= since and time.perf_counter() < until:
            time.sleep(0.02)
        if way == "kill while writing":
            until = time.perf_counter() + 5
            while self.process.poll() is None and not [*writing.glob(".vlabs-*")] and time.perf_counter() < until:
                pass
        else:
            time.sleep(draw.uniform(0, 1.5))
        if self.process.poll() is not None:
            return False
        if way.startswith("kill"):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.end(-signal.SIGKILL)
        elif way == "SIGTERM":
            self.process.send_signal(signal.SIGTERM)
            self.end(128 + signal.SIGTERM, 0)
        elif way == "Ctrl-C":
            os.killpg(self.process.pid, signal.SIGINT)
            self.end(128 + signal.SIGINT, 0)
        return True

    def suffer(self, mishap: str) -> None:
        """What happens to the folder of a run that is stopped."""
        if mishap == "move":
            self.moves += 1
            self.path = self.path.rename(self.cwd / f"{self.name} (moved {self.moves})")
        elif mishap == "cut metrics.csv" and (path := self.path / "metrics.csv").is_file():
            path.write_bytes(path.read_bytes()[:-7] + bytes(5))
        elif mishap == "empty summary.json":
            (self.path / "summary.json").write_text("")
        elif mishap == "no last.ckpt" and self.last.with_name("last.ckpt.previous").is_file():
            self.last.unlink(missing_ok=True)


def round_of(run: Run, draw: random.Random, options: list[str]) -> str:
    """Let a run continue, stop it and do something to it; what that was, or `` if it ended before."""
    way, mishap = draw.choice(WAYS), draw.choice(MISHAPS)
    if way == "full disk":
        size = run.last.stat().st_size if run.last.is_file() else 10_000
        # Without loader processes, which hand over their batches in files of memory that the limit is on too.
        run.start(*options, "data.num_workers=0", file_bytes=draw.choice([2_000, size // 2]))
        run.end(1)
    else:
        run.start(*options, "data.num_workers=2")
        if not run.stop(way, draw):
            run.end(0)
            return ""
    run.suffer(mishap)
    return f"{way}, {mishap}" if mishap else way


def differences(whole: Run, run: Run) -> list[str]:
    """The parts in which two runs did not end alike."""
    ends = [torch.load(one.last, weights_only=True) for one in (whole, run)]
    parts = ("state_dict", "current_model_state", "averaging_state")
    found = [
        f"{part}/{name}" for part in parts for name, value in ends[0][part].items()
        if not torch.equal(value, ends[1][part][name])
    ]  # fmt: skip
    for ours, theirs in zip(*(end["optimizer_states"] for end in ends), strict=True):
        found += [
            f"optimizer/{key}" for key, state in ours["state"].items()
            if not all(torch.equal(value, theirs["state"][key][name]) for name, value in state.items())
        ]  # fmt: skip
    with open(run.path / "metrics.csv", newline="") as file:
        steps = Counter(row["step"] for row in csv.DictReader(file) if row["train/loss"])
    return found + [f"step {step} is logged {times} times" for step, times in steps.items() if times > 1]


def faults(run: Run, epochs: int) -> list[str]:
    """What is wrong with a run that went on under many batch sizes: questions not seen once, rates that jump."""
    run.read()
    everything = {question for _, _, _, ids in run.seen for question in ids}
    found = []
    for epoch in range(epochs):
        times = Counter(question for number, _, _, ids in run.seen if number == epoch for question in ids)
        if set(times) != everything or set(times.values()) != {1}:
            lost, twice = len(everything - set(times)), sum(count > 1 for count in times.values())
            found.append(f"epoch {epoch}: {lost} questions lost, {twice} twice")
    rates = {step: rate for _, step, rate, _ in run.seen}
    falling = [rates[step] for step in sorted(rates)]
    falling = falling[falling.index(max(falling)) :]
    steps = [a - b for a, b in zip(falling, [*falling[1:], 0.0], strict=True)]
    if min(steps) <= 0 or max(steps) > 0.25 * max(falling):
        found.append(f"rates jump by {min(steps):.3g} to {max(steps):.3g}")
    return found


def soak(cwd: Path, rounds: int, epochs: int, seed: int) -> dict[str, Any]:
    """All rounds, and how the runs ended."""
    draw = random.Random(seed)
    arguments = [*OPTIONS, f"trainer.max_epochs={epochs}"]
    whole = Run(cwd, "whole", arguments)
    whole.start()
    whole.end(0)
    same, otherwise = Run(cwd, "same", arguments), Run(cwd, "otherwise", arguments)
    happened: Counter[str] = Counter()
    for number in range(1, rounds + 1):
        size, accumulate = draw.choice([8, 16, 32, 48]), draw.choice([1, 1, 2])
        for run, options in (
            (same, []), (otherwise, [f"data.batch_size={size}", f"trainer.accumulate_grad_batches={accumulate}"])
        ):  # fmt: skip
            what = round_of(run, draw, options)
            if not what:
                sys.exit(f"error: {run.name} ended after {number} rounds: pass more --epochs")
            happened.update(what.split(", "))
            print(f"round {number:3}, {run.name:9}: {what}; the last checkpoint is of step {run.step}", flush=True)
    for run in (same, otherwise):
        run.start()
        run.end(0)
    wrong = differences(whole, same) + faults(otherwise, epochs)
    steps = {run.name: run.step for run in (whole, same, otherwise)}
    return {"same": not wrong, "wrong": wrong, "steps": steps, "seed": seed, **dict(sorted(happened.items()))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=24, help="long enough for all rounds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.rounds, options.epochs, options.seed)
    print(json.dumps(result))
    sys.exit(not result["same"])


if __name__ == "__main__":
    main()
