"""Which of a run's processes this is."""

from __future__ import annotations

from vlabs.errors import show


def say(message: str) -> None:
    """Print a line of a run's own, once whatever the number of processes."""
    if is_rank_zero():
        show(message, flush=True)


def is_distributed() -> bool:
    """Whether processes can talk to each other now."""
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """This process's number, and how many there are; (0, 1) where there is one."""
    if not is_distributed():
        return 0, 1
    import torch.distributed as dist

    return dist.get_rank(), dist.get_world_size()


def is_rank_zero() -> bool:
    """Whether this process writes files and speaks for all, as Lightning knows before they can talk to each other."""
    # Not with this module, which all commands import.
    from pytorch_lightning.utilities import rank_zero_only

    return int(getattr(rank_zero_only, "rank", 0)) == 0
