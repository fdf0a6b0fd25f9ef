"""Datasets of `datasets`, from the hub or a local copy: rows that are streamed, and images by their bytes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import yaml
from huggingface_hub import metadata_load
from tqdm import tqdm

from data_prep.engine.tables import split_name
from vlabs.errors import UserError, one_line
from vlabs.utils.plain import is_inside

_LARGEST = 256 * 2**20  # bytes of an image's file


def open_streams(name: str, config: str | None = None, splits: dict[str, str] | None = None) -> dict[str, Any]:
    """The splits of a dataset by the names that they get, as streams.

    Args:
        name: on the hub, or a local folder: of `save_to_disk`, or of files that `load_dataset` knows.
        config: of the dataset, where it has several.
        splits: by the name that a split gets, the dataset's own; None for all that it has, with usual names.

    Raises:
        UserError: it cannot be had, or has no such split.
    """
    check_sources(Path(name))
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
            found = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"train": loaded}
            streams = {split: rows.to_iterable_dataset() for split, rows in found.items()}
        else:
            streams = dict(datasets.load_dataset(name, config, streaming=True))
    except Exception as error:  # whatever the hub, the network and the dataset's own files can do
        said = one_line(str(error)) or type(error).__name__
        if Path(name).is_dir():
            raise UserError(f"--dataset {name} holds no dataset that can be read: {said}") from None
        raise UserError(
            f"--dataset {name} cannot be had ({said}): download it where there is a network, with `hf download {name}"
            " --repo-type dataset --local-dir DIR`, and pass --dataset DIR"
        ) from None
    if not splits:
        return {"val" if split == "dev" else split_name(split, name): rows for split, rows in streams.items()}
    if unknown := [split for split in splits.values() if split not in streams]:
        raise UserError(f"--splits: {name} has no split {unknown[0]}: choose of {', '.join(streams)}")
    return {split_name(own, "--splits"): streams[split] for own, split in splits.items()}


def rows_of(name: str, split: str, stream: Any, start: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a stream from one on, numbered from 0; images are their files' bytes, and no decoder is started.

    Raises:
        UserError: reading stops, as when the network does.
    """
    if stream.features is not None:
        stream = stream.decode(False)
    try:
        progress = tqdm(stream.skip(start), unit="row", desc=f"{name} ({split})", initial=start)
        yield from enumerate(progress, start=start)
    except UserError:
        raise
    except Exception as error:  # whatever the network and the dataset's own files can do
        raise UserError(
            f"--dataset {name}, {split}: reading stopped ({one_line(str(error)) or type(error).__name__}): run it"
            " again, it continues from there"
        ) from None


def columns_of(stream: Any) -> list[str]:
    """The names of a stream's columns."""
    return list(stream.column_names or next(iter(stream.take(1)), {}))


def picture_of(where: str, value: Any, folder: Path) -> bytes | None:
    """The bytes of an image in a row: as they are, in a dictionary, or in a file that it names; None if it is null.

    Args:
        folder: of the dataset; what lies outside is not read, whatever a row says.

    Raises:
        UserError: it is no image, or in a file that is outside, no regular one, or larger than any.
        FileNotFoundError: the file is not there; its text is the name.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(f"{where} has no image, but {type(value).__name__}")
    file = folder / value
    try:
        if not folder.is_dir() or not is_inside(file, folder):
            raise UserError(f"{where} names the image {value}, which is not in the folder of the dataset")
        if not file.exists():
            raise FileNotFoundError(value)
        if not file.is_file() or file.stat().st_size > _LARGEST:
            raise UserError(f"{where}: the image {value} is no image's file")
        return file.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: the image {value} cannot be read: {one_line(str(error))}") from None


def check_sources(folder: Path) -> None:
    """Raise a UserError if a local dataset says that its files are elsewhere, from where `datasets` would read them.

    Args:
        folder: of the dataset; for a name on the hub there is none.
    """
    said: list[tuple[Path, Any]] = []
    for file in (folder / "README.md", folder / ".huggingface.yaml"):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # which datasets itself says then
            text = file.read_text(encoding="utf-8")
            said.append((file, metadata_load(file) if file.suffix == ".md" else yaml.safe_load(text)))
    for file in (folder / "state.json", *folder.glob("*/state.json")):
        with contextlib.suppress(OSError, ValueError):
            said.append((file, {"configs": json.loads(file.read_text(encoding="utf-8")).get("_data_files")}))
    for file, content in said:
        configs = content.get("configs") if isinstance(content, dict) else None
        if found := re.search(r'"([^"]*://[^"]*|/[^"]*|([^"]*/)?\.\.(/[^"]*)?)"', json.dumps(configs, default=str)):
            raise UserError(f"{file} says that the dataset's files are elsewhere ({found[1]}): copy them into {folder}")
