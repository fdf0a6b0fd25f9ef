"""What `make demo` runs: corpus, training, evaluation, one picture; each step says what it does and how long it took.

python -m vlabs.demo --out demo
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets

from vlabs.attention.figures import Panel, question_figure, save_figure
from vlabs.data.prepared import load_split
from vlabs.data.preprocessing import decode_image
from vlabs.errors import UserError, run_cli
from vlabs.predictor import load


def main() -> None:
    """Entry point of `python -m vlabs.demo`."""
    parser = argparse.ArgumentParser(prog="python -m vlabs.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="the folder that is left")
    parser.add_argument("overrides", nargs="*", help="overrides of the training, e.g. trainer.max_epochs=1")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if out.exists() and not (out / "run" / "config.yaml").is_file() and any(out.iterdir()):
        raise UserError(f"--out {out} exists and is no demo folder: name another")
    shutil.rmtree(out, ignore_errors=True)
    started = time.perf_counter()
    _step(
        "1/3 training a small AbSViT, RoBERTa and fusion from scratch on the embedded corpus",
        "vlabs.train", "task=vqa", "logger=csv", f"hydra.run.dir={out / 'run'}", *arguments.overrides,
    )  # fmt: skip
    _step(
        "2/3 evaluating the best checkpoint on the validation split",
        "vlabs.evaluate", f"ckpt={out / 'run'}", "split=val", f"hydra.run.dir={out / 'evaluation'}",
    )  # fmt: skip
    print("== 3/3 one image, two questions, and where the model looked for each", flush=True)
    data_dir = _data_dir(out)
    picture = draw(out / "run", data_dir, out / "picture.png")
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    print(f"\naccuracy on questions that are not yes/no: {metrics['not_yes_no']:.1f}%", end="")
    raw = Path(data_dir + "-raw") / "scenes.json"
    if raw.is_file():
        alone = json.loads(raw.read_text())["question_only_accuracy"]
        print(f" (the best answer to the question alone: {alone['not yes/no']:.1f}%)", end="")
    print(f"\n{picture}\ndone in {(time.perf_counter() - started) / 60:.1f} minutes; everything is in {out}/")


def _step(title: str, module: str, *arguments: str) -> None:
    print(f"== {title}\n   python -m {module} {' '.join(arguments)}", flush=True)
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if result.returncode:
        sys.exit(result.returncode)
    print(f"   took {time.perf_counter() - started:.0f} s", flush=True)


def _data_dir(out: Path) -> str:
    from omegaconf import OmegaConf

    return str(OmegaConf.load(out / "run" / "config.yaml").data.dir)


def draw(ckpt: Path, data_dir: str, path: Path) -> Path:
    """The picture of the demo: the first validation image with two questions about different objects."""
    row, positions = _two_questions(load_split(data_dir, "val"))
    predictor = load(ckpt)
    image = decode_image(row["image"], f"image {row['image_id']}")
    answers = predictor.answer(image, [row["question"][position] for position in positions])
    panels = []
    for position, answer in zip(positions, answers, strict=True):
        human = row["answers"][position]
        top = ", ".join(f"{text} {probability:.0%}" for text, probability in answer.answers[:3])
        panels.append(Panel(answer.question, answer.map, [top, f"true: {max(human, key=human.count)}"]))
    return save_figure(question_figure(predictor.preprocessing.resize(image), panels, "fusion attention"), path)


def _two_questions(rows: datasets.Dataset) -> tuple[dict, tuple[int, int]]:
    for row in rows:
        targets = [frozenset(instances) for instances in row["target_instances"]]
        about = [n for n, t in enumerate(targets) if len(t) == 1 and row["answer_type"][n] == "other"]
        for first in about:
            for second in about:
                if targets[first].isdisjoint(targets[second]):
                    return row, (first, second)
    row = rows[0]
    return row, (0, min(1, len(row["question"]) - 1))


if __name__ == "__main__":
    run_cli(main)
