"""Export a model: vlabs export --ckpt RUN --out model.safetensors.

--out model.safetensors     one file for evaluate, predict, init= and vlabs.load
--out FOLDER                a folder in the Hugging Face hub's layout, with a card
--to-hub user/name          the same on the hub
--out FOLDER --format onnx  both passes with ξ as an input, for serving without vlabs (or `torch`: torch.export)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vlabs.errors import UserError, run_cli
from vlabs.utils.arguments import Parser


def main() -> None:
    """Entry point of `vlabs export`."""
    parser = Parser("export", __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", help="the .safetensors file or the folder to write")
    where.add_argument("--to-hub", metavar="USER/NAME", help="upload it to the Hugging Face hub")
    parser.add_argument("--overwrite", action="store_true", help="with --out: overwrite an earlier export")
    parser.add_argument("--private", action="store_true", help="with --to-hub: make a private repository")
    parser.add_argument("--license", help="for the card, by the hub's names: apache-2.0, cc-by-4.0, …")
    parser.add_argument("--licence", dest="license", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--metrics", type=Path, action="append", default=[],
        help="for the card: a metrics.json of `vlabs evaluate`, or its folder; may be given several times",
    )  # fmt: skip
    parser.add_argument("--picture", type=Path, help="for the card: an image, such as a figure of `vlabs predict`")
    parser.add_argument("--format", choices=("onnx", "torch"), help="with --out FOLDER: programs instead of weights")
    _export(parser.read())


def _export(arguments: argparse.Namespace) -> None:
    # Imported after the options are read, so that --help is fast.
    from vlabs.checkpoints.checkpoint import export_safetensors
    from vlabs.checkpoints.share import export_folder, push_to_hub
    from vlabs.prediction.predictor import open_image

    is_file = arguments.out is not None and arguments.out.endswith(".safetensors")
    given = [name for name in ("license", "metrics", "picture") if getattr(arguments, name)]
    if given and (is_file or arguments.format is not None):
        raise UserError(
            f"--{given[0]} is for the card of a folder: pass --out FOLDER without --format, or leave it out"
        )
    of_card = (arguments.license, arguments.metrics, open_image(arguments.picture) if arguments.picture else None)
    if arguments.format is not None:
        if arguments.out is None or is_file:
            raise UserError("--format writes several files: pass --out FOLDER")
        from vlabs.checkpoints.programs import export_programs

        print(export_programs(arguments.ckpt, arguments.out, arguments.format, arguments.overwrite))
    elif arguments.to_hub is not None:
        print(push_to_hub(arguments.ckpt, arguments.to_hub, arguments.private, *of_card))
    elif is_file:
        print(export_safetensors(arguments.ckpt, arguments.out, arguments.overwrite))
    elif Path(arguments.out).suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(f"--out {arguments.out}: name a .safetensors file, or a folder")
    else:
        print(export_folder(arguments.ckpt, arguments.out, None, *of_card, overwrite=arguments.overwrite))


if __name__ == "__main__":
    run_cli(main)
