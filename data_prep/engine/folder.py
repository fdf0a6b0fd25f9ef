"""What all prepared folders share: whether they exist, what they were made from, what was left out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import tokenizers

from vlabs.data.prepared import FORMAT_VERSION
from vlabs.errors import UserError, one_line, show
from vlabs.utils.files import WORK, clear, content_sha256, is_free, write_json, write_text

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_NAMED_BAD_ITEMS = 20
NOT_DROPPED = "degenerate region"
"""The reason of what is counted and named, and takes nothing else along."""


class BadItem(NamedTuple):
    """Something in the raw data that cannot be used."""

    reason: str
    split: str
    item: str


def is_made(out_dir: Path, made_from: Mapping[str, Any]) -> bool:
    """Whether a prepared folder is there already, made from the same; this is then said.

    Args:
        made_from: entries of its manifest, or of the options in it.

    Raises:
        UserError: something else is there.
    """
    if is_free(out_dir):
        return False
    try:
        manifest = json.loads((out_dir / "manifest.json").read_text(encoding="utf-8"))
        found = {**manifest.get("options", {}), **manifest}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{out_dir} exists and holds no prepared data: name another --out-dir") from None
    if not found.get("dropped_items") and "options" in made_from:  # it did not matter what was to be done about it
        made_from = {**made_from, "options": {**made_from["options"], "on_bad": found["options"].get("on_bad")}}
    for name, value in made_from.items():
        if found.get(name) != json.loads(json.dumps(value)):
            what = "raw files" if name in ("name", "raw_files", "source") else "options"
            raise UserError(f"{out_dir} holds something else, made from other {what}: name another --out-dir")
    print(f"{out_dir} is there already, made from the same files with the same options")
    return True


def start_or_go_on(partial: Path, identity: Any) -> Path:
    """The place of what is needed on the way, in a folder of `new_folder`.

    Args:
        identity: what an earlier run must have had for the folder to be left as it is, as plain data; else it is
            emptied, but for what others keep in `WORK`.
    """
    work = partial / WORK / "pipeline"
    inputs, said = work / "inputs.json", json.dumps(identity, indent=1)
    if inputs.is_file() and inputs.read_text(encoding="utf-8") == said:
        print(f"continuing in {partial}")
        return work
    if inputs.is_file():
        print(f"{partial} was made from other files or options: starting anew")
    clear(partial, WORK)
    shutil.rmtree(work, ignore_errors=True)
    write_text(inputs, said)
    return work


def say_ready(out_dir: Path, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Print what a new prepared folder holds."""
    for split, counts in splits.items():
        counted = (f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if name != "sha256")
        print(f"{split}: {', '.join(counted)}")
    print(f"{out_dir} is ready")


def name_of_rendered(raw_dir: Path) -> str | None:
    """The name of the embedded corpus if a folder holds it (`data_prep.scenes`), in whatever layout."""
    return "scenes" if (raw_dir / "scenes.json").is_file() else None


def describe_raw(path: Path, hashed: bool = False) -> dict[str, Any]:
    """A raw file's name, size in bytes and hash or time of change; of a folder, the number and size of its files."""
    if path.is_dir():
        sizes = [entry.stat().st_size for entry in os.scandir(path) if entry.is_file()]
        return {"name": f"{path.name}/", "files": len(sizes), "size": sum(sizes)}
    described: dict[str, Any] = {"name": path.name, "size": path.stat().st_size}
    return described | ({"sha256": content_sha256(path)} if hashed else {})


def report_bad(bad: Sequence[BadItem], on_bad: str, listed: Path) -> dict[str, Any]:
    """Name and count what cannot be used; returns what the manifest says of it.

    Args:
        on_bad: `skip` to leave it out.
        listed: file to write all of it to.

    Raises:
        UserError: there is something, and it is not to be left out.
    """
    reasons = Counter(item.reason for item in bad)
    if bad:
        lines = (json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in bad)
        listed.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")
    dropped = [item for item in bad if item.reason != NOT_DROPPED]
    skip = on_bad == "skip" or not dropped
    # A single bad item is named in the error's own line.
    for item in bad[:_NAMED_BAD_ITEMS] if skip or len(bad) > 1 else ():
        verb = "left out" if item.reason == NOT_DROPPED else "dropped" if skip else "bad"
        show(f"{verb}: {_named(item)}", file=sys.stderr)
    if dropped and not skip:
        raise UserError(
            f"{len(dropped):,} bad item{'s' if len(dropped) > 1 else ''} ({_counted(dropped)}), the first:"
            f" {_named(dropped[0])}; all are listed in {listed}: mend them and run again, or leave them out with"
            " --on-bad skip"
        )
    if dropped:
        print(f"dropped {len(dropped):,} items ({_counted(dropped)})")
    if len(bad) > len(dropped):
        print(f"{len(bad) - len(dropped):,} regions cannot be drawn and are left out; their texts and images are not")
    return {"dropped": dict(sorted(reasons.items())), "dropped_items": [item._asdict() for item in bad]}


def _named(item: BadItem) -> str:
    return one_line(f"{item.split}: {item.reason}: {item.item}")


def _counted(items: Sequence[BadItem]) -> str:
    return ", ".join(f"{reason}: {count:,}" for reason, count in sorted(Counter(one.reason for one in items).items()))


def write_manifest(folder: Path, kind: str, name: str, **more: Any) -> None:
    """Write what makes a folder a prepared one."""
    write_json(folder / "manifest.json", {"format": FORMAT_VERSION, "kind": kind, "name": name, **more})


def write_datasets_files(folder: Path, data_files: Sequence[str], sha256: str, features: datasets.Features) -> None:
    """Write what `datasets.load_from_disk` wants beside the Arrow files; with a fingerprint that is the content's."""
    write_json(
        folder / "state.json",
        {
            "_data_files": [{"filename": name} for name in data_files],
            "_fingerprint": sha256[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,  # the folder's name says it; this field takes no name with a hyphen
        },
    )
    write_json(
        folder / "dataset_info.json",
        {"citation": "", "description": "", "features": features.to_dict(), "homepage": "", "license": ""},
    )


def write_tokenizer(folder: Path, texts: Iterable[str], vocab_size: int) -> None:
    """Train a tokenizer and write it into a prepared folder."""
    print("training the tokenizer")
    (folder / "tokenizer").mkdir(exist_ok=True)
    train_tokenizer(texts, vocab_size).save(str(folder / "tokenizer" / "tokenizer.json"))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE tokenizer in RoBERTa's form: `<s> text </s>`, padding id 1; no text has unknown tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [tokenizers.AddedToken(token, special=True, lstrip=token == "<mask>") for token in SPECIAL_TOKENS]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer
