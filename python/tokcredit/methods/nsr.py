"""Negative sample reinforcement."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit, filters
from tokcredit.objective import Objective


def nsr(clip_low: float = 0.2, clip_high: float = 0.2, threshold: float = 0.5) -> Objective:
    """Wrong rows alone are trained on, each paid -1; no baseline.

    Mean over the tokens of the wrong rows; a batch without one has no gradient.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        threshold: a row is correct if its reward exceeds it.

    Cost: as GRPO; correct rows need no backward pass.
    Source: Zhu et al., arXiv 2506.01347.
    Departs from the paper: rewards are split at a threshold, where the released code tests for exactly 0 and 1 and
    leaves anything else as it is.
    """
    return Objective(
        credit.thresholded(0.0, -1.0, threshold),
        filters=(filters.nonzero_advantage(),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
