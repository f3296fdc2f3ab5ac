"""REINFORCE leave-one-out."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit
from tokcredit.objective import Objective


def rloo(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """GRPO with the mean of the *other* rows as baseline and no division by the standard deviation.

    ``A_i = r_i - mean of the others = G / (G - 1) (r_i - mean)``; 0 in a group of one.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO.
    Source: Ahmadian et al., arXiv 2402.14740.
    Departs from the paper: token ratios with PPO's clip and the mean over tokens, as verl runs it; on policy its
    gradient is the score function's. A group of one is paid 0 (verl's loop pays it the reward, its vectorised twin 0).
    """
    return Objective(credit.leave_one_out(), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.token_mean())
