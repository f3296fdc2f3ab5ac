"""Relative negative gradients only, with one ratio per token."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import clip, credit, filters


def grpo_n(
    clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-6, renormalize: bool = False
) -> Objective:
    """GRPO-N: GRPO with the negative advantages only, ``min(A, 0)``.

    Mean and standard deviation are those of the whole group. Rows with an advantage of 0 stay in the denominators, so
    that the loss of the other rows is exactly that of GRPO.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.
        renormalize: Whether rows with an advantage of 0 leave the denominators.

    Cost: The same as GRPO; rows above the mean need no backward pass.
    References: arXiv 2510.04028.
    Differences from the paper:
        - The formula of the paper was not found. "Relative negative gradients only" is read as the negative part of the
          group advantage.
    """
    return Objective(
        credit.negative_part(credit.group_normalized(epsilon=epsilon)),
        filters=(filters.nonzero_advantage(),) if renormalize else (),
        clip=clip.ppo(clip_low, clip_high),
    )
