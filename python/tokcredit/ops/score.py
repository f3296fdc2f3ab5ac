"""What token scores do to bounds and advantages: contract in ``csrc/ops/score.hpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result


def _deviation_output(
    x: Tensor, pivot: Tensor, moments: Tensor, floor: float, positive: bool, threads: int
) -> Tensor:
    return result(x, x.shape)


@operation(
    "deviation(Tensor x, Tensor pivot, Tensor moments, float floor, bool positive, int threads) -> Tensor",
    _deviation_output,
)
def _deviation(x: Tensor, pivot: Tensor, moments: Tensor, floor: float, positive: bool, threads: int) -> Tensor:
    y = _deviation_output(x, pivot, moments, floor, positive, threads)
    if x.numel():
        _C.deviation(x.contiguous(), pivot, moments.contiguous(), floor, positive, y, threads)
    return y


def deviation(x: Tensor, pivot: Tensor, moments: Tensor, floor: float, positive: bool = False) -> Tensor:
    """Return the distance of each number from a pivot, as a share of the largest on its side, ``[N]``.

    Definition: ``csrc/ops/score.hpp``.

    Args:
        x: float32 or float64 ``[N]``.
        pivot: ``[1]`` of the same dtype.
        moments: float64 ``[1, 5]``, with the population variance.
        floor: Smallest variance, and smallest divisor in standard deviations.
        positive: Whether distances below the pivot are positive too.
    """
    return _deviation(x, pivot, moments, floor, positive, num_threads())


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


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulated(x.dtype))


def score_bounds(score: Tensor, low: float, high: float, widen: float) -> tuple[Tensor, Tensor]:
    """Return bounds of the log-ratio, one of which is widened by a score, ``[N]`` each.

    Definition: ``csrc/ops/score.hpp``.

    Args:
        score: float ``[N]``.
        low: Lower clip range.
        high: Upper clip range.
        widen: Growth of a clip range where the score is -1 or 1.
    """
    return _score_bounds(_wide(score), low, high, widen, num_threads())


def _factor_output(score: Tensor, *arguments: object) -> Tensor:
    return result(score, score.shape)


@operation(
    "score_factor(Tensor score, Tensor log_ratio, Tensor? low, Tensor? high, float low_number, float high_number, "
    "float strength, int threads) -> Tensor",
    _factor_output,
)
def _score_factor(
    score: Tensor,
    log_ratio: Tensor,
    low: Tensor | None,
    high: Tensor | None,
    low_number: float,
    high_number: float,
    strength: float,
    threads: int,
) -> Tensor:
    y = _factor_output(score)
    if score.numel():
        bounds = (plain(low), plain(high), low_number, high_number)
        _C.score_factor(score.contiguous(), log_ratio.contiguous(), *bounds, strength, y, threads)
    return y


def score_factor(
    score: Tensor, log_ratio: Tensor, low: float | Tensor, high: float | Tensor, strength: float
) -> Tensor:
    """Return the factor of advantages for a score, where it depends on the inner half of the bounds, ``[N]``.

    Definition: ``csrc/ops/score.hpp``. float64 where one of the tensors is.

    Args:
        score: float ``[N]``.
        log_ratio: float ``[N]``.
        low: Lower bound of the log-ratio, one number or ``[N]``.
        high: Upper bound, likewise.
        strength: Factor of the score.
    """
    score, log_ratio = _wide(score), _wide(log_ratio)
    dtype = torch.promote_types(score.dtype, log_ratio.dtype)
    tensors = [x.to(dtype) if isinstance(x, Tensor) else None for x in (low, high)]
    numbers = [0.0 if isinstance(x, Tensor) else float(x) for x in (low, high)]
    return _score_factor(score.to(dtype), log_ratio.to(dtype), *tensors, *numbers, strength, num_threads())
