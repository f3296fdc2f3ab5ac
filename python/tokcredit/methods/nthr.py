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
class negative_hidden_reward(Credit):
    """NTHR's advantage: another credit, reduced at the tokens of wrong rows that would pull correct rows down.

    With ``g`` the prediction error and ``h`` the hidden state of a token, the sum over the tokens ``k`` of the correct
    rows ``i`` of the group, and ``p`` the share of correct rows::

        s[t] = sum over i, k of <g[i, k], g[t]> * <h[i, k], h[t]>
        tau = max(0, beta * least mean of s over a correct row)
        A[t] = |1 - 2 * p| * A in a wrong row where s[t] > tau

    Groups in which all or no rows are correct keep the other credit.

    Args:
        of: The other credit.
        beta: Factor of the threshold, at least 0.
        threshold: A row is correct if its reward exceeds it.
    """

    of: Credit = part(Credit, group_normalized)
    beta: float = number(1.0, at_least=0)
    threshold: float = number(0.5)
    reads: ClassVar[frozenset[str]] = READS

    def __call__(self, batch: Rollouts) -> Tensor:
        advantages = per_token(self.of(batch), batch.spans)
        correct = batch.rewards > self.threshold
        influences = influence(batch, correct, torch.ones_like(batch.rewards))
        tau = self.beta * least_mean_influence(batch, influences, correct).clamp(min=0)
        share = correct_share(batch, correct)
        limit = torch.where(~correct & (share > 0), tau, math.inf)
        reduced = influences > per_token(limit[:, None], batch.spans)
        factor = per_token((1 - 2 * share).abs()[:, None], batch.spans).to(advantages.dtype)
        return torch.where(reduced, factor * advantages, advantages)


def nthr(
    beta: float = 1.0,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """NTHR: GRPO that penalizes less those tokens of wrong responses whose penalty would make correct ones less likely.

    With ``g`` the prediction error and ``h`` the hidden state of a token, the sum over the tokens ``k`` of the correct
    responses ``i`` of the group, and ``p`` the share of correct responses::

        s[t] = sum over i, k of <g[i, k], g[t]> * <h[i, k], h[t]>
        tau = max(0, beta * least mean of s over a correct response)
        A[t] = |1 - 2 * p| * A in a wrong response where s[t] > tau

    All other tokens keep the advantage of GRPO.

    Args:
        beta: Factor of the threshold ``tau``, at least 0. The paper uses 1, and 0 for R1-Distill-1.5B.
        threshold: A response is correct if its reward exceeds it.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: Two matrix products per group, tokens x K x d, with K the distinct tokens of the group; hidden states and
        probabilities of the forward pass for the old log-probs are kept.
    References: arXiv 2505.18830.
    Differences from the paper:
        - ``tau`` is at least 0.
    """
    return Objective(
        negative_hidden_reward(group_normalized(epsilon=epsilon), beta, threshold), clip=clip.ppo(clip_low, clip_high)
    )
