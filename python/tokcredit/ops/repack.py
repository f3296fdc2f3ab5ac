"""Rows moved from one layout to another: contract in ``csrc/ops/repack.hpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import num_threads, operation, result


def _repack_output(x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int, threads: int) -> Tensor:
    return result(x, (size,))


@operation(
    "repack(Tensor x, Tensor source, Tensor target, Tensor length, SymInt size, int threads) -> Tensor", _repack_output
)
def _repack(x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int, threads: int) -> Tensor:
    y = _repack_output(x, source, target, length, size, threads)
    if source.numel() == 0:
        return y.zero_()
    _C.repack(x.contiguous(), source.contiguous(), target.contiguous(), length.contiguous(), y, threads)
    return y


class _Repack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int) -> Tensor:
        ctx.source, ctx.target, ctx.length, ctx.size = source, target, length, x.numel()
        return _repack(x, source, target, length, size, num_threads())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return repack(grad, ctx.target, ctx.source, ctx.length, ctx.size), None, None, None, None


def repack(x: Tensor, source: Tensor, target: Tensor, length: Tensor, size: int) -> Tensor:
    """Rows of tokens moved from one layout to another, 0 elsewhere; see ``csrc/ops/repack.hpp``."""
    if x.requires_grad:
        return _Repack.apply(x, source, target, length, size)
    return _repack(x, source, target, length, size, num_threads())
