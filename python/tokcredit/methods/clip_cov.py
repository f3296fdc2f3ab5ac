"""Clip-Cov: a few tokens whose log-prob and advantage vary together do not train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.filters import covariance_between
from tokcredit.stages.token_weights import TokenWeight


@dataclass(frozen=True)
class dropped(TokenWeight):
    """0 at tokens drawn among those with a covariance between two bounds, 1 elsewhere.

    ``max(floor(share * N), 1)`` tokens are drawn without replacement, or all candidates if there are fewer. The seed of
    the draw is the sum of the ids of the training tokens, so that every rank draws the same tokens.

    Args:
        share: Share of the training tokens of the batch, above 0 and at most 1.
        low: Candidates have a larger covariance than this.
        high: Candidates have a smaller covariance than this.
    """

    share: float = number(2e-4, above=0, at_most=1, scheduled=True)
    low: float = number(1.0)
    high: float = number(5.0)
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        at = covariance_between(batch, advantages, self.low, self.high).nonzero()[:, 0]
        wanted = max(math.floor(self.share * int(batch.lengths.sum()) + 1e-9), 1)
        ids = segment.sum(batch.tokens.double(), batch.single.with_mask(batch.response_mask))
        seeded = torch.Generator().manual_seed(int(ids))
        drawn = at[torch.randperm(len(at), generator=seeded).to(at.device)[:wanted]]
        return torch.ones_like(batch.input("old_log_probs")).index_fill_(0, drawn, 0)


def clip_cov(
    clip_low: float = 0.2, clip_high: float = 0.2, share: float = 2e-4, low: float = 1.0, high: float = 5.0
) -> Objective:
    """Clip-Cov: GRPO's clipped loss without a few random tokens whose log-prob and advantage vary together.

    The entropy of the policy falls mostly through such tokens. With ``A`` the advantage of GRPO and means over the N
    training tokens of the batch::

        cov[t] = (A[t] - mean(A)) * (log p_old[t] - mean(log p_old))
        dropped: max(floor(share * N), 1) tokens drawn among those with low < cov < high
        loss = mean over all tokens, with 0 for dropped ones, of max(-A * q, -A * clip(q, 1 - clip_low, 1 + clip_high))

    Args:
        clip_low: Lower clip range. The authors' script for 7B has 1.
        clip_high: Upper clip range. The authors' script for 7B has 1.
        share: Share of the tokens that is dropped.
        low: Tokens with a covariance of at most this are not dropped.
        high: Tokens with a covariance of at least this are not dropped.

    Cost: The same as GRPO.
    References: arXiv 2505.22617.
    Differences from the paper:
        - The covariance is that of the old log-probs over the whole batch, so that the result does not depend on
          micro-batches. The paper takes the current log-probs.
    Differences from the released code:
        - Tokens that the clip stops can be drawn too; the release knows which these are.
    """
    return Objective(
        token_weights=(dropped(share, low, high),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
