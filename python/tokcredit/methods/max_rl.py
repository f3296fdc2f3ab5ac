"""Maximum-likelihood reinforcement learning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.credit import Credit, outcome


@dataclass(frozen=True)
class relative(Credit):
    """``(R - mean) / mean`` over the group; 0 in a group of one and where the mean is 0. Rewards must be at least 0."""

    def __call__(self, batch: Rollouts) -> Tensor:
        if bool((wrong := batch.nonempty & (batch.rewards < 0)).any()):
            raise ValueError(f"rewards: expected at least 0 for max_rl, got {batch.rewards[wrong].min().item()}")
        groups = batch.nonempty_groups
        statistics = segment.moments(batch.rewards, groups)
        mean = groups.per_row(statistics.mean.masked_fill(statistics.size < 2, 0))
        return torch.where(mean > 0, outcome(batch) / mean, 0).to(batch.rewards.dtype)[:, None]


def max_rl(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """MaxRL: rewards relative to the mean of their group, ``(R - mean) / mean``, which weighs hard prompts more.

    With rewards of 0 and 1 its gradient is, with more and more samples, that of the log of the probability of success.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: arXiv 2602.02710.
    Differences from the paper:
        - Negative rewards raise an error; the paper has rewards of 0 and 1.
    Differences from the released code:
        - The release adds 1e-6 to the mean, and takes a mean of 0 in a group of one, which gives an advantage of 1e6.
          Here both a group of one and a mean of 0 give 0.
    """
    return Objective(relative(), clip=clip.ppo(clip_low, clip_high))
