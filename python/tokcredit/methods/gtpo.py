"""GTPO: token rewards shaped by entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.group import EQUAL


@dataclass(frozen=True)
class entropy_shaped(Credit):
    """Rewards of tokens that grow with their entropy in correct rows, and fall with its inverse in wrong rows.

    With ``H`` the entropy of a token and sums over the rows of the group on the same side (correct or wrong) that have
    a token at the same position::

        x = H if correct else 1 / (H + 1e-8)
        share = bonus * (number of these rows) * x / (sum of x)
        r = base * reward + share in correct rows, -base - share in wrong ones
        A = (r - mean(r)) / std(r)      over all tokens of the group on the same side

    ``std`` is the population standard deviation. The advantage is 0 where all ``r`` are equal up to rounding, and
    ``x / (sum of x)`` is the same for all rows where the sum is 0. Positions count the tokens of the row that the
    policy chose.

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
        spans, correct = batch.spans, batch.rewards > self.threshold
        side, sides, width = 2 * batch.group_index + correct, 2 * batch.num_groups, max(batch.longest, 1)
        if sides == 0:
            return torch.zeros(batch.num_tokens, dtype=batch.rewards.dtype, device=batch.device)
        # Where all entropies are 0, they are equal.
        x = batch.input("entropies").double().clamp_(min=1e-300)
        x = torch.where(ops.spread(correct, spans), x, (x + 1e-8).reciprocal_())
        # One cell for each position of a side.
        cell = ops.scan(torch.ones_like(x), spans, carry=(side * width - 1).double())[0].long()
        mean = segment.mean(x, segment.Ids(cell, sides * width, batch.response_mask))
        share = x.div_(mean.index_select(0, cell))
        # The reward of a token is base + factor * share; from the moments of the rows those of the side.
        base = (self.base * batch.rewards.double()).masked_fill_(~correct, -self.base)
        factor = torch.full_like(base, self.bonus).masked_fill_(~correct, -self.bonus)
        size, centre, var, _, _ = segment.moments(share, spans, ddof=0.0)
        of_side = segment.Ids(side, sides)
        tokens = segment.sum(size, of_side).clamp_(min=1)

        def average(of_row: Tensor) -> Tensor:
            return (segment.sum(size * of_row, of_side) / tokens).index_select(0, side)

        centre = base + factor * centre
        middle = average(centre)
        std = average(factor.square() * var + (centre - middle).square()).sqrt()
        inverse = std.reciprocal().masked_fill_(std <= EQUAL, 0)
        return ops.row_affine(share, factor * inverse, (base - middle) * inverse, spans, batch.rewards.dtype)


def gtpo(
    base: float = 1.0,
    bonus: float = 0.1,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Objective:
    """GTPO: tokens of correct responses share an extra reward by entropy, of wrong ones a penalty by its inverse.

    With ``H`` the entropy of a token, ``d`` the number of correct responses of the group that have a position ``t``,
    ``h`` that of wrong ones, and sums over them::

        r[i, t] =  base * r[i] + bonus * d * H[i, t] / sum(H[., t])       correct
        r[j, t] = -base - bonus * h * (1 / H[j, t]) / sum(1 / H[., t])    wrong
        A = (r - mean(r)) / std(r)      over all tokens of correct, and of wrong, responses of the group
        loss = mean over all tokens of max(-A * q, -A * clip(q, 1 - clip_low, 1 + clip_high))

    Each side is centred at 0 by itself, so that tokens with low entropy in correct responses have a negative advantage.

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
        - Tokens that the policy did not choose have no position.
    """
    return Objective(
        entropy_shaped(base, bonus, threshold),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
