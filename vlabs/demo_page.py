"""A web page where people ask a model about pictures, see where it looks, and search a folder by text.

python -m vlabs.demo_page                                              # the model that comes with vlabs, no network
python -m vlabs.demo_page --ckpt RUN --search-ckpt RUN2 --images holidays/

It answers on this machine alone, unless --host says otherwise. An uploaded picture lies in a temporary folder for ten
minutes at most; answers are not written anywhere.
"""

from __future__ import annotations

import argparse
import importlib.util
import socket
from pathlib import Path

from vlabs.checkpoints.checkpoint import packaged_starts
from vlabs.errors import UserError, one_line, run_cli
from vlabs.page.answers import Page, example_pictures
from vlabs.page.uploads import Limits
from vlabs.prediction.predictor import load, load_any
from vlabs.prediction.search import CACHE, Search, list_pictures
from vlabs.utils.arguments import number, whole
from vlabs.utils.device import find_device

# Of the scenes that come with vlabs, in the order of their files.
_QUESTIONS = (
    "What is the color of the cross?\nWhich shape is left of the cross?",
    "What color is the hollow object?\nWhich color is the star?",
    "Which color is the small cross?\nWhat is the shape of the purple object?",
    "Which color is the object below the hollow triangle?",
    "What color is the large cross?\nHow many red objects can you see?",
    "Which color is the large star?\nWhat is the color of the triangle?",
    "What shape is the green object?\nWhat shape is left of the red square?",
    "What shape is the large object?\nWhat is the color of the circle?",
)


def main() -> None:
    """Entry point of `python -m vlabs.demo_page` and `vlabs demo-page`."""
    parser = argparse.ArgumentParser(prog="vlabs demo-page", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="scenes", help="of a model that answers or labels (default %(default)s)")
    parser.add_argument("--search-ckpt", help="of a model trained on captions, for the search tab")
    parser.add_argument("--images", action="append", help="folder to search; may be given several times")
    parser.add_argument("--pictures", type=Path, help="folder of pictures to begin with")
    parser.add_argument("--host", default="127.0.0.1", help="address to answer at (default %(default)s: this machine)")
    parser.add_argument("--port", type=whole(0, 65535), help="default: the first free one from 7860 on")
    parser.add_argument(
        "--max-megabytes", type=number(0.001), default=Limits.megabytes, help="of a picture's file (10)"
    )
    parser.add_argument("--max-megapixels", type=number(0.001), default=Limits.megapixels, help="of a picture (30)")
    parser.add_argument("--index", type=Path, default=CACHE, help="folder of the search index (default %(default)s)")
    parser.add_argument("--device", help="cpu or cuda; the GPU if there is one")
    parser.add_argument("--answers", help="for a released file: the prepared folder with its answer vocabulary")
    parser.add_argument("--tokenizer", help="for a released file: its RoBERTa, a hub name or a local folder")
    arguments = parser.parse_args()
    limits = Limits(arguments.max_megabytes, arguments.max_megapixels)
    if arguments.pictures is not None and not arguments.pictures.is_dir():
        raise UserError(f"--pictures {arguments.pictures}: there is no such folder")
    find_device(arguments.device)  # before anything is loaded
    _check_address(arguments.host, arguments.port or 0)
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs the package gradio: pip install 'vlabs[web]'")
    predictor = load(arguments.ckpt, device=arguments.device, answers=arguments.answers, tokenizer=arguments.tokenizer)
    if predictor.pictures != 1:
        raise UserError(f"--ckpt {arguments.ckpt} is about {predictor.pictures} pictures at a time, the page about one")
    embedded = arguments.ckpt in packaged_starts()
    searches = _searches(arguments, embedded)
    pictures = example_pictures(arguments.pictures) if embedded or arguments.pictures is not None else []
    known = _QUESTIONS if embedded and arguments.pictures is None else ()
    examples = [(path, known[n] if n < len(known) else "") for n, path in enumerate(pictures)]
    examples = examples[: len(known)] if known else examples
    page = Page(predictor, searches, limits)
    if pictures:  # what a first answer makes and keeps is there before anybody asks
        page.ask(str(pictures[0]), "What is it?", "fusion", None, "")
    why = "There is nothing to search: start with `--search-ckpt` of a model trained on captions and `--images FOLDER`."
    # Only now, because it makes a folder for uploads, which `serve` removes.
    from vlabs.page.app import build, serve

    blocks = build(page, f"Ask the model `{arguments.ckpt}` about a picture, and see where it looks.", examples, why)

    def ready(address: str) -> None:
        shown = "" if arguments.host in ("127.0.0.1", "localhost") else "; whoever reaches this address can use it"
        print(f"the page is at {address}{shown} (Ctrl-C ends it)", flush=True)

    serve(blocks, arguments.host, arguments.port, limits.megabytes, ready)


def _check_address(host: str, port: int) -> None:
    """Raise a UserError where a server cannot answer; Gradio would try a hundred ports, some seconds each."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        what = f"--host {host}" + (f" --port {port}" if port else "")
        raise UserError(f"{what}: no server can answer there ({one_line(str(error))}): name another") from None


def _searches(arguments: argparse.Namespace, embedded: bool) -> dict[str, Search]:
    """What is searched, by folder: with the model that comes with vlabs, the pictures that come with it."""
    ckpt, folders = arguments.search_ckpt, list(arguments.images or [])
    if ckpt is None and folders:
        raise UserError("--images is searched by a model trained on captions: name it with --search-ckpt")
    if ckpt is None:
        if not embedded or "scenes_search" not in packaged_starts():
            return {}
        ckpt = "scenes_search"
    if not folders:
        folders = [str(example_pictures()[0].parent)] if ckpt == "scenes_search" else []
    if not folders:
        raise UserError("--search-ckpt has nothing to search: pass --images FOLDER")
    checkpoint = load_any(ckpt, tokenizer=arguments.tokenizer, trained_for=("retrieval", "pretrain"))
    found = {}
    for folder in folders:
        own = folder == str(example_pictures()[0].parent)
        found["scenes" if own else folder] = Search(
            checkpoint, list_pictures(folder), arguments.index, find_device(arguments.device)
        )
    return found


if __name__ == "__main__":
    run_cli(main)
