"""Cumulative Token Policy Optimization."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, ratio
from tokcredit.objective import Objective


def ctpo(
    clip_low: float = 0.025,
    clip_high: float = 0.05,
    cap: float | None = 0.05,
    power: float = 0.5,
    token_mean: bool = True,
) -> Objective:
    """GRPO with the ratio of the whole prefix, in a log-space window that widens with the square root of the position.

    ``log q[t] = sum_{s <= t} (log p - log p_old)``, at most 10, clipped to ``[-clip_low, clip_high] * position **
    power``; positions count the row's tokens, and the gradient reaches the current token only.

    Args:
        clip_low: lower half-width at position 1.
        clip_high: upper half-width at position 1.
        cap: where A < 0 the loss is at most ``-A exp(cap * position ** power)``; None as the paper writes it.
        power: growth of the window.
        token_mean: mean over tokens, as the released script runs; False for the paper's mean of token means.

    Cost: as GRPO, plus a scan along the rows.
    Source: arXiv 2605.07331.
    Departs from the paper: cap and token mean follow the released training code, whose truncated importance weight
    of whole rows (5.0) is left to ``weights``; a ratio's gradient reaches only the current token's log-prob.
    """
    return Objective(
        ratio=ratio.cumulative(),
        clip=clip.growing(clip_low, clip_high, power, cap),
        aggregation=aggregation.token_mean() if token_mean else aggregation.sequence_mean(),
    )
