"""Optimal token baseline."""

from __future__ import annotations


from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class least_variance(Credit):
    """Reward to go minus its mean over the group's rows at the same place, weighted by the rows' energy up to there.

    A token's energy is the squared length of its score in the logits, at least 0. With W its sum over the row up to a
    place, and G the rewards from there on::

        energy = 1 - 2 p + sum(p^2)
        A = G - sum(W G) / (sum(W) + epsilon)           # sums over the group's rows that have a token there

    Places are offsets in the row, masked tokens counted. Where a row has no others beside it, ``A = G``. The reward is
    the row's, and G the same all along it, or with ``by_turn`` the evidence ``turn_rewards`` instead.
    """

    by_turn: bool = flag(False)
    epsilon: float = number(1e-8, at_least=0)

    @property
    def required_inputs(self) -> frozenset[str]:
        required_inputs = frozenset({"old_log_probs", "squared_probs"})
        return required_inputs | {"turn_rewards"} if self.by_turn else required_inputs

    def __call__(self, batch: Rollouts) -> Tensor:
        log_probs, squares = batch.input("old_log_probs"), batch.input("squared_probs")
        rewards = batch.input("turn_rewards") if self.by_turn else batch.rewards[:, None]
        dtype = reduce(torch.promote_types, (log_probs.dtype, squares.dtype, rewards.dtype))
        advantages, _ = ops.baseline(
            log_probs.to(dtype),
            squares.to(dtype),
            rewards.to(dtype),
            batch.spans,
            batch.group_index,
            batch.num_groups,
            self.epsilon,
        )
        return advantages


def otb(
    by_turn: bool = False,
    epsilon: float = 1e-8,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """GRPO whose baseline differs from token to token: rows count by the squared score they have gathered so far.

    ``A[t] = G[t] - sum(W G) / (sum(W) + epsilon)`` over the rows of the group that have a token at the place of t. G is
    the reward to go, and the realized energy W adds up the logit-gradient proxy ``1 - 2 p + sum(p^2)`` to there. There
    is no division by the standard deviation.

    Args:
        by_turn: the rewards are ``turn_rewards``, in place of the row's.
        epsilon: added to the sum of energies.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO, plus three more reads of the logits where old log-probs are computed.
    Source: arXiv 2602.07078.
    Departs from the paper: token ratios with PPO's clip and the mean over tokens; verl's loss caps the ratio of losing
    tokens at 3 besides. The reward is the row's and G the same at each of its tokens, where verl sums rewards per
    token from there on, penalties in the reward among them; ``by_turn`` does that. A row alone at a place has baseline
    0. verl gives that to groups of one and, counting chosen tokens, to the longest row behind the second longest, which
    with masked tokens reaches places where it is not alone, and pays a row alone elsewhere about 0. Places count tool
    tokens, as in verl's ``optimal_token_baseline``; its ``tir_optimal_token_baseline`` counts chosen tokens alone.
    Energies are at least 0 whatever the rounding, and are not multiplied by the squared weights of a rollout
    correction. ``squared_probs`` are the current policy's, also for rows that were replayed.
    """
    return Objective(
        least_variance(by_turn, epsilon),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
