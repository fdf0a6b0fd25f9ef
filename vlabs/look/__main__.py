"""Draw and measure where CLIP, SigLIP, SigLIP 2, BLIP or ViLT looks.

vlabs look --model openai/clip-vit-base-patch32 --image photo.jpg --text "a cat"
vlabs look --model openai/clip-vit-base-patch32 --data data/coco_captions --split val --measure faithfulness
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from pathlib import Path

from vlabs.attention import LOOK_MAPS
from vlabs.errors import UserError, run_cli, show
from vlabs.utils.arguments import MOST_SEED, Parser, add_out, check_out, numbered, whole

MEASURES = {
    "grounding": "does the map lie on what the text is about?",
    "faithfulness": "does the score or answer change if what the map points at is taken away?",
}


def main() -> None:
    """Entry point of `vlabs look`."""
    parser = Parser("look", __doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model of transformers: name on the hub, or a local folder")
    parser.add_argument("--image", help="the image")
    parser.add_argument(
        "--text", action="append", default=[], help="a caption, or for a model that answers a question; may be given "
        "several times",
    )  # fmt: skip
    parser.add_argument("--map", choices=LOOK_MAPS, action="append", help="the map (default relevance); with --data, "
                        "may be given several times (default: all of the model)")  # fmt: skip
    parser.add_argument("--data", type=Path, help="instead of an image: a prepared folder to measure the maps on")
    parser.add_argument("--split", help="with --data: the split (default val)")
    parser.add_argument("--measure", choices=MEASURES, help="with --data: "
                        + "; ".join(f"{name}: {what}" for name, what in MEASURES.items())
                        + " (default grounding)")  # fmt: skip
    parser.add_argument("--num-texts", type=whole(2), help="with --data: texts that are measured, evenly spread "
                        "(default 200)")  # fmt: skip
    parser.add_argument("--instances", help="with --data: COCO's instances, where the data have no regions")
    parser.add_argument("--human-maps", help="with --data: folder of VQA-HAT's or AiR-D's maps, which the maps are "
                        "compared with instead")  # fmt: skip
    parser.add_argument("--seed", type=whole(0, MOST_SEED), help="with --measure faithfulness: of the random order "
                        "(default 0)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or mps; the GPU if there is one")
    add_out(parser, "look.png")
    parser.add_argument("--results", type=Path, help="with --data: folder for the results (default: look-grounding, "
                        "or with a number if that exists)")  # fmt: skip
    arguments = parser.read()
    if arguments.data is None:
        _draw(arguments)
    else:
        _measure(arguments)


def _draw(arguments: argparse.Namespace) -> None:
    if arguments.image is None or not arguments.text:
        raise UserError("give --image and --text to draw a map, or --data to measure maps")
    if given := _given(arguments, "split", "measure", "num_texts", "instances", "human_maps", "seed", "results"):
        raise UserError(f"{given[0]} is for --data: leave it out")
    if len(arguments.map or []) > 1:
        raise UserError("--map is given once for an image, or several times with --data")
    check_out(arguments)
    # Imported after the options are read, so that --help is fast.
    from vlabs.attention.figures import as_view, save_out
    from vlabs.data.preprocessing import check_text
    from vlabs.look.loading import load
    from vlabs.predict import answers_figure, say
    from vlabs.prediction.predictor import open_image

    for text in arguments.text:
        check_text("a --text", text)
    image = open_image(arguments.image)
    looker = load(arguments.model, arguments.device)
    answers = looker.answer(image, arguments.text, *(arguments.map or []))
    say(answers)
    show(f"a percentage is {looker.meaning}")
    print(save_out(answers_figure([as_view(image, looker.box(image.size))], answers), arguments))


def _given(arguments: argparse.Namespace, *names: str) -> list[str]:
    """Which of some options are given, as they are written."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name) is not None]


def _measure(arguments: argparse.Namespace) -> None:
    if arguments.image is not None or arguments.text:
        raise UserError("--data is instead of --image and --text: give one or the other")
    if arguments.out is not None:
        raise UserError("--out is for the figure of an image; with --data, --results names a folder")
    if arguments.human_maps is not None and (given := _given(arguments, "measure", "instances", "seed")):
        raise UserError(f"--human-maps is a measure of its own, which {given[0]} is not for: leave one of them out")
    for name, value in (("split", "val"), ("measure", "grounding"), ("num_texts", 200)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    if arguments.seed is not None and arguments.measure != "faithfulness":
        raise UserError("--seed is for --measure faithfulness: leave it out")
    out = _claimed(arguments)
    try:
        _measure_into(arguments, out)
    except BaseException:
        with contextlib.suppress(OSError):
            out.rmdir()
        raise


def _claimed(arguments: argparse.Namespace) -> Path:
    """The folder of the results, which is made before the work."""
    if (out := arguments.results) is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())) and not arguments.overwrite:
            raise UserError(f"--results {out} already exists: name another folder, or pass --overwrite")
        out.mkdir(parents=True, exist_ok=True)
        return Path(out)
    for number in itertools.count(1):
        out = Path(numbered(f"look-{arguments.measure}", number))
        with contextlib.suppress(FileExistsError):
            out.mkdir()
            break
    return out


def _measure_into(arguments: argparse.Namespace, out: Path) -> None:
    from vlabs.look.loading import load
    from vlabs.look.measuring import faithfulness, grounding, human

    looker = load(arguments.model, arguments.device)
    maps = list(dict.fromkeys(arguments.map or looker.maps))
    measured = looker, arguments.data, arguments.split, maps, arguments.num_texts
    if arguments.human_maps is not None:
        results = human(*measured, arguments.human_maps, out)
    elif arguments.measure == "grounding":
        results = grounding(*measured, arguments.instances, out)
    else:
        results = faithfulness(*measured, arguments.instances, out, arguments.seed or 0)
    results.write()


if __name__ == "__main__":
    run_cli(main)
