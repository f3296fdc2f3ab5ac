"""Masked linear recurrences along rows: contract in ``csrc/ops/scan.hpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result
from tokcredit.spans import Spans

Decay = float | Tensor


def _scan_outputs(x: Tensor, begin: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    dtype = accumulated(x.dtype)
    return result(x, x.shape, dtype), result(x, begin.shape, dtype)


@operation(
    "scan(Tensor x, Tensor begin, Tensor end, Tensor? mask, float decay, Tensor? decays, Tensor? carry, bool reverse, "
    "bool exclusive, int threads) -> (Tensor, Tensor)",
    _scan_outputs,
)
def _scan(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    decay: float,
    decays: Tensor | None,
    carry: Tensor | None,
    reverse: bool,
    exclusive: bool,
    threads: int,
) -> tuple[Tensor, Tensor]:
    y, last = _scan_outputs(x, begin)
    if begin.numel() == 0:
        return y.zero_(), last
    decays = plain(decays)
    _C.scan(x.contiguous(), begin, end, plain(mask), decay, decays, plain(carry), reverse, exclusive, y, last, threads)
    return y, last


def _apart(decay: Decay) -> tuple[float, Tensor | None]:
    return (1.0, decay) if isinstance(decay, Tensor) else (decay, None)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, carry: Tensor | None, spans: Spans, decay: Decay, reverse: bool, exclusive: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.spans, ctx.decay, ctx.reverse, ctx.exclusive, ctx.dtype = spans, decay, reverse, exclusive, x.dtype
        ctx.set_materialize_grads(False)
        ctx.shape = x.shape
        return _scan(x, *spans.arrays, *_apart(decay), carry, reverse, exclusive, num_threads())

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
        # The adjoint of a decayed recurrence is the same recurrence walked the other way.
        def adjoint(g: Tensor, carry: Tensor | None, exclusive: bool) -> tuple[Tensor, Tensor]:
            return _scan(g, *ctx.spans.arrays, *_apart(ctx.decay), carry, not ctx.reverse, exclusive, num_threads())

        gx = gcarry = None
        if grad is not None:
            gx, gcarry = adjoint(grad, None, ctx.exclusive)
            gcarry = gcarry if ctx.exclusive else (gcarry * ctx.decay).to(gcarry.dtype)
        if grad_last is not None:
            through, first = adjoint(grad_last.new_zeros(ctx.shape), grad_last, True)
            gx = through if gx is None else gx + through
            gcarry = first if gcarry is None else gcarry + first
        gcarry = gcarry if ctx.needs_input_grad[1] else None
        return None if gx is None else gx.to(ctx.dtype), gcarry, None, None, None, None


def scan(
    x: Tensor,
    spans: Spans,
    decay: Decay = 1.0,
    carry: Tensor | None = None,
    reverse: bool = False,
    exclusive: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs and last states of the masked recurrence of ``csrc/ops/scan.hpp``; ``decay`` may be float64 ``[R]``."""
    if x.requires_grad or (carry is not None and carry.requires_grad):
        return _Scan.apply(x, carry, spans, decay, reverse, exclusive)
    return _scan(x, *spans.arrays, *_apart(decay), carry, reverse, exclusive, num_threads())
