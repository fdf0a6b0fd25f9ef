"""Plain data from untrusted files: bounded, and only what JSON can hold."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader

from vlabs.errors import UserError, one_line

LARGEST = 64 * 2**20
"""Largest number of bytes of a file of plain data."""
_DEEPEST = 50
_MOST = 2_000_000  # values
_LARGEST_CONFIG = 2**20  # characters
_MOST_OF_CONFIG = 20_000
_MOST_ALIASES = 20


def read_text(path: Path) -> str:
    """The text of a small file, without the byte order mark that some editors write first.

    Raises:
        UserError: it does not exist, is not a regular file, is larger than `LARGEST`, or is not UTF-8.
    """
    try:
        if not path.is_file():  # reading a pipe or a device might never end
            raise UserError(f"{path} does not exist or is not a regular file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST >> 20} MiB, which is too large for its kind")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not UTF-8") from None


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, with links followed, is in a folder; in the hub's cache, which has links, in its blobs."""
    root, real = (Path(os.path.realpath(one)) for one in (folder, path))
    inside = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith(("models--", "datasets--")):
        inside.append(root.parent.parent / "blobs")
    return any(real.is_relative_to(one) for one in inside)


def check_files(folder: Path, names: Sequence[str]) -> None:
    """Raise a UserError if a file of a model's folder is not a regular file, or is a link out of the folder."""
    for name in names:
        path = folder / name
        if not is_inside(path, folder):
            raise UserError(
                f"{path} is a link out of its folder, to {os.path.realpath(path)}: put the file itself there"
            )
        if os.path.lexists(path) and not (path.is_file() or path.is_dir()):
            raise UserError(f"{path} is not a regular file")


def parse_json(text: str, name: str, finite: bool = True) -> Any:
    """Parse a JSON text.

    Args:
        name: name of the file, for messages.
        finite: numbers must be finite.

    Raises:
        UserError: it is not JSON, or not plain, see `check_plain`.
    """
    try:
        if text.count(",") > _MOST:  # each comma may mean a value, and a parsed value takes many times its bytes
            raise ValueError("it has more values than any that vlabs writes")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON: {one_line(str(error))}") from None
    check_plain(value, name, finite=finite)
    return value


class _Config(get_yaml_loader()):  # type: ignore[misc]
    """YAML with a limit for aliases: a few lines of nested aliases could expand to billions of values."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """See `yaml.composer.Composer`."""
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > _MOST_ALIASES:
            raise yaml.YAMLError("it has too many aliases (*name)")
        return super().compose_node(parent, index)


def parse_config(text: str, name: str) -> dict[str, Any]:
    """Parse the YAML text of a config, which is plain data; numbers may be infinite.

    Args:
        name: name of the file, for messages.

    Raises:
        UserError: it is not a config, or too large for one.
    """
    try:
        if len(text) > _LARGEST_CONFIG:
            raise ValueError("it is larger than any config")
        content = yaml.load(text, Loader=_Config)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged: {one_line(str(error))}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name} is damaged: it is not a config")
    check_plain(content, name, most=_MOST_OF_CONFIG, finite=False)
    return content


def check_plain(value: Any, name: str, most: int = _MOST, finite: bool = True) -> None:
    """Raise a UserError unless a value consists of nested lists and dictionaries of texts and numbers.

    Args:
        name: name of the file, for messages.
        most: largest number of values; shared values count each time.
        finite: numbers must be finite.
    """
    left = [(value, 0)]
    count = 0
    while left:
        one, depth = left.pop()
        count += 1
        if depth > _DEEPEST or count > most:
            raise UserError(f"{name} is not plain data: it is nested too deeply, or larger than any that vlabs writes")
        if isinstance(one, dict):
            if not all(isinstance(key, str) for key in one):
                raise UserError(f"{name} is not plain data: a key in it is not text")
            left += [(inner, depth + 1) for inner in one.values()]
        elif isinstance(one, list | tuple):
            left += [(inner, depth + 1) for inner in one]
        elif isinstance(one, float) and finite and not math.isfinite(one):
            raise UserError(f"{name} is not plain data: a number in it is {one}")
        elif not (one is None or isinstance(one, bool | int | float | str)):
            raise UserError(f"{name} is not plain data: it holds a {type(one).__name__}")
