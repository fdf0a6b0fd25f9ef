"""Which device a model runs on."""

from __future__ import annotations

import torch

from vlabs.errors import UserError


def find_device(name: str | None) -> str:
    """The device that `--device` names; if it is None, the GPU if there is one.

    Raises:
        UserError: there is no such device, or torch cannot use it.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdecimal()) or name.endswith(":"):
        raise UserError(f"--device {name}: choose one of cpu, cuda, cuda:N, mps")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= count:
        raise UserError(f"--device {name}: torch finds {count or 'none'} of its kind here; pass --device cpu")
    return name
