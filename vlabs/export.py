"""Write the model of a run as one safetensors file: python -m vlabs.export --ckpt RUN --out model.safetensors."""

from __future__ import annotations

import argparse

from vlabs.checkpoints.checkpoint import export_safetensors
from vlabs.errors import UserError, run_cli


def main() -> None:
    """Entry point of `python -m vlabs.export`."""
    parser = argparse.ArgumentParser(prog="python -m vlabs.export", description=__doc__.split(":")[0])
    parser.add_argument("--ckpt", required=True, help="run folder or checkpoint")
    parser.add_argument("--out", required=True, help="the .safetensors file to write")
    arguments = parser.parse_args()
    if not arguments.out.endswith(".safetensors"):
        raise UserError(f"--out {arguments.out}: name a .safetensors file")
    print(export_safetensors(arguments.ckpt, arguments.out))


if __name__ == "__main__":
    run_cli(main)
