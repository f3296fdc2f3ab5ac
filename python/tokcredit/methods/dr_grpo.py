"""Dr. GRPO: GRPO done right."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def dr_grpo(clip_low: float = 0.2, clip_high: float = 0.2, max_length: int | None = None) -> Objective:
    """Dr. GRPO: GRPO without the division by the standard deviation and by each response's own length.

    With ``q`` the token's ratio::

        A[i] = r[i] - mean(r)
        loss = mean over i of (sum over t of max(-A[i] * q, -A[i] * clip(q, 1 - clip_low, 1 + clip_high))) / max_length

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        max_length: Constant that replaces the length of the response, at least 1; usually the generation limit. None
            takes the longest row of the batch, so that the size of the loss varies between batches.

    Cost: The same as GRPO.
    References: Liu et al., arXiv 2503.20783.
    Differences from the paper:
        - None known.
    """
    return Objective(
        credit.group_normalized(scale=False),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.sequence_sum(max_length),
    )
