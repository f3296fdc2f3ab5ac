"""How operations are called: through torch or directly, with how many threads, with results of which dtype."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _len_torch_dispatch_stack
from torch._C._autograd import _profiler_enabled
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling
from torch.library import define, impl, register_fake

from tokcredit import _C

# Types of arguments that are told at a glance to be no subclass of Tensor.
_ORDINARY = frozenset({Tensor, int, float, bool, list, torch.dtype, type(None)})

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


def _watched(arguments: tuple[Any, ...]) -> bool:
    """Return whether torch must see a call: it compiles, traces, transforms or profiles, or a tensor is special."""
    return (
        is_compiling()
        or not _ORDINARY.issuperset(map(type, arguments))
        or _len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or _profiler_enabled()
        or not (arguments[0].is_cpu or arguments[0].is_cuda)
    )


class Operation:
    """A native operation that is registered with torch as ``torch.ops.tokcredit.<name>``.

    A call goes through torch only where torch must see it, for example under ``torch.compile``. Otherwise it runs
    directly, because torch's dispatcher takes longer than the work on a small batch.

    Args:
        schema: Name, arguments and results as ``torch.library.define`` takes them; the first argument is a tensor.
        outputs: Returns results of the right shape and dtype; called with the arguments of the operation.
        run: Computes the results.
    """

    def __init__(self, schema: str, outputs: Callable[..., Any], run: Callable[..., Any]) -> None:
        name = schema.partition("(")[0]
        define(f"tokcredit::{name}", schema[len(name) :])
        register_fake(f"tokcredit::{name}", outputs)
        impl(f"tokcredit::{name}", ("cpu", "cuda"), run)
        self._dispatched = getattr(torch.ops.tokcredit, name).default
        self._run = run

    def __call__(self, *arguments: Any) -> Any:
        """Return the results.

        Args:
            arguments: Those of the schema, by position.
        """
        return self._dispatched(*arguments) if _watched(arguments) else self._run(*arguments)


def operation(schema: str, outputs: Callable[..., Any]) -> Callable[[Callable[..., Any]], Operation]:
    """Return a decorator that makes an :class:`Operation` of the function that computes it.

    Args:
        schema: As in :class:`Operation`.
        outputs: As in :class:`Operation`.
    """
    return lambda run: Operation(schema, outputs, run)


P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """Return the function such that ``torch.compile`` breaks the graph at a call of it and runs it as it is.

    ``torch.compiler.disable`` does the same, but imports the compiler, which takes longer than all of this package.

    Args:
        function: The function.
    """

    @functools.wraps(function)
    def called(*arguments: P.args, **named: P.kwargs) -> T:
        if not torch.compiler.is_compiling():
            return function(*arguments, **named)
        found: T = torch.compiler.disable(function)(*arguments, **named)
        return found

    return called


def accumulated(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of a dtype are summed and results are given.

    Args:
        dtype: A float dtype.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


_LARGE: int = _C.LARGE
_TYPES: dict[torch.dtype, int] = {getattr(torch, name): number for number, name in enumerate(_C.TYPES)}


def result(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised tensor. On the CPU a large one reuses memory of earlier results and cannot be resized.

    Args:
        like: Tensor whose device is used.
        shape: Shape of the result.
        dtype: Its dtype; that of ``like`` if None.
    """
    dtype = dtype or like.dtype
    if type(like) is Tensor and math.prod(shape) * dtype.itemsize >= _LARGE and like.is_cpu and dtype in _TYPES:
        return _C.empty(shape, _TYPES[dtype])
    return torch.empty(shape, dtype=dtype, device=like.device)


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
