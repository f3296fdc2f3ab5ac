"""Token hidden reward."""

from __future__ import annotations

from tokcredit import clip, credit
from tokcredit.objective import Objective


def thr(
    favour: float = 0.1,
    beta: float = 1.0,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO on the tokens whose gradient moves the likelihood of the group's correct rows most, weighed by which way.

    A token's influence is the sum over the tokens of correct rows, each row divided by its length, of the product of
    hidden states times the product of prediction errors; in a wrong row its sign is reversed. Where it exceeds tau
    the token is paid ``(1 + favour sign) A``, else nothing.

    Args:
        favour: above 0 rewards tokens that pull correct rows up (exploitation), below 0 those that pull them down.
        beta: tau is beta times the least mean influence among the group's correct rows.
        threshold: a row is correct if its reward exceeds it.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: two matrix products per group, tokens x K x d with K the distinct tokens of the group; hidden states and
        probabilities of the old log-prob pass are kept.
    Source: arXiv 2510.03669.
    Departs from the paper: tau is at least 0, and computed from the same matrix as the influence; no KL term (theirs:
    1e-4).
    """
    return Objective(
        credit.influential(credit.group_normalized(epsilon=epsilon), favour, beta, threshold),
        clip=clip.ppo(clip_low, clip_high),
    )
