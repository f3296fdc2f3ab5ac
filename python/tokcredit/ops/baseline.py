"""Advantages over the baseline of least variance: contract in ``csrc/ops/baseline.hpp``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result
from tokcredit.spans import Spans


def _baseline_outputs(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    with_returns, dtype = arguments[8], accumulated(log_probs.dtype)
    return (
        result(log_probs, log_probs.shape, dtype),
        result(log_probs, log_probs.shape if with_returns else (0,), dtype),
    )


@operation(
    "baseline(Tensor log_probs, Tensor squares, Tensor rewards, Tensor begin, Tensor end, Tensor? mask, Tensor group, "
    "int groups, float epsilon, bool with_returns, int threads) -> (Tensor, Tensor)",
    _baseline_outputs,
)
def _baseline(log_probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    advantages, returns = _baseline_outputs(log_probs, *arguments)
    squares, rewards, begin, end, mask, group, groups, epsilon, with_returns, threads = arguments
    if begin.numel() == 0:
        return advantages.zero_(), returns.zero_()
    _C.baseline(
        log_probs.contiguous(),
        squares.contiguous(),
        rewards.contiguous(),
        begin,
        end,
        plain(mask),
        group.contiguous(),
        groups,
        epsilon,
        advantages,
        returns if with_returns else None,
        threads,
    )
    return advantages, returns


def baseline(
    log_probs: Tensor,
    squares: Tensor,
    rewards: Tensor,
    spans: Spans,
    group: Tensor,
    groups: int,
    epsilon: float = 1e-8,
    with_returns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advantages ``[N]`` over the baseline of least variance, and returns (``[0]`` unless wanted).

    ``rewards`` is ``[N]`` or one per row, ``[R, 1]``; see ``csrc/ops/baseline.hpp``.
    """
    advantages, returns = _baseline(
        log_probs, squares, rewards, *spans.arrays, group, groups, epsilon, with_returns, num_threads()
    )
    return advantages, returns
