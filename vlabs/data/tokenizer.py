"""Where a text encoder's tokenizer comes from."""

from __future__ import annotations

import json
from pathlib import Path

from vlabs.errors import UserError, one_line


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
        return path.read_text(encoding="utf-8")
    local = Path(name_or_path) / "tokenizer.json"
    if local.is_file():
        return local.read_text(encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except ImportError as error:
        raise UserError(f"the tokenizer {name_or_path} needs a package: {one_line(str(error))}") from None
    except (OSError, ValueError):
        raise UserError(
            f"the tokenizer {name_or_path} is neither in the local cache nor to be had from the Hugging Face hub: "
            f"download it where there is a network, with `hf download {name_or_path} --local-dir DIR`, "
            "and pass data.tokenizer=DIR"
        ) from None
    return str(tokenizer.backend_tokenizer.to_str())


def special_token(tokenizer: str, name: str) -> int | None:
    """The id of a special token, `pad` or `mask`, of a `tokenizers` JSON: `<pad>`, `[PAD]`; None without one."""
    for token in json.loads(tokenizer)["added_tokens"]:
        if token["content"].strip("<>[]").lower() == name:
            return int(token["id"])
    return None
