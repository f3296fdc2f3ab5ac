"""Group Sequence Policy Optimization."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, ratio


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO: GRPO with one ratio per response, the geometric mean of its token ratios, and a narrow clip range.

    With ``A`` the advantage of GRPO::

        q[i] = exp(mean over t of (log p[i, t] - log p_old[i, t]))
        loss = mean over i of max(-A[i] * q[i], -A[i] * clip(q[i], 1 - clip_low, 1 + clip_high))

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: Zheng et al., arXiv 2507.18071.
    Differences from the paper:
        - The loss is the paper's GSPO-token, whose gradient is the same where a row has one advantage. Token-level
          advantages can therefore be combined with it.
        - The logarithm of the ratio is at most 10, as in verl.
    """
    return Objective(
        ratio=ratio.sequence(), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.sequence_mean()
    )
