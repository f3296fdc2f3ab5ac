"""Divergence-weighted advantages."""

from __future__ import annotations

from tokcredit import aggregation, clip, gain
from tokcredit.objective import Objective


def divergence_weighted(
    strength: float = 1.0, slope: float = 10.0, clip_low: float = 0.2, clip_high: float = 0.28
) -> Objective:
    """DAPO whose advantages grow, or shrink, with how far the token's probability has moved in this update.

    ``A (1 + strength (sigmoid(slope k) - 1/2))`` with ``k = (q - 1) - log q``, q the token's ratio; no gradient through
    the factor. It is 1 in the first optimizer step after a rollout, where q = 1.

    Args:
        strength: twice the most by which the factor may leave 1.
        slope: above 0 tokens that moved are paid more (the paper's high-KL boost), below 0 less (its low-KL boost).
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO.
    Source: arXiv 2603.22446.
    Departs from the paper: its values of strength and slope were not found.
    """
    return Objective(
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        gain=gain.divergence(strength, slope),
    )
