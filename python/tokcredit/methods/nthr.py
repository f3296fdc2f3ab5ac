"""Negative token hidden reward."""

from __future__ import annotations

from tokcredit import clip, credit
from tokcredit.objective import Objective


def nthr(
    beta: float = 1.0,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO that spares the tokens of wrong rows whose gradient would pull the group's correct rows down with them.

    Where the token's influence on the correct rows (see :func:`thr`; here rows are not divided by their length)
    exceeds tau, the penalty is multiplied by ``|1 - 2 p|``, p the share of correct rows.

    Args:
        beta: tau is beta times the least mean influence among the group's correct rows (1.5B R1-Distill: 0).
        threshold: a row is correct if its reward exceeds it.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: two matrix products per group, tokens x K x d with K the distinct tokens of the group; hidden states and
        probabilities of the old log-prob pass are kept.
    Source: arXiv 2505.18830.
    Departs from the paper: tau is at least 0.
    """
    return Objective(
        credit.sparing(credit.group_normalized(epsilon=epsilon), beta, threshold), clip=clip.ppo(clip_low, clip_high)
    )
