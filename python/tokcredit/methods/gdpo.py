"""Group reward-decoupled normalization policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.base import number, part, whole_number
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class component_normalized(Credit):
    """Each of the K ``rewards`` normalized over the group by itself, ``(r - mean) / (std + epsilon)``, and their sum.

    A reward that is the same in the whole group gives 0. ``token_rewards`` count as one more reward.

    Args:
        component: Number of the only reward that is read, from 0, or None for all. ``credit.sum`` weighs several.
        epsilon: Added to the sample standard deviations, at least 0.
    """

    component: int | None = whole_number(None, at_least=0, optional=True)
    epsilon: float = number(1e-6, at_least=0)

    def __call__(self, batch: Rollouts) -> Tensor:
        rewards, groups = batch.reward_components, batch.nonempty_groups
        if batch.token_rewards is not None:
            rewards = torch.cat([rewards, segment.sum(batch.token_rewards, batch.spans)[:, None]], 1)
        if self.component is not None:
            if self.component >= rewards.shape[1]:
                raise ValueError(
                    f"rewards: expected more than {self.component} of them because of {self!r}, got {rewards.shape[1]}"
                )
            rewards = rewards[:, self.component, None]
        total = torch.zeros(batch.num_rows, dtype=torch.float64, device=batch.device)
        for own in rewards.unbind(1):
            moments = segment.moment_table(own.contiguous(), groups)
            total += segment.standardize(
                own.contiguous(), groups.index, moments, "normalized", self.epsilon, torch.float64
            )
        return total.to(batch.rewards.dtype)[:, None]


@dataclass(frozen=True)
class batch_normalized(Credit):
    """Another credit with mean 0 and standard deviation 1 over the trajectories of the batch.

    ``(A - mean) / (std + epsilon)``, with the sample standard deviation. Advantages that are all equal become 0.

    Args:
        of: The other credit, with one advantage for all tokens of a trajectory.
        epsilon: Added to the standard deviation, at least 0.
    """

    of: Credit = part(Credit, component_normalized)
    epsilon: float = number(1e-4, at_least=0)
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        given = self.of(batch)
        if given.dim() == 1:
            raise ValueError(f"of: expected one advantage for each trajectory, got one for each token from {self.of!r}")
        whole = Spans.single(batch.num_rows, batch.device, batch.nonempty)
        x = given[:, 0].double()
        mean, std = segment.mean(x, whole), segment.var(x, whole).sqrt()
        return torch.where(batch.nonempty & (std > 0), (x - mean) / (std + self.epsilon), 0).to(given.dtype)[:, None]


def gdpo(over_tokens: bool = False, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-6) -> Objective:
    """GDPO: several rewards, each normalized in its group by itself, then summed and normalized over the batch.

    With ``r[k]`` the k-th of the rewards ``[R, K]``::

        S = sum over k of (r[k] - mean(r[k])) / (std(r[k]) + epsilon)     over the group
        A = (S - mean(S)) / (std(S) + 1e-4)                               over the trajectories of the batch

    Rewards whose sum is the same in the whole group can still differ in ``S``; with two rewards of equal spread they
    cancel. In a batch of a single pair A is always 0.707 and -0.707.

    Args:
        over_tokens: Whether the second normalization is over the tokens of the batch, so that long trajectories count
            more: ``(S - mean) / sqrt(var + 1e-8)``.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviations of the group.

    Cost: The same as GRPO.
    References: arXiv 2601.05242.
    Differences from the paper:
        - Rewards have no weights. Weighted sums are made with ``credit.sum`` of
          ``component_normalized(0)``, ``component_normalized(1)`` and so on.
    Differences from the released code:
        - The release for TRL adds 1e-4 to the standard deviations of the group, and skips the second normalization if
          there is one reward; the release for verl normalizes over tokens.
    """
    components = component_normalized(epsilon=epsilon)
    return Objective(
        credit.whitened(components) if over_tokens else batch_normalized(components),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
