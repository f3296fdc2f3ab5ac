"""Policy optimization with down-sampling."""

from __future__ import annotations


from dataclasses import dataclass
from typing import ClassVar

import torch
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
    """The ``count`` rows of each group whose rewards vary most as a set, and all rows of a smaller group.

    References:
        arXiv 2504.13818.
    """

    count: int = whole_number(16, at_least=1)
    before_credit: ClassVar[bool] = True

    def __call__(self, batch: Rollouts, advantages: Tensor | None) -> Tensor:
        groups = batch.groups
        scope = Ids(torch.where(batch.lengths > 0, groups.index, -1), groups.count)
        return select.maximum_variance(batch.rewards, self.count, scope)[:, None]


def pods(count: int = 16, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-6) -> Objective:
    """GRPO on the rows of each group whose rewards vary most as a set; the others are generated but not trained on.

    Mean and standard deviation are those of the rows that are kept.

    Args:
        count: rows kept per group; all rows of a smaller group.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: forward and backward passes on ``count`` rows per group, however many were generated.
    Source: arXiv 2504.13818.
    Departs from the paper: nothing known; ``count`` as in the released configuration.
    """
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        clip=clip.ppo(clip_low, clip_high),
        filters=(most_varied(count),),
    )
