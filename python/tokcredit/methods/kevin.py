"""Returns of refinement turns, as in Kevin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.returns import rewards_of_tokens
from tokcredit.turns import Turns


@dataclass(frozen=True)
class pooled_turn_returns(Credit):
    """Discounted returns of turns, normalized over all turns of all trajectories of the group.

    With ``s`` the score of a turn, the sum of its ``token_rewards`` and in the last turn the outcome::

        G[k] = s[k] + discount * G[k + 1], or max(s[k], discount * G[k + 1])
        A = (G - mean(G)) / (std(G) + epsilon)

    Args:
        discount: gamma, from 0 to 1.
        largest: Whether the largest discounted score counts in place of the sum.
        epsilon: Added to the sample standard deviation, at least 0.
    """

    discount: float = number(0.4, at_least=0, at_most=1)
    largest: bool = flag(False)
    epsilon: float = number(1e-6, at_least=0)

    def __call__(self, batch: Rollouts) -> Tensor:
        turns, rewards = batch.turns, rewards_of_tokens(batch)
        scores = segment.sum(rewards.double(), turns.spans)
        if self.largest:
            to_go = _largest(scores, turns, self.discount)
        else:
            to_go = ops.scan(scores, turns.of_row(), decay=self.discount, reverse=True)[0]
        group = batch.group_index.index_select(0, turns.row)
        moments = segment.moment_table(to_go, segment.Ids(group, batch.num_groups))
        advantages = segment.standardize(to_go, group, moments, "normalized", self.epsilon)
        return ops.spread(advantages, turns.spans).to(rewards.dtype)


def _largest(scores: Tensor, turns: Turns, discount: float) -> Tensor:
    """Return ``max(scores[k], discount * result[k + 1])`` for every turn, ``[P]``."""
    found = scores.clone()
    for k in range(int(turns.number.max()) if len(turns.number) else 0, 0, -1):
        at = (turns.number == k).nonzero()[:, 0]
        found[at - 1] = torch.maximum(found[at - 1], discount * found[at])
    return found


def kevin(
    discount: float = 0.4,
    largest: bool = False,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """Kevin: every refinement turn is a sample whose return is compared with those of all turns of the group.

    With ``s`` the score of a turn, the sum of its ``token_rewards`` and in the last turn the outcome::

        G[k] = s[k] + discount * s[k + 1] + discount ** 2 * s[k + 2] + ...
        A = (G - mean(G)) / (std(G) + epsilon)

    Mean and standard deviation are over the turns of all trajectories of the group, so a turn with few turns after it
    has a lower advantage for that.

    Args:
        discount: gamma, from 0 to 1.
        largest: Whether ``G[k] = max(s[k], discount * s[k + 1], ...)`` in place of the sum.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: GRPO plus a score of every turn.
    References: arXiv 2507.11948.
    Differences from the paper:
        - The loss is the mean over trajectories of the mean over tokens; the paper takes every turn for a sample.
        - The kind of standard deviation was not found. Here it is that of the sample.
    """
    return Objective(pooled_turn_returns(discount, largest, epsilon), clip=clip.ppo(clip_low, clip_high))
