"""REINFORCE with correct rows weighed down."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit
from tokcredit.objective import Objective


def w_reinforce(
    positive: float = 0.1, clip_low: float = 0.2, clip_high: float = 0.2, threshold: float = 0.5
) -> Objective:
    """Correct rows are paid a little, wrong rows -1; no baseline.

    Mean over all tokens: ``positive`` times :func:`psr` plus :func:`nsr`, each by its share of the tokens.

    Args:
        positive: what a correct row is paid.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        threshold: a row is correct if its reward exceeds it.

    Cost: as GRPO; all rows train, also those of groups with equal rewards.
    Source: Zhu et al., arXiv 2506.01347.
    Departs from the paper: rewards are split at a threshold, where the released code tests for exactly 0 and 1 and
    leaves anything else as it is.
    """
    return Objective(
        credit.thresholded(positive, -1.0, threshold),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
