"""GRPO-S: rewards of responses shaped by their mean entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.group import shares, standard_scores


@dataclass(frozen=True)
class mean_entropy_shaped(Credit):
    """Rewards that grow with the mean entropy of correct rows, and fall with its inverse in wrong rows.

    With ``H`` the mean entropy of a row, and numbers and sums over the rows of the group on the same side (correct or
    wrong)::

        x = H if correct else 1 / (H + 1e-8)
        share = bonus * (number of rows) * x / (sum of x)
        r = base * reward + share for correct rows, -base - share for wrong ones
        A = (r - mean(r)) / std(r)      over the rows of the group on the same side

    ``std`` is the population standard deviation. The advantage is 0 where all ``r`` are equal.

    Args:
        base: Factor of the reward of a correct row, and of the penalty of a wrong one, whatever the entropy.
        bonus: Share of the reward that depends on entropy.
        threshold: A row is correct if its reward exceeds it.
    """

    base: float = number(1.0)
    bonus: float = number(0.1)
    threshold: float = number(0.5)
    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: Rollouts) -> Tensor:
        correct = batch.rewards > self.threshold
        x = segment.mean(batch.input("entropies").double(), batch.spans).clamp_(min=0)
        x = torch.where(correct, x, 1 / (x + 1e-8))
        ids = (2 * batch.group_index + correct).masked_fill_(~batch.nonempty, -1)
        side = segment.Ids(ids, 2 * batch.num_groups)
        if side.segments == 0:
            return torch.zeros_like(batch.rewards)[:, None]
        share = self.bonus * shares(x, side)
        rewards = torch.where(correct, self.base * batch.rewards + share, -self.base - share)
        return standard_scores(rewards, side)[:, None].to(batch.rewards.dtype)


def grpo_s(
    base: float = 1.0,
    bonus: float = 0.1,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Objective:
    """GRPO-S: correct responses share an extra reward by their mean entropy, wrong ones a penalty by its inverse.

    With ``H`` the mean entropy of a response, ``d`` the number of correct responses of the group, ``h`` that of wrong
    ones, and sums over them::

        r[i] =  base * reward[i] + bonus * d * H[i] / sum(H)    correct
        r[j] = -base - bonus * h * (1 / H[j]) / sum(1 / H)      wrong
        A = (r - mean(r)) / std(r)      over the correct, and over the wrong, responses of the group
        loss = mean over all tokens of max(-A * q, -A * clip(q, 1 - clip_low, 1 + clip_high))

    Args:
        base: Factor of the reward of a correct response, and of the penalty of a wrong one, whatever the entropy.
        bonus: Share of the reward that depends on entropy.
        threshold: A response is correct if its reward exceeds it.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: GRPO plus the entropies of the forward pass for the old log-probs.
    References: arXiv 2508.04349.
    Differences from the paper:
        - The scope of mean and standard deviation is not stated where it was read; here it is one side of a group, and
          the standard deviation is that of the population.
    """
    return Objective(
        mean_entropy_shaped(base, bonus, threshold),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
