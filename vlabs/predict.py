"""Answer questions about an image, or label statements, and show where the model looked.

vlabs predict --ckpt RUN --image street.jpg --question "What's left of it, the red one?"
vlabs predict --ckpt RUN --image left.jpg --image right.jpg --question "Both pictures show a dog."   # nlvr2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlabs.attention import MAPS, VIEWS
from vlabs.errors import run_cli, show
from vlabs.utils.arguments import Parser, add_keep, add_out, check_out
from vlabs.utils.imports import quick_imports

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlabs.attention.figures import View
    from vlabs.prediction.predictor import Answer


def main() -> None:
    """Entry point of `vlabs predict`."""
    parser = Parser("predict", __doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, export, or released METER file")
    parser.add_argument(
        "--image", required=True, action="append", help="the image; twice, left and right, for a model of pairs"
    )
    parser.add_argument(
        "--question", required=True, action="append", help="a question or statement; may be given several times"
    )
    add_out(parser, "prediction.png")
    parser.add_argument(
        "--map", choices=MAPS, help="the map (default: weights if a prior steers the encoder, else normgrad)"
    )
    add_keep(parser)
    parser.add_argument(
        "--second-look", choices=VIEWS, help="answer again from what the map points at, enlarged (crop) or without the "
        "rest (masked), and join both answers",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or mps; the GPU if there is one")
    parser.add_argument("--answers", help="for a released file: the prepared folder with its answer vocabulary")
    parser.add_argument("--tokenizer", help="for a released file: its RoBERTa, a hub name or a local folder")
    arguments = parser.read()
    check_out(arguments)
    _predict(arguments)


def _predict(arguments: argparse.Namespace) -> None:
    # Imported after the options are read, so that --help is fast. timm would import W&B.
    with quick_imports("wandb"):
        from vlabs.attention.figures import as_view, save_out
        from vlabs.data.preprocessing import check_text
        from vlabs.prediction.predictor import load, open_image
        from vlabs.utils.device import find_device

        for question in arguments.question:
            check_text("a --question", question)
        device = find_device(arguments.device)
        pictures = [open_image(path) for path in arguments.image]
        predictor = load(
            arguments.ckpt, device=device, answers=arguments.answers, tokenizer=arguments.tokenizer, keep=arguments.keep
        )
    answers = predictor.answer(pictures, arguments.question, map_name=arguments.map, second_look=arguments.second_look)
    say(answers)
    show(f"the model's training: {predictor.checkpoint.training}")
    show(f"a percentage is {predictor.meaning}")
    views = [as_view(picture, predictor.preprocessing.box(picture.size)) for picture in pictures]
    print(save_out(answers_figure(views, answers), arguments))


def say(answers: Sequence[Answer]) -> None:
    """Print answers, with what is known about them."""
    for answer in answers:
        show(answer.question)
        for text, probability in answer.answers:
            show(f"  {probability:6.1%}  {text}")
        if answer.before is not None:
            show(f"  (after a second look; at first {answer.before[0][0]} {answer.before[0][1]:.1%})")
        for line in (answer.counted, *answer.warnings):
            if line:
                show(f"  ({line})")


def answers_figure(views: Sequence[View], answers: Sequence[Answer]) -> Figure:
    """A figure with a map per question beside the image; for models of pairs, one row per statement."""
    from vlabs.attention.figures import Cell, grid_figure, question_figure

    rows = []
    for answer in answers:
        best = ", ".join(f"{text} {share:.0%}" for text, share in answer.answers[:3])
        note = "\n".join(line for line in (best, answer.counted, *answer.warnings) if line)
        cells = [
            Cell(view, values, answer.map_name, note=note) for view, values in zip(views, answer.maps, strict=True)
        ]
        rows.append((answer.question, cells))
    if len(views) > 1:
        return grid_figure(rows)
    return question_figure(views[0], [cells[0]._replace(title=question) for question, cells in rows])


if __name__ == "__main__":
    run_cli(main)
