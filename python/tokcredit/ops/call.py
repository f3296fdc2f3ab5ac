"""How operations are called: over which rows, with how many threads, and with results of which dtype."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def num_threads() -> int:
    """Threads of CPU operations: the CPUs this process may run on, whatever ``OMP_NUM_THREADS`` says."""
    return _threads


def set_num_threads(count: int) -> None:
    """Sets :func:`num_threads`; results do not depend on it, not even in the last bit."""
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    global _threads
    _threads = count


class Rows(NamedTuple):
    """Spans of flat token buffers: row r is ``[begin[r], end[r])``, and only tokens with ``mask`` take part.

    ``begin`` and ``end`` are int64 ``[R]``, increasing and disjoint; ``mask`` is bool ``[N]`` or None for all.
    """

    begin: Tensor
    end: Tensor
    mask: Tensor | None = None


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """What values of this dtype are summed in and results have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def plain(x: Tensor | None) -> Tensor | None:
    """A contiguous tensor, or none."""
    return None if x is None else x.contiguous()
