"""Credit over a baseline of its own at every place of a group's rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.choice import Choice
from tokcredit.rollouts import Rollouts


@dataclass(frozen=True)
class least_variance(Choice):
    """Reward to go minus its mean over the group's rows at the same place, weighted by the rows' energy up to there.

    A token's energy is the squared length of its score in the logits, at least 0. With W its sum over the row up to a
    place, and G the rewards from there on::

        energy = 1 - 2 p + sum(p^2)
        A = G - sum(W G) / (sum(W) + epsilon)           # sums over the group's rows that have a token there

    Places are offsets in the row, masked tokens counted. Where a row has no others beside it, ``A = G``. The reward is
    the row's, and G the same all along it, or with ``by_turn`` the evidence ``turn_rewards`` instead.
    """

    by_turn: bool = False
    epsilon: float = 1e-8

    @property
    def needs(self) -> frozenset[str]:
        needs = frozenset({"old_log_probs", "squared_probs"})
        return needs | {"turn_rewards"} if self.by_turn else needs

    def __call__(self, batch: Rollouts) -> Tensor:
        log_probs, squares = batch.evidence("old_log_probs"), batch.evidence("squared_probs")
        rewards = batch.evidence("turn_rewards") if self.by_turn else batch.rewards[:, None]
        dtype = reduce(torch.promote_types, (log_probs.dtype, squares.dtype, rewards.dtype))
        advantages, _ = ops.baseline(
            log_probs.to(dtype),
            squares.to(dtype),
            rewards.to(dtype),
            batch.rows,
            batch.group_index,
            batch.num_groups,
            self.epsilon,
        )
        return advantages
