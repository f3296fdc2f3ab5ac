"""Positive sample reinforcement."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit, filters


def psr(clip_low: float = 0.2, clip_high: float = 0.2, threshold: float = 0.5) -> Objective:
    """PSR: only the correct responses train, each with an advantage of 1 and no baseline.

    The loss is the mean over the tokens of the correct responses. A batch without one has no gradient.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        threshold: A response is correct if its reward exceeds it.

    Cost: The same as GRPO; wrong responses need no backward pass.
    References: Zhu et al., arXiv 2506.01347.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - Rewards are compared with a threshold. The release tests for exactly 1 and 0, and takes any other reward as
          the advantage.
    """
    return Objective(
        credit.thresholded(1.0, 0.0, threshold),
        filters=(filters.nonzero_advantage(),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
