"""How operations are called: over which rows, with how many threads, and with results of which dtype."""

from __future__ import annotations

import math
import os
from typing import cast

import torch
from torch import Tensor

from tokcredit import _C

DEVICES: tuple[str, ...] = ("cpu", "cuda")
_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def num_threads() -> int:
    """Return how many threads a CPU operation uses at most: as many as CPUs this process may run on, unless set."""
    return _threads


def set_num_threads(count: int) -> None:
    """Set :func:`num_threads`. Results do not depend on it, not even in the last bit.

    Args:
        count: At least 1.

    Raises:
        ValueError: ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    global _threads
    _threads = count


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a dtype are summed and results are given.

    Args:
        dtype: A float dtype.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


_TYPES: dict[torch.dtype, int] = {getattr(torch, name): number for number, name in enumerate(_C.TYPES)}


def result(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor. On the CPU a large one reuses memory of earlier results and cannot be resized.

    Args:
        like: Tensor whose device is used.
        shape: Shape of the result.
        dtype: Its dtype; that of ``like`` if None.
    """
    dtype = dtype or like.dtype
    ours = type(like) is Tensor and like.is_cpu and dtype in _TYPES
    if ours and math.prod(shape) * dtype.itemsize >= _C.LARGE:
        return cast(Tensor, _C.empty(shape, _TYPES[dtype]))
    return like.new_empty(shape, dtype=dtype)


def empty_cache() -> None:
    """Return to the system the memory that large results on the CPU have left: at most 256 MiB.

    It is kept for later results, because writing memory that is new to the process takes several times as long. You
    need not call this: Linux takes the memory back when it is short.
    """
    _C.empty_cache()


def plain(x: Tensor | None) -> Tensor | None:
    """Return a contiguous tensor, or None.

    Args:
        x: A tensor or None.
    """
    return None if x is None else x.contiguous()
