"""What token scores do to bounds and advantages: contract in ``csrc/ops/score.hpp``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result
from tokcredit.spans import Spans


def _deviation_outputs(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    return result(x, x.shape, accumulated(x.dtype)), result(x, (4,), torch.float64)


@operation(
    "log_deviation(Tensor x, Tensor begin, Tensor end, Tensor? mask, float quantile, float floor, bool positive, "
    "int threads) -> (Tensor, Tensor)",
    _deviation_outputs,
)
def _log_deviation(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    quantile: float,
    floor: float,
    positive: bool,
    threads: int,
) -> tuple[Tensor, Tensor]:
    y, statistics = _deviation_outputs(x)
    if begin.numel() == 0:
        return y.zero_(), statistics.fill_(float("nan"))
    _C.log_deviation(x.contiguous(), begin, end, plain(mask), quantile, floor, positive, y, statistics, threads)
    return y, statistics


def log_deviation(
    x: Tensor, spans: Spans, quantile: float, floor: float, positive: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the distance of each logarithm from a quantile as a share of the largest on its side, and statistics.

    Definition: ``csrc/ops/score.hpp``.

    Args:
        x: float ``[N]``.
        spans: The rows.
        quantile: From 0 to 1.
        floor: Smallest ``x``, smallest variance, and smallest divisor in standard deviations.
        positive: Whether distances below the quantile are positive too.

    Returns:
        float ``[N]``, and float64 ``[4]``.
    """
    return _log_deviation(x, *spans.arrays, quantile, floor, positive, num_threads())


def _bounds_outputs(score: Tensor, low: float, high: float, widen: float, threads: int) -> tuple[Tensor, Tensor]:
    return result(score, score.shape), result(score, score.shape)


@operation(
    "score_bounds(Tensor score, float low, float high, float widen, int threads) -> (Tensor, Tensor)", _bounds_outputs
)
def _score_bounds(score: Tensor, low: float, high: float, widen: float, threads: int) -> tuple[Tensor, Tensor]:
    below, above = _bounds_outputs(score, low, high, widen, threads)
    if score.numel():
        _C.score_bounds(score.contiguous(), low, high, widen, below, above, threads)
    return below, above


def score_bounds(score: Tensor, low: float, high: float, widen: float) -> tuple[Tensor, Tensor]:
    """Return bounds of the log-ratio, one of which is widened by a score, ``[N]`` each.

    Definition: ``csrc/ops/score.hpp``.

    Args:
        score: float ``[N]``.
        low: Lower clip range.
        high: Upper clip range.
        widen: Growth of a clip range where the score is -1 or 1.
    """
    return _score_bounds(score.to(accumulated(score.dtype)), low, high, widen, num_threads())


def _factor_output(score: Tensor, *arguments: object) -> Tensor:
    return result(score, score.shape)


@operation(
    "score_factor(Tensor score, Tensor log_probs, Tensor? reference, Tensor advantages, Tensor begin, Tensor end, "
    "Tensor? low_bound, Tensor? high_bound, float low, float high, float widen, float strength, float clamp_low, "
    "float clamp_high, int threads) -> Tensor",
    _factor_output,
)
def _score_factor(
    score: Tensor,
    log_probs: Tensor,
    reference: Tensor | None,
    advantages: Tensor,
    begin: Tensor,
    end: Tensor,
    low_bound: Tensor | None,
    high_bound: Tensor | None,
    low: float,
    high: float,
    widen: float,
    strength: float,
    clamp_low: float,
    clamp_high: float,
    threads: int,
) -> Tensor:
    y = _factor_output(score)
    if begin.numel() == 0:
        return y.zero_()
    rows = (plain(reference), advantages.contiguous(), begin, end)
    bounds = (plain(low_bound), plain(high_bound))
    numbers = (low, high, widen, strength, clamp_low, clamp_high)
    _C.score_factor(score.contiguous(), log_probs.contiguous(), *rows, *bounds, *numbers, y, threads)
    return y


def score_factor(
    score: Tensor,
    log_probs: Tensor,
    advantages: Tensor,
    spans: Spans,
    strength: float,
    ranges: tuple[float, float, float] | None = None,
    bounds: tuple[float | Tensor, float | Tensor] = (-math.inf, math.inf),
    reference: Tensor | None = None,
    clamp: tuple[float, float] = (-math.inf, math.inf),
) -> Tensor:
    """Return advantages times a factor for a score that depends on the inner half of the bounds of the ratio, ``[N]``.

    Definition: ``csrc/ops/score.hpp``. float64 where one of the tensors is.

    Args:
        score: float ``[N]``.
        log_probs: float ``[N]``, or log-ratios without ``reference``.
        advantages: float ``[R, 1]``.
        spans: The rows; their mask is not read.
        strength: Factor of the score.
        ranges: Lower and upper clip range and their growth, as in :func:`score_bounds`.
        bounds: Without ``ranges``, the bounds of the log-ratio, each one number or ``[N]``.
        reference: float ``[N]``, log-probs that the ratio divides by, or None.
        clamp: Smallest and largest log-ratio.
    """
    dtype = score.dtype
    for x in (log_probs, advantages) if reference is None else (log_probs, advantages, reference):
        dtype = dtype if x.dtype == dtype else torch.promote_types(dtype, x.dtype)
    dtype = accumulated(dtype)
    tensors: list[Tensor | None] = [None, None]
    if ranges is None and all(not isinstance(x, Tensor) for x in bounds):
        ranges = 1 - math.exp(bounds[0]), math.expm1(bounds[1]), 0.0
    elif ranges is None:
        tensors = [torch.as_tensor(x, device=score.device).to(dtype).expand(score.shape) for x in bounds]
        ranges = 0.0, 0.0, 0.0
    given = (x if x is None or x.dtype == dtype else x.to(dtype) for x in (score, log_probs, reference, advantages))
    return _score_factor(*given, spans.begin, spans.end, *tensors, *ranges, strength, *clamp, num_threads())
