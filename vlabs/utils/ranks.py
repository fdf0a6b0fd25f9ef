"""The rank of this process."""

from __future__ import annotations

import os
import sys

from vlabs.errors import show


def say(message: str) -> None:
    """Print a line once, whatever the number of processes."""
    if is_rank_zero():
        show(message, flush=True)


def is_distributed() -> bool:
    """Whether torch.distributed is initialized."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Rank and world size; (0, 1) for a single process."""
    if not is_distributed():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def is_rank_zero() -> bool:
    """Whether this process writes files and prints; known before torch.distributed is initialized."""
    if "pytorch_lightning" in sys.modules:
        from pytorch_lightning.utilities import rank_zero_only

        return int(getattr(rank_zero_only, "rank", 0)) == 0
    # As Lightning finds it; importing it takes seconds.
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), 0)) == 0


_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")
