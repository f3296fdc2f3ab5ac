"""The clipped surrogate and its gradient in one pass: contract in ``csrc/ops/policy_loss.hpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from tokcredit import _C
from tokcredit.ops.call import DEVICES, Rows, accumulated, num_threads, plain, result

SURROGATES = ("clip", "weighted", "soft", "k1", "k2", "k3")
LOSS_STATS = ("loss", "tokens", "below", "above", "capped", "ratio", "divergence")

define(
    "tokcredit::policy_loss",
    "(Tensor log_probs, Tensor? reference, Tensor? log_ratio, Tensor? advantages, Tensor? weights, Tensor? low, "
    "Tensor? high, Tensor? cap, Tensor begin, Tensor end, Tensor? mask, Tensor? trains, int surrogate, "
    "bool cumulative, float bound, float power, float clamp_low, float clamp_high, bool differentiate, int threads) "
    "-> (Tensor, Tensor)",
)


@register_fake("tokcredit::policy_loss")
def _policy_loss_outputs(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    begin, differentiate = arguments[7], arguments[17]
    return (
        log_probs.new_empty((begin.shape[0], len(LOSS_STATS)), dtype=torch.float64),
        result(log_probs, log_probs.shape if differentiate else (0,), accumulated(log_probs.dtype)),
    )


@impl("tokcredit::policy_loss", DEVICES)
def _policy_loss(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    stats, gradient = _policy_loss_outputs(log_probs, *arguments)
    *tensors, begin, end, mask, trains, surrogate, cumulative, bound, power, low, high, differentiate, threads = (
        arguments
    )
    if begin.numel() == 0:
        return stats, gradient.zero_()
    _C.policy_loss(
        log_probs.contiguous(),
        *map(plain, tensors),
        begin,
        end,
        plain(mask),
        plain(trains),
        surrogate,
        cumulative,
        bound,
        power,
        low,
        high,
        stats,
        gradient if differentiate else None,
        threads,
    )
    return stats, gradient


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        stats, gradient = torch.ops.tokcredit.policy_loss(log_probs, *arguments)
        ctx.save_for_backward(log_probs)
        ctx.mark_non_differentiable(stats)
        ctx.gradient, ctx.arguments = gradient, arguments
        return stats[:, 0].sum().to(gradient.dtype), stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (log_probs,) = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second time through the same graph
            _, gradient = torch.ops.tokcredit.policy_loss(log_probs, *ctx.arguments)
        # The first pass wrote it, so it is scaled where it lies and given away: no second buffer.
        if torch.compiler.is_compiling():
            gradient = gradient * grad
        elif grad.device.type != "cpu" or grad != 1:
            gradient.mul_(grad)
        return gradient.to(log_probs.dtype), *([None] * len(ctx.arguments))


def policy_loss(
    log_probs: Tensor,
    rows: Rows,
    surrogate: str,
    *,
    reference: Tensor | None = None,
    log_ratio: Tensor | None = None,
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
    low: Tensor | None = None,
    high: Tensor | None = None,
    cap: Tensor | None = None,
    trains: Tensor | None = None,
    cumulative: bool = False,
    bound: float = float("inf"),
    power: float = 0.0,
    clamp: tuple[float, float] = (-float("inf"), float("inf")),
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted surrogate over all rows, and ``LOSS_STATS`` ``[R, 7]``; see ``csrc/ops/policy_loss.hpp``.

    Every operand may be 0-d (one for all), ``[R, 1]`` (one per row) or ``[N]`` (one per token). ``trains`` is bool
    ``[N]``: the other unmasked tokens count in sums and positions only.
    """
    dtype = accumulated(log_probs.dtype)
    if reference is not None and reference.dtype != log_probs.dtype:
        # Differences are taken in the wider of the two, never after rounding one of them.
        common = torch.promote_types(log_probs.dtype, reference.dtype)
        log_probs, reference = log_probs.to(common), reference.to(common)
        dtype = accumulated(common)
    operands = [None if x is None else x.to(dtype) for x in (log_ratio, advantages, weights, low, high, cap)]
    arguments = (
        reference,
        *operands,
        *rows,
        trains,
        SURROGATES.index(surrogate),
        cumulative,
        bound,
        power,
        *clamp,
        log_probs.requires_grad and torch.is_grad_enabled(),
        num_threads(),
    )
    if log_probs.requires_grad and torch.is_grad_enabled():
        return _PolicyLoss.apply(log_probs, *arguments)
    stats, _ = torch.ops.tokcredit.policy_loss(log_probs, *arguments)
    return stats[:, 0].sum().to(dtype), stats
