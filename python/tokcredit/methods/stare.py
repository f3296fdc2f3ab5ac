"""STARE: surprising tokens weigh more while the entropy is low."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment, select
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.credit.group import per_token
from tokcredit.stages.filters import highest
from tokcredit.stages.token_weights import TokenWeight


@dataclass(frozen=True)
class surprising(TokenWeight):
    """Factors of the tokens with the lowest old log-probs, while the mean entropy of the batch is below a target.

    Of the tokens with ``A > 0``, the ``ceil(share * number)`` with the lowest log-probs, at least one, are multiplied
    by ``positive``, and of those with ``A < 0`` likewise by ``negative``. Ties go to the lower index.

    Args:
        share: Share of the tokens of each sign, above 0 and at most 1.
        positive: Factor of improbable tokens with a positive advantage, at least 0.
        negative: Factor of improbable tokens with a negative advantage, at least 0.
        target: All factors are 1 if the mean entropy of the batch is at least this, nats.
    """

    share: float = number(0.1, above=0, at_most=1, scheduled=True)
    positive: float = number(1.1, at_least=0, scheduled=True)
    negative: float = number(1.0, at_least=0, scheduled=True)
    target: float = number(0.3, scheduled=True)
    reads: ClassVar[frozenset[str]] = frozenset({"old_log_probs", "entropies"})
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        everything = batch.single.with_mask(batch.response_mask)
        entropy = segment.moments(batch.input("entropies"), everything).mean
        one = torch.ones_like(entropy, dtype=advantages.dtype).masked_fill_(entropy.isnan(), math.nan)
        factor = torch.ones_like(advantages).masked_fill_(advantages > 0, self.positive)
        factor = torch.where(entropy < self.target, factor.masked_fill_(advantages < 0, self.negative), one)
        return torch.where(self._improbable(batch, advantages), per_token(factor, batch.spans), one)

    def _improbable(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        """Return the share of the tokens of each sign with the lowest old log-probs, bool ``[N]``."""
        score = -batch.input("old_log_probs")
        if advantages.dim() == 2:  # all tokens of a row have the same sign, of which each is a scope
            signs = segment.Ids(advantages[:, 0].sign().long() + 1, 3)
            return highest(score, self.share, batch.spans, signs)
        found = torch.zeros_like(batch.response_mask)
        for side in (advantages > 0, advantages < 0):
            spans = batch.spans.with_mask(batch.response_mask & side)
            found |= highest(score, self.share, spans, select.everything(spans))
        return found


def stare(
    share: float = 0.1,
    positive: float = 1.1,
    negative: float = 1.0,
    target: float = 0.3,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float | None = 3.0,
) -> Objective:
    """STARE: DAPO that gives the most surprising tokens another weight while the entropy of the policy is low.

    With ``A`` the advantage of GRPO and ``H`` the mean entropy of the batch::

        w = positive    at the share of the tokens with A > 0 that are least probable, if H < target
            negative    at the share of the tokens with A < 0 that are least probable, if H < target
            1           elsewhere
        loss = mean over all tokens of w * DAPO's loss

    Args:
        share: Share of the tokens of each sign.
        positive: Weight of surprising tokens with a positive advantage; 1.05 for 14B and 32B.
        negative: Weight of surprising tokens with a negative advantage. 1 is variant O1; for variant C2 the authors
            take 0.9, and 0.95 for 14B and 32B.
        target: Entropy below which the weights are used, nats.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.

    Cost: GRPO plus the entropies of the forward pass for the old log-probs.
    References: arXiv 2606.19236.
    Differences from the paper:
        - Weights that adapt to the distance from the target are not offered; each may be a schedule or a controller.
    Differences from the released code:
        - Tokens are ranked by the old log-probs over the whole batch, so that the result does not depend on
          micro-batches. The release ranks the micro-batch by the current log-probs.
    """
    return Objective(
        token_weights=(surprising(share, positive, negative, target),),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.token_mean(),
    )
