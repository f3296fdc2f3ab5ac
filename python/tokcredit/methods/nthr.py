"""Negative token hidden reward."""

from __future__ import annotations


import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip
from tokcredit.stages.base import number, part
from tokcredit.stages.credit import Credit, group_normalized
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.credit.influence import READS, correct_share, influence, least_mean_influence


@dataclass(frozen=True)
class sparing(Credit):
    """Another credit, reduced at the tokens of wrong rows that pull the group's correct rows up.

    Where ``s > tau`` in a wrong row, with ``w = 1``, the token is paid ``|1 - 2 p| A``, p being the share of correct
    rows; ``tau = beta`` times the least mean influence of a correct row, at least 0. Groups all correct or all wrong
    keep their credit.
    """

    of: Credit = part(Credit, group_normalized)
    beta: float = number(1.0, at_least=0)
    threshold: float = number(0.5)
    reads: ClassVar[frozenset[str]] = READS

    def __call__(self, batch: Rollouts) -> Tensor:
        correct = batch.rewards > self.threshold
        influences = influence(batch, correct, torch.ones_like(batch.rewards))
        tau = self.beta * least_mean_influence(batch, influences, correct).clamp(min=0)
        share = correct_share(batch, correct)
        spared = torch.where(~correct & (share > 0), tau, math.inf)
        reduced = influences > per_token(spared[:, None], batch.spans)
        scale = torch.where(reduced, per_token((1 - 2 * share).abs()[:, None], batch.spans), 1)
        advantages = per_token(self.of(batch), batch.spans)
        return scale.to(advantages.dtype) * advantages


def nthr(
    beta: float = 1.0,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO that spares the tokens of wrong rows whose gradient would pull the group's correct rows down with them.

    Where the token's influence on the correct rows (see :func:`thr`; here rows are not divided by their length)
    exceeds tau, the penalty is multiplied by ``|1 - 2 p|``, p the share of correct rows.

    Args:
        beta: tau is beta times the least mean influence among the group's correct rows (1.5B R1-Distill: 0).
        threshold: a row is correct if its reward exceeds it.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: two matrix products per group, tokens x K x d with K the distinct tokens of the group; hidden states and
        probabilities of the old log-prob pass are kept.
    Source: arXiv 2505.18830.
    Departs from the paper: tau is at least 0.
    """
    return Objective(
        sparing(group_normalized(epsilon=epsilon), beta, threshold), clip=clip.ppo(clip_low, clip_high)
    )
