"""Answer questions about a picture, or label statements, and show where the model looked.

python -m vlabs.predict --ckpt RUN --image street.jpg --question "What's left of it, the red one?"
python -m vlabs.predict --ckpt RUN --image left.jpg --image right.jpg --question "Both pictures show a dog."   # nlvr2
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from matplotlib.figure import Figure
from PIL import Image

from vlabs.attention.figures import Cell, Panel, add_out, check_out, grid_figure, question_figure, save_out
from vlabs.attention.maps import MAPS, default_map
from vlabs.data.preprocessing import check_text
from vlabs.errors import run_cli, show
from vlabs.prediction.predictor import Answer, load, open_image
from vlabs.utils.device import find_device


def main() -> None:
    """Entry point of `python -m vlabs.predict`."""
    parser = argparse.ArgumentParser(prog="python -m vlabs.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, export, or released METER file")
    parser.add_argument(
        "--image", required=True, action="append", help="the picture; twice, left and right, for a model of pairs"
    )
    parser.add_argument(
        "--question", required=True, action="append", help="a question or statement; may be given several times"
    )
    add_out(parser, "prediction.png")
    parser.add_argument(
        "--map", choices=MAPS, help="what says where it looked (default: weights with a prior, else fusion)"
    )
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--answers", help="for a released file: the prepared folder with its answer vocabulary")
    parser.add_argument("--tokenizer", help="for a released file: its RoBERTa, a hub name or a local folder")
    arguments = parser.parse_args()
    check_out(arguments)
    for question in arguments.question:
        check_text("a --question", question)
    device = find_device(arguments.device)
    pictures = [open_image(path) for path in arguments.image]
    predictor = load(arguments.ckpt, device=device, answers=arguments.answers, tokenizer=arguments.tokenizer)
    map_name = arguments.map or default_map(predictor.model)
    answers = predictor.answer(pictures, arguments.question, map_name=map_name)
    for answer in answers:
        show(answer.question)
        for text, probability in answer.answers:
            show(f"  {probability:6.1%}  {text}")
    shown = [predictor.preprocessing.resize(picture) for picture in pictures]
    print(save_out(_figure(shown, answers, map_name), arguments))


def _figure(shown: Sequence[Image.Image], answers: Sequence[Answer], map_name: str) -> Figure:
    """A panel a question beside its picture; a row a statement, where it is about several pictures."""
    notes = [[f"{text} {p:.0%}" for text, p in answer.answers[:3]] for answer in answers]
    if len(shown) == 1:
        panels = [Panel(answer.question, answer.map, note) for answer, note in zip(answers, notes, strict=True)]
        return question_figure(shown[0], panels, map_name)
    rows = [
        (answer.question, [Cell(image, values, note=note[0]) for image, values in zip(shown, answer.maps, strict=True)])
        for answer, note in zip(answers, notes, strict=True)
    ]
    return grid_figure(rows, f"bright: where the model looked ({map_name})")


if __name__ == "__main__":
    run_cli(main)
