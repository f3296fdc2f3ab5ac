"""KL-Cov: the tokens whose log-prob and advantage vary together most are pulled to the old policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit.blocks import select
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, term
from tokcredit.stages.base import number
from tokcredit.stages.filters import Filter, covariance, highest


@dataclass(frozen=True)
class top_covariance(Filter):
    """The share of the tokens with the largest covariance of log-prob and advantage, at least one token.

    The number of tokens is rounded down. Ties go to the lower index.

    Args:
        share: Share of the tokens of the batch, above 0 and at most 1.
    """

    share: float = number(2e-3, above=0, at_most=1, scheduled=True)
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        scope = select.everything(batch.spans)
        return highest(covariance(batch, advantages), self.share, batch.spans, scope, round_up=False)


def kl_cov(coefficient: float = 1.0, share: float = 2e-3) -> Objective:
    """KL-Cov: the policy gradient without a clip, and a pull to the old policy at the tokens that lower the entropy.

    With ``A`` the advantage of GRPO, ``q`` the ratio, means over the N training tokens of the batch, and ``chosen`` the
    ``max(floor(share * N), 1)`` tokens with the largest covariance::

        cov[t] = (A[t] - mean(A)) * (log p_old[t] - mean(log p_old))
        loss = mean over all tokens of -A * q + (coefficient * |log p - log p_old| if chosen else 0)

    On policy the pull has no gradient, so that the first update of a batch is the plain policy gradient.

    Args:
        coefficient: Strength of the pull, at least 0.
        share: Share of the tokens that is pulled. The authors take 0.002 for 7B and 0.0002 for 32B.

    Cost: The same as GRPO.
    References: arXiv 2505.22617.
    Differences from the paper:
        - The covariance is that of the old log-probs over the whole batch, so that the result does not depend on
          micro-batches. The paper takes the current log-probs.
    Differences from the released code:
        - verl's configuration has a coefficient of 0.1 and a share of 0.0002; SkyRL's ``kl_cov_frac`` of 0.2 is a share
          of 20 %.
    """
    pull = term.kl(coefficient, "abs", to="old_log_probs", where=top_covariance(share), over_all=True)
    return Objective(clip=clip.unclipped(), aggregation=aggregation.token_mean(), terms=(pull,))
