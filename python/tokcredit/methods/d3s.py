"""Dynamic dual-level down-sampling."""

from __future__ import annotations


from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment, select
from tokcredit.blocks.segment import Ids
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import linear
from tokcredit.stages import aggregation, clip, credit, filters, token_score
from tokcredit.stages.base import number
from tokcredit.stages.filters import Filter


@dataclass(frozen=True)
class varied_rows(Filter):
    """Selects the rows of the whole batch whose advantages vary most as a set: ``round(share * rows)``, at least 2.

    Rows without a token to train are neither counted nor chosen. Of advantages that vary inside a row the mean counts.

    References:
        arXiv 2509.22115.
    """

    share: float = number(above=0, at_most=1, scheduled=True)
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        of_row = advantages[:, 0] if advantages.dim() == 2 else segment.mean(advantages, batch.spans)
        candidates = batch.lengths > 0
        count = (candidates.sum() * self.share).round().long().clamp(min=2).reshape(1)
        return select.maximum_variance(of_row, count, Ids(torch.where(candidates, 0, -1), 1))[:, None]


def d3s(
    rows_start: float = 0.25,
    rows_end: float = 1.0,
    tokens_start: float = 0.2,
    tokens_end: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO on the rows whose advantages vary most, and there on the tokens with the largest ``|A| H``.

    Rows are chosen from the whole batch so that the variance of their advantages, normalised in their groups before, is
    largest; rows paid nothing are dropped. H is the entropy of the next-token distribution under the old policy. Both
    shares grow linearly over training.

    Args:
        rows_start: share of the batch's rows that are kept at the first step.
        rows_end: share at the last step.
        tokens_start: share of the kept rows' tokens that train at the first step.
        tokens_end: share at the last step.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: entropies with the old log-probs; then passes on the kept rows only.
    Source: arXiv 2509.22115.
    Departs from the paper: the shares it used, the scope of the token ranking and the denominator were not found; this
    ranks all kept rows together, rounds the number of tokens up and takes the mean over the tokens that train.
    """
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        filters=(
            varied_rows(linear(rows_start, rows_end)),
            filters.nonzero_advantage(),
            filters.top_share(linear(tokens_start, tokens_end), token_score.given("entropies"), times_advantage=True),
        ),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
