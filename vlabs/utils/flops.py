"""Counting the arithmetic of a computation."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ITS_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flop_counter() -> FlopCounterMode:
    """A context manager that counts FLOPs, two per multiply-add, of products of matrices, convolutions and attention.

    torch's own counter leaves out attention where a CPU computes it by its fast kernel.
    """
    return FlopCounterMode(display=False, custom_mapping={_KERNEL: _attention, _ITS_BACKWARD: _attention_backward})


def _attention(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *others: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)
