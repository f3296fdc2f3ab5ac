"""Relative negative gradients only, one ratio per token."""

from __future__ import annotations

from tokcredit.stages import clip, credit, filters
from tokcredit.objective import Objective


def grpo_n(
    clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-6, renormalize: bool = False
) -> Objective:
    """GRPO that only discourages: ``min(A, 0)``, rows better than their group train nothing.

    Mean and standard deviation are those of the whole group, and rows that train nothing stay in the denominators, so
    that the negative half is exactly GRPO's.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.
        renormalize: rows that are paid nothing leave the denominators.

    Cost: as GRPO; rows above the mean need no backward pass.
    Source: arXiv 2510.04028.
    Departs from the paper: its formula was not found; this reads "relative negative gradients only" as the negative
    part of the group advantage.
    """
    return Objective(
        credit.negative_part(credit.group_normalized(epsilon=epsilon)),
        filters=(filters.nonzero_advantage(),) if renormalize else (),
        clip=clip.ppo(clip_low, clip_high),
    )
