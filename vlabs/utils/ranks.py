"""Which of a run's processes this is."""

from __future__ import annotations

import torch.distributed as dist
from pytorch_lightning.utilities import rank_zero_only

from vlabs.errors import show


@rank_zero_only
def say(message: str) -> None:
    """Print a line of a run's own, once whatever the number of processes."""
    show(message, flush=True)


def is_distributed() -> bool:
    """Whether processes can talk to each other now."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are; (0, 1) where there is one."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def is_rank_zero() -> bool:
    """Whether this process writes files and speaks for all, as Lightning knows before they can talk to each other."""
    return int(getattr(rank_zero_only, "rank", 0)) == 0
