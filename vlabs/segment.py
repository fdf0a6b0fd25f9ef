"""Segment an image: the class of every pixel, or what a text names.

vlabs segment --ckpt RUN --image street.jpg                             # of task=segment
vlabs segment --ckpt RUN --image scene.jpg --text "red large star"      # of task=refer
"""

from __future__ import annotations

import argparse

from vlabs.errors import UserError, run_cli, show
from vlabs.utils.arguments import Parser, add_out, check_out


def main() -> None:
    """Entry point of `vlabs segment`."""
    parser = Parser("segment", __doc__.splitlines()[0])
    parser.add_argument("--ckpt", required=True, help="run folder, checkpoint or export")
    parser.add_argument("--image", required=True, help="the image")
    parser.add_argument("--text", action="append", default=[], help="what to segment; may be given several times")
    add_out(parser, "segments.png")
    parser.add_argument("--device", help="cpu, cuda or mps; the GPU if there is one")
    arguments = parser.read()
    check_out(arguments)
    _segment(arguments)


def _segment(arguments: argparse.Namespace) -> None:
    # Imported after the options are read, so that --help is fast.
    import numpy as np
    import torch

    from vlabs.attention.figures import as_view, save_out
    from vlabs.attention.segments import Segmented, segment_figure
    from vlabs.data.masks import resize_by
    from vlabs.data.preprocessing import check_text
    from vlabs.prediction.predictor import load_any, open_image
    from vlabs.tasks.segment import at_size
    from vlabs.utils.device import find_device

    for text in arguments.text:
        check_text("a --text", text)
    device = find_device(arguments.device)
    image = open_image(arguments.image)
    checkpoint = load_any(arguments.ckpt, needs=("segments",))
    model, preprocessing = checkpoint.segmenter.to(device), checkpoint.preprocessing
    if (model.text is None) == bool(arguments.text):
        raise UserError("--text is missing: pass what to segment" if model.text else "--text: this model reads no text")
    if model.text is None:
        side = checkpoint.data.get("short_side")
        seen = image if side is None else resize_by(image, int(side) / min(image.size))
        with torch.no_grad():
            logits = model(preprocessing.normalize(seen)[None].to(device)).logits[0]
        found = at_size(logits, image.size[::-1]).argmax(dim=0)
        rows = [Segmented(as_view(image), found.cpu().numpy(), None)]
        classes = preprocessing.names
    else:
        view = as_view(image, preprocessing.box(image.size))
        ids, mask = preprocessing.pad(preprocessing.token_ids(arguments.text))
        index = torch.zeros(len(ids), dtype=torch.int64, device=device)
        with torch.no_grad():
            tensor = preprocessing.image(image)[None].to(device)
            found = model(tensor, ids.to(device), mask.to(device), index).logits.argmax(dim=1)
        labels = found.cpu().numpy()
        rows = [Segmented(view, one, None, text) for one, text in zip(labels, arguments.text, strict=True)]
        classes = ("all else", "what the text names")
    for row in rows:
        counts = np.bincount(row.found.ravel(), minlength=len(classes)) / row.found.size
        said = ", ".join(f"{classes[n]} {counts[n]:.1%}" for n in np.argsort(-counts) if counts[n] > 0)
        show(f"{row.title + ': ' if row.title else ''}{said}")
    print(save_out(segment_figure(rows, classes), arguments))


if __name__ == "__main__":
    run_cli(main)
