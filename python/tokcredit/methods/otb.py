"""Optimal token baseline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit


@dataclass(frozen=True)
class optimal_baseline(Credit):
    """Reward to go minus its mean over the rows of the group at the same offset, weighted by their realized energy.

    The energy ``W`` of a row at a token adds up an estimate of the squared score of its tokens so far, and ``G`` is the
    reward from the token on. Sums are over the rows of the group that have a chosen token at the offset of ``t``::

        W[t] = sum over chosen tokens u <= t of max(0, 1 - 2 * p[u] + squared_probs[u])
        A[t] = G[t] - sum(W * G) / (sum(W) + epsilon)

    Offsets count all tokens of the row, masked ones included. Where no other row has a token, ``A = G``. ``G`` is the
    reward of the row at each of its tokens, or with ``by_turn`` the sum of ``turn_rewards`` from the token on.

    Args:
        by_turn: Whether the rewards are ``turn_rewards`` instead of the row's.
        epsilon: Added to the sum of energies, at least 0.

    References:
        arXiv 2602.07078.
    """

    by_turn: bool = flag(False)
    epsilon: float = number(1e-8, at_least=0)
    reads_contexts: ClassVar[bool] = True

    @property
    def required_inputs(self) -> frozenset[str]:
        """``old_log_probs`` and ``squared_probs``, and ``turn_rewards`` with ``by_turn``."""
        names = frozenset({"old_log_probs", "squared_probs"})
        return names | {"turn_rewards"} if self.by_turn else names

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
    """OTB: a baseline per token, the mean reward to go of the group weighted by the squared scores so far.

    With ``p`` the probability of the token and the sum of squares over the vocabulary, under the old policy, and sums
    over the responses of the group that have a token at the offset of ``t``::

        W[t] = sum over u <= t of (1 - 2 * p[u] + sum over v of p[u, v] ** 2)
        A[t] = G[t] - sum(W * G) / (sum(W) + epsilon)

    ``G`` is the reward from the token on. There is no division by a standard deviation.

    Args:
        by_turn: Whether the rewards are ``turn_rewards`` instead of the row's.
        epsilon: Added to the sum of ``W``, at least 0.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: GRPO plus one more read of the logits in the forward pass for the old log-probs.
    References: arXiv 2602.07078.
    Differences from the paper:
        - The loss has token ratios with PPO's clip and the mean over tokens.
        - ``1 - 2 * p + sum of squares`` is at least 0, whatever the rounding.
        - Rows that were replayed have ``squared_probs`` of the current policy.
    Differences from the released code:
        - verl's loss has a dual clip of 3.0; there is none here.
        - The reward to go is the reward of the row at each of its tokens. verl adds up rewards per token, with
          penalties among them, from the token on; ``by_turn`` does that.
        - A row that is alone at an offset has a baseline of 0. verl gives that to groups of one and, counting chosen
          tokens, to the longest row beyond the second longest; other rows that are alone have an advantage of about 0.
        - Offsets count masked tokens, as in verl's ``optimal_token_baseline``. Its ``tir_optimal_token_baseline``
          counts chosen tokens only.
        - Energies are not multiplied by the squared weights of a rollout correction.
    """
    return Objective(
        optimal_baseline(by_turn, epsilon),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
