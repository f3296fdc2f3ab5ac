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
class hidden_reward(Credit):
    """THR's advantage: another credit at the tokens with a large hidden reward, scaled by the sign of that reward.

    With ``g`` the prediction error and ``h`` the hidden state of a token, and the sum over the tokens ``k`` of the
    correct rows ``i`` of the group, which have ``L`` tokens::

        s[t] = sum over i, k of 1 / L[i] * <g[i, k], g[t]> * <h[i, k], h[t]>
        THR[t] = s[t] in a correct row, -s[t] in a wrong row
        tau = max(0, beta * least mean of s over a correct row)
        A[t] = (1 + favour * sign(THR[t])) * A if |THR[t]| > tau else 0

    Groups in which all or no rows are correct keep the other credit.

    Args:
        of: The other credit.
        favour: Strength p of the scaling.
        beta: Factor of the threshold, at least 0.
        threshold: A row is correct if its reward exceeds it.
    """

    of: Credit = part(Credit, group_normalized)
    favour: float = number(0.1)
    beta: float = number(1.0, at_least=0)
    threshold: float = number(0.5)
    reads: ClassVar[frozenset[str]] = READS

    def __call__(self, batch: Rollouts) -> Tensor:
        advantages = per_token(self.of(batch), batch.spans)
        correct = batch.rewards > self.threshold
        influences = influence(batch, correct, 1 / batch.lengths.clamp(min=1).double())
        tau = self.beta * least_mean_influence(batch, influences, correct).clamp(min=0)
        # Infinite: the group's correct rows have no token, so there is nothing to move.
        mixed = (correct_share(batch, correct) < 1) & tau.isfinite()
        favour = torch.full_like(batch.rewards, self.favour)
        lean = torch.where(mixed, torch.where(correct, favour, -favour), 0)
        scale = influences.sign().to(advantages.dtype) * per_token(lean[:, None], batch.spans) + 1
        kept = influences.abs() > per_token(torch.where(mixed, tau, -1)[:, None], batch.spans)
        return torch.where(kept, scale * advantages, 0)


def thr(
    favour: float = 0.1,
    beta: float = 1.0,
    threshold: float = 0.5,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """THR: GRPO on the tokens whose gradient moves the likelihood of the group's correct responses most.

    With ``g`` the prediction error and ``h`` the hidden state of a token, and the sum over the tokens ``k`` of the
    correct responses ``i`` of the group, which have ``L`` tokens::

        s[t] = sum over i, k of 1 / L[i] * <g[i, k], g[t]> * <h[i, k], h[t]>
        THR[t] = s[t] in a correct response, -s[t] in a wrong response
        tau = max(0, beta * least mean of s over a correct response)
        A[t] = (1 + favour * sign(THR[t])) * A if |THR[t]| > tau else 0

    Args:
        favour: The paper's p. Above 0 it favours tokens that raise the likelihood of correct responses (exploitation),
            below 0 tokens that lower it (exploration).
        beta: Factor of the threshold ``tau``, at least 0.
        threshold: A response is correct if its reward exceeds it.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: Two matrix products per group, tokens x K x d, with K the distinct tokens of the group; hidden states and
        probabilities of the forward pass for the old log-probs are kept.
    References: arXiv 2510.03669.
    Differences from the paper:
        - ``tau`` is at least 0. A negative one would keep every token.
        - The paper leaves open whether ``tau`` is computed with the division by ``L``. Here it is.
        - There is no KL term. The paper's is ``tokcredit.mix("thr", terms="kl(1e-4)")``.
    """
    return Objective(
        hidden_reward(group_normalized(epsilon=epsilon), favour, beta, threshold),
        clip=clip.ppo(clip_low, clip_high),
    )
