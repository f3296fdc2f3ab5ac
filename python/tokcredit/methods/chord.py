"""CHORD: on-policy reinforcement learning and imitation of an expert in one loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip
from tokcredit.stages.aggregation import Aggregation
from tokcredit.stages.base import flag, number, part
from tokcredit.stages.credit.group import product
from tokcredit.stages.filters import Filter, marked
from tokcredit.stages.term import Term
from tokcredit.stages.token_weights import TokenWeight


@dataclass(frozen=True)
class sampled(Filter):
    """The rows that the policy sampled, expert rows left out; group statistics do not see the others."""

    reads: ClassVar[frozenset[str]] = frozenset({"expert"})
    before_credit: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        return ~batch.input("expert")[:, None]


@dataclass(frozen=True)
class remainder(TokenWeight):
    """``1 - share`` at every token.

    Args:
        share: From 0 to 1; may be a schedule or a controller.
    """

    share: float = number(at_least=0, at_most=1, scheduled=True)

    def __call__(self, batch: Rollouts, advantages: Tensor) -> Tensor:
        return torch.full_like(batch.rewards, 1 - self.share)[:, None]


@dataclass(frozen=True)
class expert_nll(Term):
    """Negative log-likelihood of expert rows, each token optionally weighted by ``p (1 - p)``.

    Args:
        coefficient: Factor of the term, at least 0; may be a schedule or a controller.
        uncertain: Whether a token is weighted by ``p (1 - p)``, without gradient.
        where: Filter of the rows it acts on.
        aggregation: How tokens are averaged, or None for the aggregation of the objective.
    """

    coefficient: float = number(0.1, at_least=0, scheduled=True)
    uncertain: bool = flag(True)
    where: Filter | None = part(Filter, lambda: marked("expert"), optional=True)
    aggregation: Aggregation | None = part(Aggregation, None, optional=True)
    metric: ClassVar[str] = "expert_nll"
    after_filters: ClassVar[bool] = False
    # Its denominator counts the experts' tokens of all ranks.
    whole_batch: ClassVar[bool] = True

    couples_tokens = False

    def __call__(self, variables: Mapping[str, Tensor], batch: Rollouts, spans: Spans, weights: Tensor) -> Tensor:
        log_probs, weights = variables["log_probs"], -weights
        if self.uncertain:
            p = log_probs.detach().exp()
            weights = product(p.addcmul_(p, p, value=-1), weights.to(p.dtype), spans)
        return segment.weighted_sum(log_probs, spans, weights, total=True)


def chord(share: float = 0.1, uncertain: bool = True, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """CHORD: GRPO on sampled responses plus the likelihood of an expert's responses, each with its own denominator.

    With ``w = p * (1 - p)``, without gradient, or 1::

        loss = (1 - share) * GRPO's loss over sampled responses
               + share * mean over the expert's tokens of -w * log p

    Args:
        share: Weight of the expert's part, from 0 to 1; the paper's mu. It may be a schedule: the authors lower it from
            0.9 to 0.05, ``schedule.cosine(0.9, 0.05)``.
        uncertain: Whether an expert's token is weighted by ``p * (1 - p)``, the paper's phi.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO. The caller adds the expert's responses and marks them by the input ``expert``.
    References: arXiv 2508.11408.
    Differences from the paper:
        - None known; its formula was read in third-party code.
    Differences from the released code:
        - Both parts are means over all their tokens of the whole batch; the hosts take those of the micro-batch.
        - Trinity-RFT's variant with the slope ``-p`` is not offered.
    """
    return Objective(
        filters=(sampled(),),
        token_weights=(remainder(share),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        terms=(expert_nll(share, uncertain),),
    )
