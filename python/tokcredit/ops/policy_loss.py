"""The clipped surrogate and its gradient in one pass: contract in ``csrc/ops/policy_loss.hpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from tokcredit import _C
from tokcredit.ops.call import DEVICES, accumulated, num_threads, plain, result
from tokcredit.spans import Spans

SURROGATES = ("clip", "weighted", "soft", "k1", "k2", "k3")
LOSS_STATS = ("loss", "tokens", "below", "above", "capped", "ratio", "divergence", "nonfinite")

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
        log_probs.new_empty((begin.shape[0], 7), dtype=torch.float64),
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
    def forward(ctx: Any, log_probs: Tensor, spans: Spans, *arguments: Any) -> tuple[Tensor, Tensor]:
        stats, gradient = torch.ops.tokcredit.policy_loss(log_probs, *arguments)
        ctx.save_for_backward(log_probs)
        ctx.mark_non_differentiable(stats)
        ctx.gradient, ctx.spans = gradient, spans
        return stats[:, 0].to(gradient.dtype), stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (log_probs,) = ctx.saved_tensors
        scale = torch.ops.tokcredit.expand(
            ctx.spans.begin, ctx.spans.end, None, ctx.spans.size, grad.dtype, grad.contiguous(), None, None, None, None, None, 1
        )
        return (ctx.gradient * scale).to(log_probs.dtype), *([None] * 20)


def policy_loss(
    log_probs: Tensor,
    spans: Spans,
    surrogate: str,
    *,
    reference: Tensor | None = None,
    log_ratio: Tensor | None = None,
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
    low: Any = None,
    high: Any = None,
    cap: Any = None,
    trains: Tensor | None = None,
    cumulative: bool = False,
    bound: float = float("inf"),
    power: float = 0.0,
    clamp: tuple[float, float] = (-float("inf"), float("inf")),
    limit: float = float("inf"),
    gate: Any = None,
) -> tuple[Tensor, Tensor]:
    """Interim wrapper around the first edition's operation."""
    dtype = accumulated(log_probs.dtype)
    if reference is not None and reference.dtype != log_probs.dtype:
        common = torch.promote_types(log_probs.dtype, reference.dtype)
        log_probs, reference = log_probs.to(common), reference.to(common)
        dtype = accumulated(common)

    def number(x: Any) -> Any:
        return torch.full((), x, device=log_probs.device) if isinstance(x, float) else x

    operands = [
        None if x is None else number(x).to(dtype) for x in (log_ratio, advantages, weights, low, high, cap)
    ]
    surrogate = "weighted" if surrogate == "gated" else surrogate
    arguments = (
        reference,
        *operands,
        *spans.arrays,
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
        rows, stats = _PolicyLoss.apply(log_probs, spans, *arguments)
    else:
        stats, _ = torch.ops.tokcredit.policy_loss(log_probs, *arguments)
        rows = stats[:, 0].to(dtype)
    return rows, torch.cat([stats, torch.zeros_like(stats[:, :1])], 1)
