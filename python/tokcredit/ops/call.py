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
    """Threads of CPU operations, at most: the CPUs this process may run on, whatever ``OMP_NUM_THREADS`` says.

    Where torch computes with several threads they are shared, and no more are used than torch has.
    """
    return _threads


def set_num_threads(count: int) -> None:
    """Sets :func:`num_threads`; results do not depend on it, not even in the last bit."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    global _threads
    _threads = count




def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are summed in and results have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_TYPES = {
    dtype: number
    for number, dtype in enumerate(
        (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool)
    )
}


def result(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, on the device of ``like``; on the CPU a large one lies where earlier results lay.

    Those cannot be resized, as no tensor that torch did not allocate.
    """
    dtype = dtype or like.dtype
    ours = type(like) is Tensor and like.is_cpu and dtype in _TYPES
    if ours and math.prod(shape) * dtype.itemsize >= _C.LARGE:
        return cast(Tensor, _C.empty(shape, _TYPES[dtype]))
    return like.new_empty(shape, dtype=dtype)


def empty_cache() -> None:
    """Returns to the system the memory that results on the CPU have left, at most 256 MiB.

    It is kept for the results that follow, because memory new to the process costs several times what writing it does.
    There is no need to call this: Linux takes it back by itself when it is short.
    """
    _C.empty_cache()


def plain(x: Tensor | None) -> Tensor | None:
    """A contiguous tensor, or none."""
    return None if x is None else x.contiguous()
