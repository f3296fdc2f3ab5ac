"""Dynamic dual-level down-sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit.blocks import segment, select
from tokcredit.blocks.segment import Ids
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import linear
from tokcredit.stages import aggregation, clip, credit, filters, token_score
from tokcredit.stages.base import number
from tokcredit.stages.filters import Filter

_NONZERO = filters.nonzero_advantage()


@dataclass(frozen=True)
class varied_rows(Filter):
    """Those of the rows of the whole batch whose advantages have the largest variance as a set and are not 0.

    ``round(share * rows)`` rows are in the set, at least 2. Rows without a training token are neither counted nor kept.
    Where advantages vary inside a row, their mean is taken; the row is kept if one of them is not 0.

    Args:
        share: Share of the rows, above 0 and at most 1; may be a schedule or a controller.

    References:
        arXiv 2509.22115.
    """

    share: float = number(above=0, at_most=1, scheduled=True)
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        assert advantages is not None
        of_row = advantages[:, 0] if advantages.dim() == 2 else segment.mean(advantages, batch.spans)
        candidates = Ids(batch.nonempty_groups.scope.clamp(max=0), 1)
        wanted = select.Share(self.share, "nearest", least=2)
        chosen = select.maximum_variance(of_row, wanted, candidates)[:, None]
        return chosen & _NONZERO(batch, advantages)


def d3s(
    rows_start: float = 0.25,
    rows_end: float = 1.0,
    tokens_start: float = 0.2,
    tokens_end: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """D3S: GRPO on the responses whose advantages vary most, and in them on the tokens with the largest ``|A| * H``.

    1. The advantages are those of GRPO, from all responses of each group.
    2. Of the whole batch those rows are kept whose advantages have the largest variance as a set; of these, rows with
       an advantage of 0 are dropped.
    3. Of their tokens those with the largest ``|A| * H`` train, with ``H`` the entropy under the old policy.

    The shares of rows and of tokens that are kept grow linearly over training.

    Args:
        rows_start: Share of the rows of the batch that are kept at the first step, above 0 and at most 1.
        rows_end: The same at the last step.
        tokens_start: Share of the tokens of the kept rows that train at the first step, above 0 and at most 1.
        tokens_end: The same at the last step.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: GRPO with entropies from the forward pass for the old log-probs, and then passes over the kept rows only.
    References: arXiv 2509.22115.
    Differences from the paper:
        - The shares that the paper used were not found; the defaults are suggestions.
        - The paper leaves the scope of the token ranking open. Here the tokens of all kept rows are ranked together,
          and their number is rounded up.
        - The paper leaves the denominator open. Here it is the number of tokens that train.
    """
    entropies = token_score.given("entropies")
    for share in (rows_start, rows_end, tokens_start, tokens_end):
        varied_rows(share)  # a share out of range raises here and not while training
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        filters=(
            varied_rows(linear(rows_start, rows_end)),
            filters.top_share(
                linear(tokens_start, tokens_end),
                entropies,
                times_advantage=True,
            ),
        ),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
