"""The command lines of readers: common options, and how a reader of texts is run."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

from data_prep.engine.pipeline import Options, prepare
from data_prep.engine.raw import Reader
from data_prep.engine.texts import QUESTIONS


def new_parser(name: str, doc: str | None, bad: str) -> argparse.ArgumentParser:
    """A command line of a name, which shows a module's docstring, with the options that every preparation has.

    Args:
        bad: what `--on-bad` is about.
    """
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=f"vlabs prepare {name}", description=inspect.cleandoc(doc or ""), formatter_class=form
    )
    parser.add_argument("--out-dir", type=Path, required=True, help="new folder of the prepared data")
    what = f"{bad}: stop, or leave them out (default: %(default)s)"
    parser.add_argument("--on-bad", choices=("error", "skip"), default="error", help=what)
    parser.add_argument("--name", default="", help="what the dataset is called (default: what its files say)")
    return parser


def text_parser(name: str, doc: str | None, min_answer_count: int | None) -> argparse.ArgumentParser:
    """`new_parser` with the options of all texts; those of questions alone unless there is no `min_answer_count`."""
    parser = new_parser(name, doc, "images, questions and captions that cannot be used")
    if min_answer_count is not None:
        what = "questions: how often an answer must be a question's major answer to be in the vocabulary"
        parser.add_argument(
            "--min-answer-count", type=int, default=min_answer_count, help=f"{what} (default %(default)s)"
        )
    what = "size of the tokenizer trained on the train questions or captions; 0 for none (default %(default)s)"
    parser.add_argument("--vocab-size", type=int, default=8192, help=what)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--num-workers", type=int, default=cores, help="processes (default: all cores)")
    parser.add_argument("--shard-size", type=int, default=512, help="images per file (default %(default)s)")
    return parser


def read_options(arguments: argparse.Namespace) -> Options:
    """The options of `text_parser` from a parsed command line."""
    names = Options.__dataclass_fields__.keys() & vars(arguments).keys()
    return Options(**{name: getattr(arguments, name) for name in names})


def command(reader: type[Reader]) -> Callable[[], None]:
    """The command that prepares a dataset."""

    def main() -> None:
        least = reader.min_answer_count if reader.kind == QUESTIONS else None
        parser = text_parser(reader.name, sys.modules[reader.__module__].__doc__, least)
        reader.add_options(parser)
        arguments = parser.parse_args()
        prepare(reader.of(arguments), arguments.out_dir, read_options(arguments))

    return main
