"""Where a text encoder's tokenizer comes from."""

from __future__ import annotations

import json
from pathlib import Path

from vlabs.data.preprocessing import Preprocessing
from vlabs.errors import UserError, one_line
from vlabs.utils.plain import check_files, read_text
from vlabs.utils.tokenizer import check_tokenizer


def read_tokenizer(name_or_path: str | None, data_dir: Path) -> str:
    """The `tokenizers` JSON of a text encoder by hub name or local folder, or of the one trained with the data.

    Raises:
        UserError: it is not there; the message says which local path to pass.
    """
    if name_or_path is None:
        path = data_dir / "tokenizer" / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path} is missing: prepare the data with --vocab-size, or pass data.tokenizer=DIR of a text encoder's"
            )
        return _whole(read_text(path), str(path))
    folder = Path(name_or_path)
    if folder.is_dir():
        check_files(folder, [path.name for path in folder.iterdir()])
        if (folder / "tokenizer.json").exists():
            return _whole(read_text(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    try:
        config = get_tokenizer_config(name_or_path)
        if named := [name for name in config if name.endswith("_file")]:
            raise UserError(f"the tokenizer {name_or_path} names a file of its own choice ({named[0]})")
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
    except ImportError as error:
        raise UserError(f"the tokenizer {name_or_path} needs a package: {one_line(str(error))}") from None
    except UserError:
        raise
    except Exception as error:  # whatever the hub, the network and damaged files can do
        if folder.is_dir():
            raise UserError(f"{folder} holds no tokenizer that can be read: {one_line(str(error))}") from None
        raise UserError(
            f"the tokenizer {name_or_path} is neither in the local cache nor to be had from the Hugging Face hub: "
            f"download it where there is a network, with `hf download {name_or_path} --local-dir DIR`, "
            "and pass data.tokenizer=DIR"
        ) from None
    return _whole(str(tokenizer.backend_tokenizer.to_str()), str(name_or_path))


def _whole(text: str, name: str) -> str:
    """The text, if it is a tokenizer's.

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
    """The id of a special token, `pad` or `mask`, of a `tokenizers` JSON: `<pad>`, `[PAD]`; None without one."""
    for token in json.loads(tokenizer)["added_tokens"]:
        if token["content"].strip("<>[]").lower() == name:
            return int(token["id"])
    return None
