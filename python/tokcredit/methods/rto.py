"""Reinforced Token Optimization: PPO whose tokens are rewarded by a policy trained with DPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, credit
from tokcredit.stages.base import number, part
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.returns import at_last_tokens


@dataclass(frozen=True)
class aligned_rewards(Credit):
    """Another credit whose tokens have a further reward: ``clip(scale * (log p_dpo - log p_ref), -bound, bound)``.

    Args:
        of: The other credit.
        scale: Factor of the log-ratio, at least 0.
        bound: Largest size of the further reward, above 0.
        outcome_bound: Largest size of the reward of a response, above 0.

    Raises:
        ValueError: The log-ratio of a token that the policy chose is NaN, or inf without a bound.
    """

    of: Credit = part(Credit)
    scale: float = number(0.05, at_least=0)
    bound: float = number(0.05, above=0, infinite=True)
    outcome_bound: float = number(10.0, above=0, infinite=True)
    reads: ClassVar[frozenset[str]] = frozenset({"aligned_log_probs", "ref_log_probs"})

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.of(self._rewarded(batch))

    def targets(self, batch: Rollouts) -> Tensor:
        """Return what a critic is trained to predict: what the other credit says, with the further rewards.

        Args:
            batch: The rollouts, with the inputs that the credit requires.
        """
        found = self.of.targets(self._rewarded(batch.whole))
        return found if batch.trajectories is None else batch.trajectories.divided.of_tokens(found)

    def _rewarded(self, batch: Rollouts) -> Rollouts:
        """Return the batch, each row a trajectory, with the further rewards among those of its tokens."""
        outcome = batch.outcome_rewards
        aligned, ref = batch.input("aligned_log_probs"), batch.input("ref_log_probs")
        dtype = torch.promote_types(torch.promote_types(aligned.dtype, ref.dtype), outcome.dtype)
        further = (aligned.to(dtype) - ref).mul_(self.scale).clamp_(-self.bound, self.bound)
        further.masked_fill_(~batch.response_mask, 0)
        if not bool(further.isfinite().all()):
            raise ValueError(
                "aligned_log_probs, ref_log_probs: expected numbers whose clipped difference is finite at tokens that "
                "the policy chose, got NaN or inf"
            )
        if batch.token_rewards is not None:
            further = further + batch.token_rewards
        excess = outcome - outcome.clamp(-self.outcome_bound, self.outcome_bound)
        if bool((excess != 0).any()):
            further = further - at_last_tokens(excess.to(further.dtype), batch.spans)
        return batch.with_inputs(token_rewards=further)


def rto(
    scale: float = 0.05,
    bound: float = 0.05,
    kl: float = 0.01,
    trace: float = 0.95,
    outcome_bound: float = 10.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """RTO: PPO that rewards each token by its log-ratio between a policy trained with DPO and the reference.

    With ``V`` the values of a critic::

        r[t] = clip(scale * (log p_dpo[t] - log p_ref[t]), -bound, bound) - kl * (log p_old[t] - log p_ref[t])
        r[last] += clip(reward, -outcome_bound, outcome_bound)
        A = generalized advantage estimates of r and V, whitened over the batch

    Args:
        scale: Factor of the log-ratio of the DPO policy, at least 0; 0 leaves it out. The paper's beta_1.
        bound: Largest size of a token's reward from it, above 0; inf for no bound.
        kl: Factor of the KL penalty, at least 0.
        trace: lambda of the advantage estimates, from 0 to 1.
        outcome_bound: Largest size of the reward of a response, above 0.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: PPO, and a forward pass of the DPO policy, whose log-probs are the input ``aligned_log_probs``.
    References: arXiv 2404.18922.
    Differences from the paper:
        - The paper has no bounds; those of the released scripts are the defaults here.
        - The loss of the critic is not part of the objective; ``tokcredit.mix("rto", terms="value(0.5)")`` adds it.
    Differences from the released code:
        - Advantages are divided by the sample standard deviation; the release divides by that of the population.
        - With a scale of 0 the log-ratio is left out; the release then takes a scale of 1.
        - Of several named rewards the sum is bounded.
    """
    return Objective(
        credit.whitened(aligned_rewards(credit.gae(1.0, trace, kl=kl), scale, bound, outcome_bound)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.sequence_mean(),
    )
