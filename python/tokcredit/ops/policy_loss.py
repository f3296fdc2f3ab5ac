"""Policy-gradient losses per row with their gradient in one pass: contract in ``csrc/ops/policy_loss.hpp``."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result
from tokcredit.spans import Spans

SURROGATES: tuple[str, ...] = _C.SURROGATES
COORDINATES: tuple[str, ...] = _C.COORDINATES
GATED_VALUES: tuple[str, ...] = _C.GATED_VALUES
LOSS_STATS: tuple[str, ...] = _C.LOSS_STATS
_SOURCES: tuple[str, ...] = _C.SOURCES
_ABSENT: tuple[float, ...] = tuple(_C.OPERANDS.values())


def _policy_loss_outputs(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    begin, differentiate, dtype = arguments[3], arguments[17], accumulated(log_probs.dtype)
    rows = begin.shape[0]
    return (
        result(log_probs, (rows,), dtype),
        result(log_probs, (rows, len(LOSS_STATS)), torch.float64),
        result(log_probs, log_probs.shape if differentiate else (0,), dtype),
    )


# `operands` and `numbers` are in the order of _C.OPERANDS; a number stands where the tensor is None.
@operation(
    "policy_loss(Tensor log_probs, Tensor? reference, Tensor?[] operands, float[] numbers, "
    "Tensor begin, Tensor end, Tensor? mask, Tensor? trains, "
    "int surrogate, int source, int on, int value, bool both_sides, "
    "float bound, float power, float limit, float clamp_low, float clamp_high, bool differentiate, int threads) "
    "-> (Tensor values, Tensor stats, Tensor slopes)",
    _policy_loss_outputs,
)
def _policy_loss(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    values, stats, slopes = _policy_loss_outputs(log_probs, *arguments)
    reference, operands, numbers, begin, end, mask, trains = arguments[:7]
    surrogate, source, on, value, both_sides, bound, power, limit, low, high, differentiate, threads = arguments[7:]
    if begin.numel() == 0:
        return values, stats, slopes.zero_()
    _C.policy_loss(
        log_probs.contiguous(),
        plain(reference),
        [plain(x) for x in operands],
        numbers,
        begin,
        end,
        plain(mask),
        plain(trains),
        surrogate,
        source,
        on,
        value,
        both_sides,
        bound,
        power,
        limit,
        low,
        high,
        values,
        stats,
        slopes if differentiate else None,
        threads,
    )
    return values, stats, slopes


def _scale_rows_outputs(*arguments: Any) -> None:
    return None


@operation("scale_rows_(Tensor(a!) x, Tensor factor, Tensor begin, Tensor end, int threads) -> ()", _scale_rows_outputs)
def _scale_rows(x: Tensor, factor: Tensor, begin: Tensor, end: Tensor, threads: int) -> None:
    if begin.numel():
        _C.scale_rows(x, factor.contiguous(), begin, end, x, threads)


def _row_product_output(x: Tensor, *arguments: Any) -> Tensor:
    return result(x, x.shape)


@operation("row_product(Tensor x, Tensor factor, Tensor begin, Tensor end, int threads) -> Tensor", _row_product_output)
def _row_product(x: Tensor, factor: Tensor, begin: Tensor, end: Tensor, threads: int) -> Tensor:
    y = _row_product_output(x)
    if begin.numel() == 0:
        return y.zero_()
    _C.scale_rows(x.contiguous(), factor.contiguous(), begin, end, y, threads)
    return y


def row_product(x: Tensor, factor: Tensor, spans: Spans) -> Tensor:
    """Return each token's number times that of its row, ``[N]``; 0 outside of rows.

    Args:
        x: float ``[N]``.
        factor: float, one number per row, ``[R]`` or ``[R, 1]``.
        spans: The rows; their mask is not read.
    """
    dtype = accumulated(torch.promote_types(x.dtype, factor.dtype))
    return _row_product(x.to(dtype), factor.to(dtype), spans.begin, spans.end, num_threads())


Combine = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""A function of row values ``[R]``: a loss 0-d, its derivative to each value ``[R]``, and further numbers."""


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, log_probs: Tensor, arguments: tuple[Any, ...], total: bool, combine: Combine | None
    ) -> tuple[Tensor, Tensor]:
        values, stats, slopes = _policy_loss(log_probs, *arguments)
        ctx.of_rows = None
        if combine is not None:
            values, ctx.of_rows, stats = combine(values)
            _scale_rows(slopes, ctx.of_rows, *arguments[3:5], num_threads())
        elif total:
            values = values.sum()
        ctx.save_for_backward(log_probs)
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.slopes, ctx.arguments = slopes, arguments
        return values, stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        (log_probs,) = ctx.saved_tensors
        slopes, ctx.slopes = ctx.slopes, None
        # The first pass wrote them, so they are scaled where they lie and given away: no second buffer.
        if slopes is None:  # a second time through the same graph
            slopes = _policy_loss(log_probs, *ctx.arguments)[2]
            if ctx.of_rows is not None:
                _scale_rows(slopes, ctx.of_rows, *ctx.arguments[3:5], num_threads())
        elif is_compiling():
            slopes = slopes.clone()
        _scale_rows(slopes, grad, *ctx.arguments[3:5], num_threads())
        return slopes if slopes.dtype == log_probs.dtype else slopes.to(log_probs.dtype), None, None, None


def _index(names: tuple[str, ...], argument: str, name: str) -> int:
    if name not in names:
        raise ValueError(f"policy_loss: {argument}: expected one of {', '.join(names)}, got {name!r}")
    return names.index(name)


def policy_loss(
    log_probs: Tensor,
    spans: Spans,
    surrogate: str,
    *,
    reference: Tensor | None = None,
    log_ratio: Tensor | float | None = None,
    advantages: Tensor | float | None = None,
    weights: Tensor | float | None = None,
    low: Tensor | float | None = None,
    high: Tensor | float | None = None,
    cap: Tensor | float | None = None,
    outside_low: Tensor | float | None = None,
    outside_high: Tensor | float | None = None,
    given: Tensor | float | None = None,
    trains: Tensor | None = None,
    on: str = "ratio",
    value: str = "score",
    both_sides: bool = False,
    cumulative: bool = False,
    bound: float = inf,
    power: float = 0.0,
    limit: float = inf,
    clamp: tuple[float, float] = (-inf, inf),
    total: bool = False,
    combine: Combine | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weighted surrogate summed over each row, and statistics of each row.

    Definition: ``csrc/ops/policy_loss.hpp``.

    Args:
        log_probs: Log-probs of the N tokens in any shape, of any float dtype. Values and slopes are float32, or float64
            for float64.
        spans: The rows; tokens under a False mask take no part.
        surrogate: One of ``SURROGATES``.
        reference: Log-probs of another policy ``[N]``.
        log_ratio: Log-ratio to use in place of ``log_probs - reference``. This and the next operands are one number,
            one per row ``[R, 1]`` or one per token ``[N]``.
        advantages: Advantages, 1 if absent. The KL kinds are multiplied by them too.
        weights: Weights of the loss, 1 if absent.
        low: Lower bound of the log-ratio, or of the coordinate that ``gated`` looks at; -inf if absent.
        high: Upper bound; inf if absent.
        cap: Dual-clip bound of the log-ratio; for ``gated`` the most the weight's log-ratio may be. inf if absent.
        outside_low: Share of the slope that ``gated`` leaves below ``low``; 0 if absent.
        outside_high: Share of the slope that ``gated`` leaves above ``high``; 0 if absent.
        given: Divergence that a gate ``on="given"`` looks at.
        trains: bool ``[N]``; tokens where it is False count in sums and positions only. None for all.
        on: Coordinate of ``gated``, one of ``COORDINATES``.
        value: Value that ``gated`` reports, one of ``GATED_VALUES``.
        both_sides: Whether the gate watches both sides of the window whatever the sign of the advantage.
        cumulative: Whether the log-ratio is the sum of differences along the row.
        bound: Largest absolute difference in a cumulative log-ratio.
        power: Bounds grow with the token's position to this power.
        limit: Where a KL estimate exceeds it, the estimate is held there and has no slope.
        clamp: Smallest and largest log-ratio.
        total: Whether to return the sum over rows, which saves a node of the graph.
        combine: Another function of the rows' values to return in place of them, likewise.

    Returns:
        Values ``[R]``, or their sum 0-d, with a gradient to ``log_probs``, and statistics float64
        ``[R, len(LOSS_STATS)]`` without one. With ``combine`` its loss and its further numbers.

    Raises:
        ValueError: An unknown name, tensors of other shapes or dtypes, or ``cumulative`` with a ``log_ratio``.
    """
    if cumulative and log_ratio is not None:
        raise ValueError("policy_loss: log_ratio: expected None because the log-ratio is cumulative, got one")
    dtype = accumulated(log_probs.dtype)
    if reference is not None and reference.dtype != log_probs.dtype:
        # Differences are taken in the wider of the two, never after rounding one of them.
        common = torch.promote_types(log_probs.dtype, reference.dtype)
        log_probs, reference = log_probs.to(common), reference.to(common)
        dtype = accumulated(common)
    tensors: list[Tensor | None] = []
    numbers: list[float] = []
    operands = (log_ratio, advantages, weights, low, high, cap, outside_low, outside_high, given)
    for x, absent in zip(operands, _ABSENT, strict=True):
        if isinstance(x, Tensor):
            tensors.append(x if x.dtype == dtype else x.to(dtype))
            numbers.append(absent)
        else:
            tensors.append(None)
            numbers.append(absent if x is None else float(x))
    differentiate = log_probs.requires_grad and torch.is_grad_enabled()
    arguments = (
        reference,
        tensors,
        numbers,
        *spans.arrays,
        trains,
        _index(SURROGATES, "surrogate", surrogate),
        _SOURCES.index("cumulative" if cumulative else "difference" if log_ratio is None else "given"),
        _index(COORDINATES, "on", on),
        _index(GATED_VALUES, "value", value),
        both_sides,
        bound,
        power,
        limit,
        *clamp,
        differentiate,
        num_threads(),
    )
    if differentiate:
        return _PolicyLoss.apply(log_probs, arguments, total, combine)
    values, stats, _ = _policy_loss(log_probs, *arguments)
    if combine is not None:
        loss, _, further = combine(values)
        return loss, further
    return values.sum() if total else values, stats
