"""`make demo`: corpus, training, evaluation and a figure; each step prints what it does and how long it took.

vlabs demo --out demo
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlabs.errors import UserError, run_cli
from vlabs.utils.arguments import Parser
from vlabs.utils.files import is_free, is_marked, locked, mark, reason_of

if TYPE_CHECKING:
    import datasets

MADE = ("run", "evaluation", "grounding")
PICTURE = "picture.png"
TRAINING = ("experiment=scenes_vqa", "init=scenes", "trainer.max_epochs=1")


def main() -> None:
    """Entry point of `vlabs demo`."""
    parser = Parser("demo", __doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"), help="the folder of the results")
    parser.add_argument("overrides", nargs="*", help="overrides of the training, e.g. trainer.max_epochs=1")
    arguments = parser.read()
    with _demo_folder(arguments.out) as out:
        _run(out, arguments.overrides)


@contextlib.contextmanager
def _demo_folder(out: Path) -> Iterator[Path]:
    """A new folder, or one of an earlier demo, whose results are removed.

    Raises:
        UserError: the folder has something else, or another demo is running there.
    """
    if not is_free(out) and not is_marked(out, "demo"):
        raise UserError(f"--out {out} exists and is not a demo's folder: name another")
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark(out, "demo")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {reason_of(error)}; name another folder") from None
    with locked(out, f"--out {out}: another demo is running there: name another folder"):
        for name in MADE:
            shutil.rmtree(out / name, ignore_errors=True)
        (out / PICTURE).unlink(missing_ok=True)
        yield out


def _run(out: Path, overrides: Sequence[str]) -> None:
    started = time.perf_counter()
    _step(
        "1/4 fine-tuning a small AbSViT, RoBERTa and fusion on the embedded corpus, from vlabs' own start",
        "train", *TRAINING, "logger=csv", f"hydra.run.dir={out / 'run'}", *overrides,
    )  # fmt: skip
    _step(
        "2/4 evaluating the best checkpoint on the validation split",
        "evaluate", f"ckpt={out / 'run'}", "split=val", f"hydra.run.dir={out / 'evaluation'}",
    )  # fmt: skip
    _step(
        "3/4 measuring whether it looks at what the questions are about",
        "evaluate", "task=grounding", f"ckpt={out / 'run'}", "split=val", "task.maps=[weights,norm,fusion]",
        f"hydra.run.dir={out / 'grounding'}",
    )  # fmt: skip
    print("== 4/4 one image, three questions, and where the model looked for each", flush=True)
    data_dir = _data_dir(out)
    picture = draw(out / "run", data_dir, out / PICTURE)
    metrics = json.loads((out / "evaluation" / "metrics.json").read_text())
    print(f"\naccuracy on questions that are not yes/no: {metrics['not_yes_no']:.1f}%", end="")
    raw = Path(data_dir + "-raw") / "scenes.json"
    if raw.is_file():
        alone = json.loads(raw.read_text())["question_only_accuracy"]
        print(f" (the best answer to the question alone: {alone['not yes/no']:.1f}%)", end="")
    looked = json.loads((out / "grounding" / "metrics.json").read_text())
    print(
        f"\nthe object in question has {looked['weights/energy']:.1f}% of the prior's map, whose maximum is on it for "
        f"{looked['weights/pointing']:.1f}% of the questions (a uniform map: {looked['area']:.1f}%)"
    )
    print(f"{picture}\ndone in {(time.perf_counter() - started) / 60:.1f} minutes; everything is in {out}/")


def _step(title: str, *arguments: str) -> None:
    print(f"== {title}\n   vlabs {' '.join(arguments)}", flush=True)
    started = time.perf_counter()
    result = subprocess.run([sys.executable, "-m", "vlabs.cli", *arguments], check=False)
    if result.returncode:
        sys.exit(result.returncode)
    print(f"   took {time.perf_counter() - started:.0f} s", flush=True)


def _data_dir(out: Path) -> str:
    from omegaconf import OmegaConf

    return str(OmegaConf.load(out / "run" / "config.yaml").data.dir)


def draw(ckpt: Path, data_dir: str, path: Path) -> Path:
    """The figure of the demo: the image of `three_questions` and, for each question, where ξ points and the answer."""
    # Imported here, so that --help is fast.
    from vlabs.attention.figures import Cell, as_view, question_figure, save_figure
    from vlabs.data.prepared import load_split
    from vlabs.data.preprocessing import decode_image
    from vlabs.prediction.predictor import load

    row, positions = three_questions(load_split(data_dir, "val"))
    predictor = load(ckpt)
    image = decode_image(row["image"], f"image {row['image_id']}")
    answers = predictor.answer(image, [row["question"][position] for position in positions], map_name="weights")
    view = as_view(image, predictor.preprocessing.box(image.size))
    cells = []
    for position, answer in zip(positions, answers, strict=True):
        human = row["answers"][position]
        top = ", ".join(f"{text} {probability:.0%}" for text, probability in answer.answers[:3])
        note = f"{top}\ntrue: {max(human, key=human.count)}"
        cells.append(Cell(view, answer.map, answer.map_name, answer.question, note))
    return save_figure(question_figure(view, cells), path)


def three_questions(rows: datasets.Dataset) -> tuple[dict[str, Any], list[int]]:
    """Choose a row and the positions of three questions about different objects, without looking at answers.

    It is the first row with three questions of the type `other`, each about one object and all about different ones; of
    several questions about the same object, the first is taken. If no row has three, the row with the most.
    """
    best: tuple[dict[str, Any], list[int]] = (rows[0], [0])
    for row in rows:
        about: dict[int, int] = {}
        for position, targets in enumerate(row["target_instances"]):
            if len(targets) == 1 and row["answer_type"][position] == "other":
                about.setdefault(targets[0], position)
        if len(about) > len(best[1]):
            best = row, sorted(about.values())[:3]
        if len(best[1]) == 3:
            break
    return best


if __name__ == "__main__":
    run_cli(main)
