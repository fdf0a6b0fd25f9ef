"""Answer questions about a picture, and show where the model looked.

python -m vlabs.predict --ckpt RUN --image street.jpg --question "What's left of it, the red one?"
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlabs.attention.figures import Panel, question_figure, save_figure
from vlabs.attention.maps import MAPS, default_map
from vlabs.errors import UserError, run_cli
from vlabs.prediction.predictor import load, open_image


def main() -> None:
    """Entry point of `python -m vlabs.predict`."""
    parser = argparse.ArgumentParser(prog="python -m vlabs.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, export, or released METER file")
    parser.add_argument("--image", required=True, help="the picture")
    parser.add_argument("--question", required=True, action="append", help="a question; may be given several times")
    parser.add_argument("--out", default="prediction.png", help="where the figure goes (.png or .svg)")
    parser.add_argument(
        "--map", choices=MAPS, help="what says where it looked (default: weights with a prior, else fusion)"
    )
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--answers", help="for a released file: the prepared folder with its answer vocabulary")
    parser.add_argument("--tokenizer", help="for a released file: its RoBERTa, a hub name or a local folder")
    arguments = parser.parse_args()
    if Path(arguments.out).suffix not in (".png", ".svg"):
        raise UserError(f"--out {arguments.out}: name a .png or .svg file")
    picture = open_image(arguments.image)
    predictor = load(arguments.ckpt, device=arguments.device, answers=arguments.answers, tokenizer=arguments.tokenizer)
    map_name = arguments.map or default_map(predictor.model)
    answers = predictor.answer(picture, arguments.question, map_name=map_name)
    panels = []
    for answer in answers:
        print(answer.question)
        for text, probability in answer.answers:
            print(f"  {probability:6.1%}  {text}")
        panels.append(Panel(answer.question, answer.map, [f"{text} {p:.0%}" for text, p in answer.answers[:3]]))
    shown = predictor.preprocessing.resize(picture)
    print(save_figure(question_figure(shown, panels, map_name), arguments.out))


if __name__ == "__main__":
    run_cli(main)
