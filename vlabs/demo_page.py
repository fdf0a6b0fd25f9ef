"""A web page where people ask a model about images, see where it looks, and search a folder by text.

vlabs demo-page                                              # the model that comes with vlabs, no network
vlabs demo-page --ckpt RUN --search-ckpt RUN2 --images holidays/
vlabs demo-page --look openai/clip-vit-base-patch32          # a tab for a model of transformers

Only this machine can reach it, unless --host is given; it then needs the token in its address. An uploaded image is
kept in a temporary folder for at most ten minutes; answers are not written anywhere.
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vlabs.errors import UserError, one_line, printable, run_cli
from vlabs.page.hosts import Hosts
from vlabs.page.uploads import Limits, Uploads, own_folder
from vlabs.utils.arguments import SEARCH_INDEX, Parser, number, whole

if TYPE_CHECKING:
    from vlabs.prediction.search import Search

_PORT = 7860
_SEARCHES = "scenes_search"  # the default model for search
# Questions about the example scenes, in the order of their files.
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
_TEXTS = ("A purple star right of a cross.", "A small hollow green cross.", "A large red square left of a circle.")


def main() -> None:
    """Entry point of `vlabs demo-page`."""
    parser = Parser("demo-page", __doc__.splitlines()[0])
    parser.add_argument("--ckpt", default="scenes", help="a model that answers or labels (default %(default)s)")
    parser.add_argument("--search-ckpt", help="a model trained on captions, for the search tab")
    parser.add_argument("--images", action="append", help="folder to search; may be given several times")
    parser.add_argument("--on-bad", choices=("error", "skip"), default="error", help="for files of --images that are "
                        "not whole images (default %(default)s)")  # fmt: skip
    parser.add_argument("--look", metavar="MODEL", help="a CLIP, SigLIP, BLIP or ViLT of transformers, for the tab "
                        "Look: name on the hub, or a local folder")  # fmt: skip
    parser.add_argument(
        "--pictures",
        type=Path,
        help="folder of example images; a text file of the same name has questions, one per line",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to bind to (default %(default)s: only this machine)"
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME",
        help="another host name that the page accepts; may be given several times",
    )  # fmt: skip
    parser.add_argument("--port", type=whole(0, 65535), help="port (default: the first free one from 7860 on)")
    parser.add_argument(
        "--max-megabytes", type=number(0.001), default=Limits.megabytes, help="largest file of an image (10)"
    )
    parser.add_argument("--max-megapixels", type=number(0.001), default=Limits.megapixels, help="largest image (30)")
    parser.add_argument(
        "--index", type=Path, default=SEARCH_INDEX, help="folder of the search index (default %(default)s)"
    )
    parser.add_argument("--device", help="cpu, cuda or mps; the GPU if there is one")
    parser.add_argument("--answers", help="for a released file: the prepared folder with its answer vocabulary")
    parser.add_argument("--tokenizer", help="for a released file: its RoBERTa, a hub name or a local folder")
    arguments = parser.read()
    limits = Limits(arguments.max_megabytes, arguments.max_megapixels)
    if arguments.pictures is not None and not arguments.pictures.is_dir():
        raise UserError(f"--pictures {arguments.pictures}: there is no such folder")
    for name in arguments.allow_host:
        if name not in Hosts("127.0.0.1", 0, [name]):
            raise UserError(f"--allow-host {name} is not a host name, with or without a port: host.example:7860")
    from vlabs.utils.device import find_device

    find_device(arguments.device)  # so that a wrong device is reported before anything is loaded
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs the package gradio: pip install 'vlabs[web]'")
    with ExitStack() as at_end:
        listener = at_end.enter_context(_listener(arguments.host, arguments.port))
        _serve(arguments, limits, listener, at_end)


def _serve(arguments: argparse.Namespace, limits: Limits, listener: socket.socket, at_end: ExitStack) -> None:
    # Imported after the options are read, so that --help is fast.
    from vlabs.checkpoints.checkpoint import packaged_starts
    from vlabs.look import load as load_looker
    from vlabs.page.about import about
    from vlabs.page.answers import Page, example_pictures, questions_beside
    from vlabs.page.decoder import Decoder
    from vlabs.prediction.predictor import load, open_image

    predictor = load(arguments.ckpt, device=arguments.device, answers=arguments.answers, tokenizer=arguments.tokenizer)
    if predictor.pictures != 1:
        raise UserError(f"--ckpt {arguments.ckpt} needs {predictor.pictures} images at a time, but the page has one")
    looker = None if arguments.look is None else load_looker(arguments.look, device=arguments.device)
    embedded = arguments.ckpt in packaged_starts()
    searches = _searches(arguments, embedded)
    examples: list[tuple[Path, str]] = []
    if arguments.pictures is not None:
        examples = [(path, questions_beside(path)) for path in example_pictures(arguments.pictures)]
        for path, _ in examples:
            open_image(path)  # so that a damaged one is reported now
    elif embedded:
        examples = list(zip(example_pictures(), _QUESTIONS, strict=False))
    model = about(predictor.checkpoint, arguments.ckpt)
    searcher = next((search.checkpoint for search in searches.values()), None)
    decoder = Decoder(limits.megapixels, limits.seconds)
    at_end.callback(decoder.close)
    folder = at_end.enter_context(own_folder())
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")
    from vlabs.page.app import build, serve

    page = Page(predictor, searches, Uploads(folder, limits), decoder, model.limits, looker)
    name = arguments.search_ckpt or _SEARCHES
    named = None if searcher is None else about(searcher, name)
    blocks = build(page, model, named, examples, _TEXTS if name == _SEARCHES else ())

    def ready(address: str) -> None:
        shown = "; everyone who knows this address can use it" if "?" in address else ""
        print(f"the page is at {address}{shown} (Ctrl-C ends it)", flush=True)

    at_end.callback(_finish)
    serve(page, blocks, listener, arguments.host, arguments.allow_host, ready)


def _finish() -> None:
    """Ignore signals during the clean-up."""
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)


def _listener(host: str, port: int | None) -> socket.socket:
    """A socket at the address, or at the first free port from 7860 on.

    Raises:
        UserError: no server can answer there.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for place in range(_PORT, _PORT + 100) if port is None else [port]:
        try:
            return socket.create_server((host, place), family=family)
        except (OSError, OverflowError, ValueError, TypeError) as error:  # invalid host names raise the last ones
            said = one_line(str(error))
            if port is None and isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                continue
            break
    what = f"--host {host}" + (f" --port {port}" if port is not None else "")
    raise UserError(f"{what}: no server can answer there ({said}): name another")


def _searches(arguments: argparse.Namespace, embedded: bool) -> dict[str, Search]:
    """The searches by folder. With vlabs' own model, its example images are searched by default."""
    from vlabs.checkpoints.checkpoint import packaged_starts
    from vlabs.page.answers import example_pictures
    from vlabs.prediction.predictor import load_any
    from vlabs.prediction.search import Search, list_pictures
    from vlabs.utils.device import find_device

    ckpt, folders = arguments.search_ckpt, list(arguments.images or [])
    if ckpt is None and folders:
        raise UserError("--images is searched by a model trained on captions: name it with --search-ckpt")
    if ckpt is None:
        if not embedded or _SEARCHES not in packaged_starts():
            return {}
        ckpt = _SEARCHES
    if not folders:
        folders = [str(example_pictures()[0].parent)] if ckpt == _SEARCHES else []
    if not folders:
        raise UserError("--search-ckpt has nothing to search: pass --images FOLDER")
    checkpoint = load_any(ckpt, tokenizer=arguments.tokenizer, needs=("texts", "ranks"))
    found = {}
    for folder in folders:
        own = folder == str(example_pictures()[0].parent)
        skips, device = arguments.on_bad == "skip", find_device(arguments.device)
        search = Search(checkpoint, list_pictures(folder), arguments.index, device, skips)
        found["scenes" if own else printable(folder)] = search
    return found


if __name__ == "__main__":
    run_cli(main)
