"""PODS: policy optimization with down-sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tokcredit.blocks import select
from tokcredit.blocks.segment import Ids
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import clip, credit
from tokcredit.stages.base import whole_number
from tokcredit.stages.filters import Filter


@dataclass(frozen=True)
class most_varied(Filter):
    """The ``count`` rows of each group whose rewards have the largest variance as a set; all rows of a smaller group.

    Such a set consists of the ``i`` highest and the ``count - i`` lowest rewards for some ``i``. Of sets with equal
    variance, that of the ``count`` highest rewards is taken, else the one with the smallest ``i``. Equal rewards are
    ordered by their place in the batch. Rows without a token that the policy chose are neither counted nor kept.

    Args:
        count: Rows that are kept of each group, at least 1.

    References:
        arXiv 2504.13818.
    """

    count: int = whole_number(16, at_least=1)
    before_credit: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        groups = batch.nonempty_groups
        scope = Ids(groups.scope, groups.count)
        return select.maximum_variance(batch.rewards, self.count, scope, prefer_largest=True)[:, None]


def pods(count: int = 16, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-4) -> Objective:
    """PODS: GRPO on the responses of each group whose rewards have the largest variance as a set.

    The other responses are generated but not trained on. Mean and standard deviation are those of the responses that
    are kept.

    Args:
        count: Responses that are kept of each group, at least 1; a smaller group is kept whole.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.

    Cost: Forward and backward passes over ``count`` responses per group, however many were generated.
    References: arXiv 2504.13818.
    Differences from the paper:
        - None known. ``count``, ``epsilon`` and the choice among sets of equal variance are those of the released code.
    Differences from the released code:
        - Equal rewards are ordered by their place in the batch; the release's sort leaves their order open.
        - The release compares variances in float32, so that rounding can decide between sets of equal variance.
    """
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        clip=clip.ppo(clip_low, clip_high),
        filters=(most_varied(count),),
    )
