"""Kill a training again and again at random moments, resume it, and compare its end with a run that nothing stopped.

    python benchmarks/soak.py            20 kills; the last line is JSON with `same`

The training is a small one on the embedded corpus, with dropout, augmentation, two loader processes and a checkpoint
after every step, so that many kills hit the writing of one. SIGKILL leaves a process no time for anything.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

OPTIONS = [
    "task=vqa", "data=scenes", "data.size=tiny", "data.dir=data", "data.image_size=32", "data.batch_size=16",
    "data.questions_per_image=4", "data.num_workers=2", "data.rand_augment=rand-m9-n2", "model.fusion.dropout=0.1",
    "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "logger=csv",
    "checkpoints.every_minutes=null", "checkpoints.every_n_steps=1", "callbacks.predictions.every_n_validations=0",
]  # fmt: skip


def start(arguments: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    """`python -m vlabs.train` in a process group of its own, so that loader processes die with it."""
    return subprocess.Popen(
        [sys.executable, "-m", "vlabs.train", *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a run that must succeed."""
    _, errors = process.communicate()
    if process.returncode:
        sys.exit(f"error: {' '.join(map(str, process.args))} failed:\n{errors.decode()}")  # type: ignore[arg-type]


def kill_somewhere(process: subprocess.Popen[bytes], run: Path, draw: random.Random, since: int) -> str | None:
    """Kill at a random moment after the run has gone on; what was being done, or None if it ended before."""
    last, partial = run / "checkpoints" / "last.ckpt", run / "checkpoints" / "last.ckpt.partial"
    while process.poll() is None and (not last.is_file() or last.stat().st_mtime_ns <= since):
        time.sleep(0.002)
    if draw.random() < 0.5:  # half of the kills wait for a checkpoint that is being written
        until = time.perf_counter() + 5
        time.sleep(draw.uniform(0, 0.5))
        while process.poll() is None and not partial.exists() and time.perf_counter() < until:
            pass
    else:
        time.sleep(draw.uniform(0, 2))
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return "writing a checkpoint" if partial.exists() else "training"


def soak(cwd: Path, kills: int, epochs: int, seed: int) -> dict[str, Any]:
    """The uninterrupted run, the other one with its kills, and whether they end alike."""
    options = [*OPTIONS, f"trainer.max_epochs={epochs}"]
    finish(start([*options, "hydra.run.dir=whole"], cwd))
    draw, run = random.Random(seed), cwd / "killed"
    moments: list[str] = []
    process = start([*options, "hydra.run.dir=killed"], cwd)
    while len(moments) < kills:
        last = run / "checkpoints" / "last.ckpt"
        moment = kill_somewhere(process, run, draw, last.stat().st_mtime_ns if last.is_file() else 0)
        if moment is None:
            finish(process)
            sys.exit(f"error: the run ended after {len(moments)} kills: pass more --epochs")
        moments.append(moment)
        step = torch.load(last, weights_only=True)["global_step"]
        print(f"kill {len(moments):3} while {moment}; the last checkpoint is of step {step}", flush=True)
        process = start(["resume=killed"], cwd)
    finish(process)
    ends = [torch.load(cwd / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("whole", "killed")]
    same = all(torch.equal(value, ends[1]["state_dict"][name]) for name, value in ends[0]["state_dict"].items())
    return {
        "same": same,
        "steps": [end["global_step"] for end in ends],
        "kills": len(moments),
        "kills_while_writing": moments.count("writing a checkpoint"),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60, help="long enough for all kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), options.kills, options.epochs, options.seed)
    print(json.dumps(result))
    sys.exit(not result["same"])


if __name__ == "__main__":
    main()
