"""Token hidden reward."""

from __future__ import annotations


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
class influential(Credit):
    """Another credit, kept only at tokens of large influence on the group's correct rows, and scaled by its sign.

    ``H = s`` in a correct row and ``-s`` in a wrong one, with ``w = 1 / L`` for a correct row of L tokens. Where
    ``|H| > tau`` the token is paid ``(1 + favour sign(H)) A``, else 0; ``tau = beta`` times the least mean influence
    of a correct row of the group, at least 0. Groups all correct or all wrong keep their credit.
    """

    of: Credit = part(Credit, group_normalized)
    favour: float = number(0.1)
    beta: float = number(1.0, at_least=0)
    threshold: float = number(0.5)
    reads: ClassVar[frozenset[str]] = READS

    def __call__(self, batch: Rollouts) -> Tensor:
        correct = batch.rewards > self.threshold
        influences = influence(batch, correct, 1 / batch.lengths.clamp(min=1).double())
        tau = self.beta * least_mean_influence(batch, influences, correct).clamp(min=0)
        # Infinite: the group's correct rows have no token, so there is nothing to move.
        mixed = (correct_share(batch, correct) < 1) & tau.isfinite()
        lean = torch.where(mixed, torch.where(correct, self.favour, -self.favour), 0).to(influences.dtype)
        scale = influences.sign().mul_(per_token(lean[:, None], batch.spans)).add_(1)
        scale.mul_(influences.abs() > per_token(torch.where(mixed, tau, -1)[:, None], batch.spans))
        advantages = per_token(self.of(batch), batch.spans)
        return scale.to(advantages.dtype) * advantages


def thr(
    favour: float = 0.1,
    beta: float = 1.0,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO on the tokens whose gradient moves the likelihood of the group's correct rows most, weighed by which way.

    A token's influence is the sum over the tokens of correct rows, each row divided by its length, of the product of
    hidden states times the product of prediction errors; in a wrong row its sign is reversed. Where it exceeds tau
    the token is paid ``(1 + favour sign) A``, else nothing.

    Args:
        favour: above 0 rewards tokens that pull correct rows up (exploitation), below 0 those that pull them down.
        beta: tau is beta times the least mean influence among the group's correct rows.
        threshold: a row is correct if its reward exceeds it.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: two matrix products per group, tokens x K x d with K the distinct tokens of the group; hidden states and
        probabilities of the old log-prob pass are kept.
    Source: arXiv 2510.03669.
    Departs from the paper: tau is at least 0, and computed from the same matrix as the influence; no KL term (theirs:
    1e-4).
    """
    return Objective(
        influential(group_normalized(epsilon=epsilon), favour, beta, threshold),
        clip=clip.ppo(clip_low, clip_high),
    )
