"""Search a folder of images by text, and show where the model looked.

vlabs search --ckpt RUN --images holidays --query "a dog that doesn't look at the camera"

First passes over the images are stored on disk, by the content of the files. The prior ξ of the query selects the most
promising images from them, and these go through the whole network without being read again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlabs.errors import run_cli, show
from vlabs.utils.arguments import SEARCH_INDEX, Parser, add_keep, add_out, check_out, whole
from vlabs.utils.imports import quick_imports


def main() -> None:
    """Entry point of `vlabs search`."""
    parser = Parser("search", __doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint, export, or released METER file")
    parser.add_argument("--images", required=True, help="folder of images, searched with its sub-folders")
    parser.add_argument("--query", required=True, action="append", help="a text; may be given several times")
    parser.add_argument("--top", type=whole(1), default=10, help="images to print (default %(default)s)")
    parser.add_argument("--k", type=whole(1), default=32, help="images that ξ may find for the exact ranking (32)")
    parser.add_argument("--first", type=whole(1), default=2000, help="images whose patches ξ is compared with (2000)")
    parser.add_argument("--exact", action="store_true", help="rank all images exactly")
    add_keep(parser)
    parser.add_argument(
        "--bf16", action="store_true", help="compute in bfloat16: faster, less exact; has its own index"
    )
    parser.add_argument("--index", type=Path, default=SEARCH_INDEX, help="folder of the index (default %(default)s)")
    parser.add_argument("--on-bad", choices=("error", "skip"), default="error", help="files that are no whole image")
    add_out(parser, "search.png")
    parser.add_argument("--device", help="cpu, cuda or mps; the GPU if there is one")
    parser.add_argument("--tokenizer", help="for a released file: its RoBERTa, a hub name or a local folder")
    arguments = parser.read()
    check_out(arguments)
    _search(arguments)


def _search(arguments: argparse.Namespace) -> None:
    # Imported after the options are read, so that --help is fast. timm would import W&B.
    with quick_imports("wandb"):
        import torch

        from vlabs.attention.figures import grid_figure, save_out
        from vlabs.data.preprocessing import check_text
        from vlabs.prediction.predictor import load_any
        from vlabs.prediction.search import MEANING, Search, list_pictures
        from vlabs.utils.device import find_device

        for query in arguments.query:
            check_text("a --query", query)
        device = find_device(arguments.device)
        pictures = list_pictures(arguments.images)
        checkpoint = load_any(arguments.ckpt, tokenizer=arguments.tokenizer, needs=("texts", "ranks"))
    checkpoint.use_share(arguments.keep)
    if arguments.bf16:
        checkpoint.model.to(torch.bfloat16)
    search = Search(checkpoint, pictures, arguments.index, device, arguments.on_bad == "skip", arguments.first)
    show(f"{len(search.pictures):,} images, {search.kilobytes:,.0f} kB each in the index")
    rows = []
    for query in arguments.query:
        found = search.find(query, None if arguments.exact else arguments.k)
        show(query)
        for item in found[: arguments.top]:
            show(f"  {item.share:7.1%}  {item.path}")
        if new := checkpoint.new_words(query):
            show(f"  (its training never had: {', '.join(new)})")
        rows.append((query, search.show(found[:5])))
    show(f"the model's training: {checkpoint.training}")
    show(f"a percentage is {MEANING}")
    print(save_out(grid_figure(rows), arguments))


if __name__ == "__main__":
    run_cli(main)
