"""Files of a model on the Hugging Face hub; all downloads of vlabs go through `download`."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, logging

from vlabs.errors import UserError


def download(
    name: str, files: Sequence[str], instead: str = "DIR", revision: str | None = None, **options: Any
) -> Path:
    """Download files of a model on the hub; without a network, use the files in the cache, even if incomplete.

    It prints nothing, and fails within seconds if the hub does not answer.

    Args:
        name: `user/name`.
        files: the files to download if they exist; `*` matches anything.
        instead: the option to pass with a folder DIR that was downloaded by hand, for messages.
        revision: branch, tag or commit.
        options: options of huggingface_hub's `snapshot_download`.

    Raises:
        UserError: nothing of it is available; the message says what to pass instead.
    """
    loud = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        if not options.get("local_files_only"):  # snapshot_download would wait forever for a host that does not answer
            _ask(name, revision, options.get("token"))
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files), **options))
    except Exception as error:  # hub, network and cache raise many kinds of errors
        if found := next(_cached(name, files, revision, options.get("cache_dir")), None):
            return found
        if isinstance(error, HFValidationError):
            raise UserError(f"{name} is not a local file or folder, and not a name on the Hugging Face hub") from None
        raise UserError(
            f"{name} is not a local file or folder, not in the local cache, and not available on the Hugging Face hub "
            f"({_why(error)}): download it where there is a network, with `hf download {name} --local-dir DIR`, and "
            f"pass {instead}"
        ) from None
    finally:
        logging.set_verbosity(loud)


def check_reachable(wanted: Mapping[str, str | None]) -> None:
    """Check that models are in the cache if the hub does not answer. It takes seconds, and reads no file.

    Args:
        wanted: hub names, local paths or None, by the option to pass with a folder instead.

    Raises:
        UserError: the hub does not answer; the message names all models that are missing, and the options to pass.
    """
    missing = {
        option: name
        for option, name in wanted.items()
        if name and _NAME.fullmatch(name) and not Path(name).exists() and not any(_cached(name, _ANY, None, None))
    }
    if not missing:
        return
    try:
        _ask(next(iter(missing.values())), None, None)
    except Exception as error:
        if _why(error) not in _NO_ANSWER:
            return  # reading the model says more
        options = {name: f"{option}=DIR" for option, name in reversed(missing.items())}  # the first one of each name
        raise UserError(
            f"not in the local cache, and the Hugging Face hub cannot be asked ({_why(error)}): "
            f"{', '.join(dict.fromkeys(missing.values()))}. Where there is a network, download each, with "
            f"`hf download NAME --local-dir DIR`, and pass {' '.join(reversed(options.values()))}"
        ) from None


def hub_name(tag: str) -> str | None:
    """The hub name of a timm tag of a ViT, without importing timm; None if it is a path or not known."""
    if "." not in tag or "/" in tag or re.search(r"\.(safetensors|pth|pt|bin|ckpt|tar)$|ijepa|lingbot", tag):
        return None
    return f"timm/{tag.replace('_quickgelu', '')}"


def _ask(name: str, revision: str | None, token: str | bool | None) -> None:
    """Raise an error if the hub does not answer (checked at most once per minute), or has no such model."""
    global _silent
    if _silent is not None and time.monotonic() - _silent[1] < _REMEMBERED:
        raise _silent[0]
    try:
        HfApi(token=token).model_info(name, revision=revision, timeout=_SECONDS)
    except Exception as error:
        if _why(error) == "no network":
            _silent = error, time.monotonic()
        raise


def _cached(name: str, files: Sequence[str], revision: str | None, cache: Any) -> Iterator[Path]:
    """The model's cache folder, once for each file in it."""
    for file in files:
        try:
            found = try_to_load_from_cache(name, file, cache_dir=cache, revision=revision)
        except ValueError:  # no name that the hub could have
            return
        if isinstance(found, str):
            yield Path(found).parent


_SECONDS, _REMEMBERED = 3.5, 60.0
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ANY = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "model.safetensors")
_NO_ANSWER = ("no network", "HF_HUB_OFFLINE is set")
_silent: tuple[Exception, float] | None = None  # the hub did not answer, and when
_REASONS = {
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set",
    "GatedRepoError": "access to it must be requested on its page, then `hf auth login`",
    "RepositoryNotFoundError": "it has no such model, or a private one: `hf auth login`",
    "RevisionNotFoundError": "it has no such revision",
    **dict.fromkeys(("ConnectError", "TimeoutException", "ConnectionError"), "no network"),
}


def _why(error: BaseException) -> str:
    chain = [one for one in (error, error.__cause__, error.__context__) if one is not None]
    names = [kind.__name__ for one in chain for kind in type(one).__mro__]
    return next((_REASONS[name] for name in names if name in _REASONS), names[0])
