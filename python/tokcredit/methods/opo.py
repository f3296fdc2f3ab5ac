"""On-policy RL with an optimal reward baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class length_weighted(Credit):
    """Rewards minus the mean of the group in which a trajectory of L tokens counts L times, ``sum(L R) / sum(L)``.

    Only tokens that the policy chose count. The advantage in a group of one is 0.
    """

    def __call__(self, batch: Rollouts) -> Tensor:
        groups, rewards = batch.nonempty_groups, batch.rewards.double()
        lengths = batch.lengths.double()
        baseline = segment.sum(lengths * rewards, groups) / segment.sum(lengths, groups).clamp(min=1)
        centred = rewards - groups.per_row(baseline)
        # The mean of equal numbers may differ from them in the last digit.
        varied = groups.per_row(segment.maximum(rewards, groups) > segment.minimum(rewards, groups))
        return torch.where(varied, centred, 0).to(batch.rewards.dtype)[:, None]


def opo(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """OPO: rewards minus a mean of the group in which long responses count more, the baseline of least variance.

    With ``L`` the tokens of a trajectory and ``R`` its total reward::

        A[j] = R[j] - sum(L * R) / sum(L)

    The baseline has the least variance if the squared gradient of a response is proportional to its length.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: arXiv 2505.23585.
    Differences from the paper:
        - The paper updates on policy, where the clip ranges have no effect.
    Differences from the released code:
        - verl's sums of rewards contain those at tokens that the policy did not choose.
    """
    return Objective(length_weighted(), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.token_mean())
