"""Sharing a model: as a safetensors file, as a folder in the Hugging Face hub's layout, or on the hub itself."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from PIL import Image

from vlabs.checkpoints.card import model_card
from vlabs.checkpoints.checkpoint import find_checkpoint, load_checkpoint
from vlabs.errors import UserError, one_line
from vlabs.models.hub import CONFIG, FILES
from vlabs.utils.files import new_folder

PICTURE = "picture.png"
PROGRAMS = "programs.json"
_PROGRAM = (".onnx", ".data", ".pt2")


def export_folder(
    ckpt: str | Path,
    out: str | Path,
    name: str | None = None,
    license: str | None = None,
    metrics: Sequence[Path] = (),
    picture: Image.Image | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a folder that `vlabs.load`, `ckpt=`, `init=` and `from_pretrained` read, completely or not at all.

    Args:
        ckpt: run folder or checkpoint.
        out: the new folder.
        name: the name by which the card loads it; None for the folder's name.
        license, metrics: see `model_card`.
        picture: an image that the card shows; its metadata are not stored.
        overwrite: whether `out` may be an earlier export.

    Raises:
        UserError: the checkpoint does not exist, or `out` exists.
    """
    out = Path(out)
    with new_folder(out, "--out", replaces=is_export, overwrite=overwrite) as partial:
        checkpoint = load_checkpoint(ckpt)
        checkpoint.network._save_pretrained(partial)  # type: ignore[operator]
        if picture:
            Image.fromarray(np.asarray(picture)).save(partial / PICTURE)  # without its metadata
        card = model_card(checkpoint, run_of(ckpt), name or str(out), license, metrics, PICTURE if picture else None)
        card.save(partial / "README.md")
    return out


def is_export(folder: Path) -> bool:
    """Whether a folder holds an export of vlabs (weights or programs) and nothing else."""
    known = (*FILES, PICTURE, PROGRAMS)
    if not folder.is_dir() or any(one.name not in known and one.suffix not in _PROGRAM for one in folder.iterdir()):
        return False
    for name, entry in ((CONFIG, "architecture"), (PROGRAMS, "programs")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            if entry in json.loads((folder / name).read_text(encoding="utf-8")):
                return True
    return False


def push_to_hub(
    ckpt: str | Path,
    name: str,
    private: bool = False,
    license: str | None = None,
    metrics: Sequence[Path] = (),
    picture: Image.Image | None = None,
    token: str | None = None,
) -> str:
    """Upload a model to the hub in one commit; files of the same name are replaced.

    Args:
        name: `user/name`.
        private: whether a new repository is private.
        token: access token of the hub; None for that of `hf auth login`.
        ckpt, license, metrics, picture: see `export_folder`.

    Returns:
        The address of the commit.

    Raises:
        UserError: the checkpoint does not exist, or the hub refuses the upload.
    """
    if name.count("/") != 1:
        raise UserError(f"--to-hub {name}: name it as user/name")
    with tempfile.TemporaryDirectory() as folder:
        made = export_folder(ckpt, Path(folder) / "model", name, license, metrics, picture)
        api = HfApi(token=token)
        try:
            api.create_repo(name, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=name, folder_path=made, commit_message="A model of vlabs", delete_patterns=["*.safetensors"]
            )
        except Exception as error:  # the hub and the network raise many kinds of errors
            reason = one_line(str(error)) or type(error).__name__
            raise UserError(
                f"--to-hub {name}: the hub refuses it ({reason}): log in with `hf auth login`, or write a folder "
                "with --out FOLDER and upload it with `hf upload`"
            ) from None
    return str(commit.commit_url)


def run_of(ckpt: str | Path) -> Path | None:
    """The run folder of a checkpoint."""
    folder = find_checkpoint(ckpt).parent.parent
    return folder if (folder / "config.yaml").is_file() else None
