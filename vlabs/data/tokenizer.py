"""Read a text encoder's tokenizer from the hub, a folder, or prepared data."""

from __future__ import annotations

import json
from pathlib import Path

from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError, one_line
from vlabs.utils.hub import download
from vlabs.utils.plain import check_files, read_text
from vlabs.utils.tokenizer import check_tokenizer

VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "spm.model", "spiece.model", "sentencepiece.bpe.model"),
    "tokenizer.model",
)
"""The files that may hold the vocabulary of a tokenizer."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
"""The files of a tokenizer that may be in a folder."""
_INSTEAD = "data.tokenizer=DIR (model.text.name_or_path=DIR where it is the text encoder's own)"


def read_tokenizer(name_or_path: str | None, data_dir: Path, instead: str = _INSTEAD) -> str:
    """Read the `tokenizers` JSON of a text encoder.

    Args:
        name_or_path: hub name or local folder; None for the tokenizer that was trained with the data.
        data_dir: the prepared folder.
        instead: the option to pass with a local folder DIR, for messages.

    Raises:
        UserError: it cannot be found or read; the message says which local path to pass.
    """
    if name_or_path is None:
        path = data_dir / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path} is missing: prepare the data with --vocab-size, or pass data.tokenizer=DIR of a text encoder's"
            )
        return _whole(read_text(path), str(path))
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = download(name_or_path, TOKENIZER_FILES, instead)
    check_files(folder, [path.name for path in folder.iterdir()])
    if (folder / "tokenizer.json").exists():
        return _whole(read_text(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
    if not any((folder / file).is_file() for file in VOCABULARIES):  # transformers would make an empty tokenizer
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())[:5]) or "nothing"
        raise UserError(
            f"{name_or_path} has no tokenizer.json: {folder} holds {there}. Download all of it where there is a "
            f"network, with `hf download NAME --local-dir DIR`, and pass {instead}"
        )
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        config = get_tokenizer_config(folder)
        if named := [name for name in config if name.endswith("_file")]:
            # transformers would read any path that the config names, also outside the folder.
            raise UserError(f"the tokenizer {name_or_path} names a file path ({named[0]}), which is not allowed")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"the tokenizer {name_or_path} needs a package: {one_line(str(error))}") from None
    except UserError:
        raise
    except Exception as error:  # damaged files raise many kinds of errors
        raise UserError(f"{folder} holds no tokenizer that can be read: {one_line(str(error))}") from None
    return _whole(str(tokenizer.backend_tokenizer.to_str()), str(name_or_path))


def _whole(text: str, name: str) -> str:
    """Return `text` if it is a valid tokenizer.

    Raises:
        UserError: it is not.
    """
    check_tokenizer(text, name)
    try:
        Preprocessing(1, text).check_tokenizer()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    return text


def special_token(tokenizer: str, name: str) -> int | None:
    """The id of the special token `pad` or `mask` (`<pad>`, `[PAD]`) of a `tokenizers` JSON; None if it has none."""
    for token in json.loads(tokenizer)["added_tokens"]:
        if token["content"].strip("<>[]").lower() == name:
            return int(token["id"])
    return None
