"""Group-in-group policy optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.returns import rewards_of_tokens


@dataclass(frozen=True)
class anchored_returns(Credit):
    """The return of a turn compared with those of turns of the group that began in the same state.

    With ``r`` the reward of a turn, and ``s`` the turns of a group with the same ``anchor_ids`` at their first token::

        G[k] = r[k] + discount * G[k + 1]
        A[k] = (G[k] - mean over s of G) / (std over s of G + epsilon)

    A turn whose state no other turn began in has advantage 0.

    Args:
        discount: gamma, from 0 to 1.
        scale: Whether to divide by the sample standard deviation.
        others_only: Whether the mean is over turns of other trajectories only, so that a trajectory that comes back to
            a state is not compared with itself.
        epsilon: Added to the standard deviation, at least 0.
    """

    discount: float = number(0.95, at_least=0, at_most=1)
    scale: bool = flag(True)
    others_only: bool = flag(False)
    epsilon: float = number(1e-6, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"anchor_ids"})

    def __call__(self, batch: Rollouts) -> Tensor:
        turns, rewards = batch.turns, rewards_of_tokens(batch)
        to_go = ops.scan(segment.sum(rewards.double(), turns.spans), turns.of_row(), decay=self.discount, reverse=True)[
            0
        ]
        anchor = torch.unique(batch.input("anchor_ids").index_select(0, turns.first), return_inverse=True)[1]
        states = segment.keys(batch.group_index.index_select(0, turns.row), anchor)
        moments = segment.moments(to_go, states)
        size, mean = (x.index_select(0, states.ids) for x in (moments.size, moments.mean))
        if self.others_only:
            own = segment.keys(states.ids, turns.row)
            others = size - segment.count(own)[own.ids]
            mean = (size * mean - segment.sum(to_go, own)[own.ids]) / others.clamp(min=1)
            alone = others < 1
        else:
            alone = size < 2
        advantages = torch.where(alone, 0, to_go - mean)
        if self.scale:
            spread = moments.var.sqrt().index_select(0, states.ids) + self.epsilon
            advantages = torch.where(spread > 0, advantages / spread, 0)
        return ops.spread(advantages, turns.spans).to(rewards.dtype)


def gigpo(
    discount: float = 0.95,
    weight: float = 1.0,
    scale: bool = True,
    others_only: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GiGPO: GRPO's advantage of the episode, plus that of a step among the steps of the group from the same state.

    With ``R`` the total reward of a trajectory, ``r`` the reward of a turn and ``s`` the turns of the group with the
    same ``anchor_ids`` at their first token::

        G[k] = r[k] + discount * G[k + 1]
        A[k] = (R - mean(R)) / (std(R) + epsilon) + weight * (G[k] - mean_s(G)) / (std_s(G) + epsilon)

    Rewards of turns are ``token_rewards`` at their last tokens; the outcome belongs to the last turn.

    Args:
        discount: gamma, from 0 to 1.
        weight: Factor of the second term, the paper's omega.
        scale: Whether both terms are divided by standard deviations.
        others_only: Whether the mean over ``s`` is over turns of other trajectories only.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviations.

    Cost: The same as GRPO, with ids of the states that turns began in.
    References: arXiv 2505.10978.
    Differences from the paper:
        - There is no KL term; the paper's is ``tokcredit.mix("gigpo", terms="kl(0.01)")``.
    Differences from the released code:
        - Statistics of episodes count each trajectory once; the release counts it once for every step.
        - States of different groups are never compared, whatever their ids.
        - Padding does not copy steps into the statistics.
        - Observations that are only similar are not joined; give them one id.
        - An invalid action has no penalty of its own; subtract it from the reward of its turn.
    """
    return Objective(
        credit.sum(
            credit.group_normalized(scale, epsilon), anchored_returns(discount, scale, others_only, epsilon), weight
        ),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
