"""Figures of where a model looks.

vlabs attention --ckpt RUN --image street.jpg --question "What's left of it?" --question "Is it open?"
vlabs attention --figure control --ckpt CLASSIFIER --image cat.jpg --image dog.jpg --class cat --class dog
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlabs.attention import MAPS
from vlabs.errors import UserError, run_cli
from vlabs.utils.arguments import Parser, add_out, check_out, number
from vlabs.utils.imports import quick_imports
from vlabs.utils.options import MOST_ALPHA

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from vlabs.checkpoints.checkpoint import Checkpoint

FIGURES = {
    "questions": "images by questions",
    "pathway": "bottom-up attention, token weights and top-down attention side by side",
    "alpha": "one prior at several strengths of the top-down signal",
    "side-by-side": "two images pasted into one, with a text for each",
    "checkpoints": "one image seen by several models",
    "control": "a classifier that is asked for several classes of an image, or of two images side by side",
    "reconstruction": "what a linear decoder sees in the bottom-up and top-down signals of the first block",
}
READ_BY = {
    "question": [name for name in FIGURES if name != "control"],
    "class": ["control"],
    "map": [name for name in FIGURES if name not in ("pathway", "reconstruction")],
    "alpha": ["alpha", "control"],
    "data": ["reconstruction"],
}
"""The options that not every figure reads, and the figures that do."""


def main() -> None:
    """Entry point of `vlabs attention`."""
    parser = Parser(
        "attention",
        __doc__.splitlines()[0],
        epilog="figures: " + "; ".join(f"{name}: {what}" for name, what in FIGURES.items()),
    )
    parser.add_argument("--ckpt", required=True, action="append", help="run folder, checkpoint or export; several for "
                        "--figure checkpoints, as NAME=PATH to name them")  # fmt: skip
    parser.add_argument("--image", required=True, action="append", help="an image; may be given several times")
    parser.add_argument(
        "--question", action="append", default=[], help="a question or caption; may be given several times"
    )
    parser.add_argument(
        "--class", action="append", default=[], help="for --figure control: a class; may be given several times"
    )
    parser.add_argument("--figure", choices=FIGURES, default="questions", help="the figure (default %(default)s)")
    parser.add_argument("--map", choices=MAPS, help="the map (default: weights if a prior steers the encoder, else "
                        "normgrad; fusion for --figure alpha; relevance for control, as the "
                        "paper: norm)")  # fmt: skip
    parser.add_argument("--alpha", type=number(0, MOST_ALPHA), action="append", help="for --figure alpha (default 1, 3 "
                        "and 10) and control (default 10)")  # fmt: skip
    parser.add_argument("--data", help="for --figure reconstruction: prepared data (default: its training data)")
    add_out(parser, "attention.png")
    arguments = parser.read()
    check_out(arguments)
    _draw(arguments)


def _draw(arguments: argparse.Namespace) -> None:
    # Imported after the options are read, so that --help is fast. timm would import W&B.
    with quick_imports("wandb"):
        from vlabs.attention.figures import save_out
        from vlabs.data.preprocessing import check_text
        from vlabs.prediction.predictor import open_image

    for option, figures in READ_BY.items():
        if getattr(arguments, option) and arguments.figure not in figures:
            raise UserError(
                f"--{option} is read by --figure {', '.join(figures)}, not by --figure {arguments.figure}: leave it out"
            )
    if arguments.figure == "control":
        print(save_out(_control(arguments), arguments))
        return
    if not arguments.question:
        raise UserError(f"--figure {arguments.figure} needs a --question")
    for question in arguments.question:
        check_text("a --question", question)
    if len(arguments.ckpt) > 1 and arguments.figure != "checkpoints":
        raise UserError(f"--figure {arguments.figure} shows one model: give --ckpt once, or --figure checkpoints")
    wanted = {"questions": None, "side-by-side": 2}.get(arguments.figure, 1)
    if wanted is not None and len(arguments.image) != wanted:
        raise UserError(f"--figure {arguments.figure} takes --image {wanted} times, not {len(arguments.image)}")
    images = [open_image(path) for path in arguments.image]
    checkpoints = [_load(text) for text in arguments.ckpt]
    figure = _figure(arguments, checkpoints, images)
    print(save_out(figure, arguments))


def _figure(
    arguments: argparse.Namespace, checkpoints: list[tuple[str, Checkpoint]], images: list[Image.Image]
) -> Figure:
    from vlabs.attention.maps import UNSTEERED, default_map
    from vlabs.attention.pictures import (
        alpha_figure,
        checkpoints_figure,
        pathway_figure,
        questions_figure,
        reconstruction_figure,
        side_by_side_figure,
    )

    _, checkpoint = checkpoints[0]
    questions = arguments.question
    defaults = {default_map(one.model) for _, one in checkpoints}
    map_name = arguments.map or (defaults.pop() if len(defaults) == 1 else UNSTEERED)
    if arguments.figure == "questions":
        return questions_figure(checkpoint, images, questions, map_name)
    if arguments.figure == "pathway":
        return pathway_figure(checkpoint, images[0], questions)
    if arguments.figure == "alpha":
        return alpha_figure(checkpoint, images[0], questions, arguments.alpha, arguments.map or "fusion")
    if arguments.figure == "side-by-side":
        return side_by_side_figure(checkpoint, images[0], images[1], questions, map_name)
    if arguments.figure == "checkpoints":
        return checkpoints_figure(checkpoints, images[0], questions, map_name)
    data = arguments.data or checkpoint.data.get("dir")
    if data is None or not Path(data).is_dir():
        raise UserError(f"the data that {checkpoint.path} was trained on is not at {data}: pass --data FOLDER")
    return reconstruction_figure(checkpoint, images[0], questions, data)


def _control(arguments: argparse.Namespace) -> Figure:
    from vlabs.attention.pictures import control_figure
    from vlabs.prediction.predictor import open_image

    classes, alpha = getattr(arguments, "class"), arguments.alpha or [None]
    if not classes or len(arguments.image) > 2:
        raise UserError("--figure control takes --image once or twice, and --class once or more")
    if len(alpha) > 1:
        raise UserError("--figure control takes --alpha once")
    images = [open_image(path) for path in arguments.image]
    checkpoints = [_load(text, ("classes",)) for text in arguments.ckpt]
    return control_figure(checkpoints, images, classes, alpha[0], arguments.map or "relevance")


def _load(text: str, needs: Sequence[str] = ("texts", "one image")) -> tuple[str, Checkpoint]:
    from vlabs.prediction.predictor import load_any

    name, separator, path = text.partition("=")
    if separator and not Path(text).exists():
        return name, load_any(path, needs=needs)
    return Path(text).name, load_any(text, needs=needs)


if __name__ == "__main__":
    run_cli(main)
