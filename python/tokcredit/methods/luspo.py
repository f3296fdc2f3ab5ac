"""Length-unbiased sequence policy optimization."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, ratio


def luspo(clip_low: float = 0.002, clip_high: float = 0.0025) -> Objective:
    """LUSPO: GSPO whose loss of a response is multiplied by its length, so that all tokens have the same weight.

    With ``A`` the advantage of GRPO and ``L[i]`` the number of tokens::

        q[i] = exp(mean over t of (log p[i, t] - log p_old[i, t]))
        loss = mean over i of L[i] * max(-A[i] * q[i], -A[i] * clip(q[i], 1 - clip_low, 1 + clip_high))

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: arXiv 2602.05261.
    Differences from the paper:
        - The logarithm of the ratio is at most 10.
    Differences from the released code:
        - Rows without a token that the policy chose do not count in the mean; TRL counts them.
    """
    return Objective(
        ratio=ratio.sequence(), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.sequence_sum(1)
    )
