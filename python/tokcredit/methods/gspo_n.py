"""Relative negative gradients only, one ratio per row."""

from __future__ import annotations

from tokcredit.stages import clip, credit, ratio, filters
from tokcredit.objective import Objective


def gspo_n(
    clip_low: float = 3e-4, clip_high: float = 4e-4, epsilon: float = 1e-6, renormalize: bool = False
) -> Objective:
    """GSPO that only discourages: ``min(A, 0)`` with the geometric mean of the row's ratios.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.
        renormalize: rows that are paid nothing leave the denominators.

    Cost: as GRPO; rows above the mean need no backward pass.
    Source: arXiv 2510.04028.
    Departs from the paper: its formula was not found; as ``grpo_n`` with the ratio and the window of ``gspo``.
    """
    return Objective(
        credit.negative_part(credit.group_normalized(epsilon=epsilon)),
        filters=(filters.nonzero_advantage(),) if renormalize else (),
        ratio=ratio.sequence(),
        clip=clip.ppo(clip_low, clip_high),
    )
