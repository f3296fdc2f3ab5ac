"""REINFORCE leave-one-out."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def rloo(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """RLOO: the reward minus the mean reward of the other responses of the group, without a standard deviation.

    In a group of ``G`` responses::

        A[i] = r[i] - mean of the other rewards = G / (G - 1) * (r[i] - mean(r))

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: Ahmadian et al., arXiv 2402.14740.
    Differences from the paper:
        - The loss has token ratios with PPO's clip and the mean over tokens, as verl runs it. On policy its gradient is
          that of REINFORCE.
    Differences from the released code:
        - A group of one has an advantage of 0, as in verl's ``rloo_vectorized``; in verl's ``rloo`` it has its reward.
        - TRL's ``RLOOTrainer`` has the ratio of the whole sequence and the mean over rows.
    """
    return Objective(credit.leave_one_out(), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.token_mean())
