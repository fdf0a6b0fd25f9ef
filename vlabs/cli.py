"""The command `vlabs`: `vlabs train task=vqa` runs `python -m vlabs.train task=vqa`, likewise all other commands."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys

from vlabs.errors import UserError, run_cli

COMMANDS = {
    "prepare": "make a folder of data from raw files: VQA v2, COCO, your own table, …",
    "train": "train, sweep, resume a run, or plan one",
    "evaluate": "measure a checkpoint: accuracy, ranking, grounding, steering",
    "predict": "answer questions about an image",
    "segment": "segment an image into classes, or what a text names",
    "search": "rank a folder of images by text",
    "attention": "draw where a model looks",
    "look": "draw and measure where CLIP, SigLIP, BLIP or ViLT looks",
    "report": "write a report about the runs of a sweep",
    "export": "export a model as a file, a folder, programs, or to the hub",
    "demo-page": "serve a web page to ask questions about images and to search them",
    "demo": "fine-tune the small model that comes with vlabs, and show what it does",
    "dashboard": "make a W&B workspace for runs of vlabs",
    "vqa-eval": "score a file of answers with the official VQA accuracy",
}


def main() -> None:
    """Entry point of `vlabs`."""
    run_cli(_run)


def _run() -> None:
    name = sys.argv[1].replace("_", "-") if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = ["usage: vlabs COMMAND ...   (each has --help; vlabs --version)", ""]
        print("\n".join(lines + [f"  {command:11}{what}" for command, what in COMMANDS.items()]))
        return
    if name == "--version":
        print(f"vlabs {importlib.metadata.version('vlabs')}")
        return
    if name not in COMMANDS:
        raise UserError(f"there is no command '{name}': choose one of {', '.join(COMMANDS)}")
    rooms = {"attention": "vlabs.attention", "look": "vlabs.look", "prepare": "data_prep"}
    found = f"{rooms[name]}.__main__" if name in rooms else f"vlabs.{name.replace('-', '_')}"
    module = importlib.import_module(found)
    # As with `python -m`: the record of a run, and the start of its other processes, read sys.argv.
    sys.argv = [str(module.__file__), *sys.argv[2:]]
    module.main()


if __name__ == "__main__":
    main()
