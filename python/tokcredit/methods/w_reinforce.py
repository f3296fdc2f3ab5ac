"""REINFORCE with a small weight of the correct responses."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def w_reinforce(
    positive: float = 0.1, clip_low: float = 0.2, clip_high: float = 0.2, threshold: float = 0.5
) -> Objective:
    """W-REINFORCE: correct responses have a small positive advantage, wrong ones -1, with no baseline.

    The loss is the mean over all tokens: ``positive`` times the loss of :func:`psr` plus that of :func:`nsr`, each
    multiplied by its share of the tokens.

    Args:
        positive: Advantage of a correct response, the paper's lambda.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        threshold: A response is correct if its reward exceeds it.

    Cost: The same as GRPO, but responses of groups with equal rewards train too.
    References: Zhu et al., arXiv 2506.01347.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - Rewards are compared with a threshold. The release tests for exactly 1 and 0, and takes any other reward as
          the advantage.
        - The release's second form, which multiplies the two losses by ``positive_learning_weight``, is not offered.
    """
    return Objective(
        credit.thresholded(positive, -1.0, threshold),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
