"""Conditional advantage estimation."""

from __future__ import annotations


from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment, select
from tokcredit.blocks.segment import Ids
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import Schedule
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import Stage, flag, number, part
from tokcredit.stages.credit import Credit
from tokcredit.stages.credit.group import counted


class Metric(Stage):
    """A number per row, by which CANON splits a group."""

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the number of each row, float ``[R]``.

        Args:
            batch: The rollouts.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class mean_entropy(Metric):
    """Mean entropy of the row's next-token distributions, nats."""

    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: Rollouts) -> Tensor:
        return segment.mean(batch.input("entropies"), batch.spans)


@dataclass(frozen=True)
class length(Metric):
    """Tokens of the row that the policy chose."""

    def __call__(self, batch: Rollouts) -> Tensor:
        return batch.lengths.float()


@dataclass(frozen=True)
class order(Metric):
    """The row's place in the batch: a split that means nothing, as a control."""

    def __call__(self, batch: Rollouts) -> Tensor:
        return torch.arange(batch.num_rows, dtype=torch.float64, device=batch.tokens.device)


@dataclass(frozen=True)
class by_mean_reward(Stage):
    """Linear in the batch's mean reward: ``failed`` where that is 0, ``solved`` where it is 1."""

    failed: float = number(1.0)
    solved: float = number(0.0)
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.failed + (self.solved - self.failed) * batch.rewards[batch.lengths > 0].double().mean()


@dataclass(frozen=True)
class halves(Credit):
    """Reward against the mean of the other half of the group, mixed with reward against the mean of its own.

    Rows are sorted by the metric, equal ones in their order; the low half are the first ``floor(n / 2)``. With
    ``a = high`` for a row of the high half and ``a = low`` for one of the low half, and b that of the other half::

        A = between (a r - b mean(other half) +- offset) + (1 - between) (r - mean(own half))

    ``+ offset`` in the high half. A half without rows has mean 0.
    """

    metric: Metric = part(Metric, mean_entropy)
    between: float | by_mean_reward = number(1.0, scheduled=True, or_stage=by_mean_reward)
    high: float = number(1.0)
    low: float = number(1.0)
    offset: float = number(0.0)
    count_empty: bool = flag(False)

    def __call__(self, batch: Rollouts) -> Tensor:
        groups = counted(batch, self.count_empty)
        r, index = batch.rewards.double(), groups.index
        taken = torch.ones_like(batch.lengths, dtype=torch.bool) if self.count_empty else batch.lengths > 0
        scope = Ids(torch.where(taken, index, -1), groups.count)
        each = torch.arange(batch.num_rows, device=r.device)
        count = segment.count(groups)
        rows = Spans.trusted(each, each + 1, batch.num_rows)
        is_low = select.top_k(-self.metric(batch), count // 2, rows, scope)
        half = 2 * index + is_low
        means = segment.mean(r, Ids(half, 2 * groups.count, taken))
        own = torch.where(is_low, self.low, self.high)
        other = torch.where(is_low, self.high, self.low)
        between = self.between(batch) if isinstance(self.between, by_mean_reward) else self.between
        inter = own * r - other * means[half ^ 1] + torch.where(is_low, -self.offset, self.offset)
        intra = r - torch.where(groups.per_row(count) > 1, means[half], 0)
        return (between * inter + (1 - between) * intra).to(batch.rewards.dtype)[:, None]


def canon(
    by_length: bool = False,
    between: float | Schedule | by_mean_reward | None = None,
    alpha: float = 1.0,
    offset: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    max_length: int | None = None,
) -> Objective:
    """GRPO that splits each group by entropy and compares a row with the other half, or with its own.

    ``A = between (r - mean of the other half) + (1 - between) (r - mean of its own half)``, undivided; 0.5 with equal
    halves is ``dr_grpo``. Across halves the better half is favoured, inside them the correct rows of the weaker one.

    Args:
        by_length: split by the number of tokens in place of the mean entropy.
        between: share of the comparison across halves: 1 is CANON-Inter, 0 CANON-Intra. None for CANON-Dynamic, one
            minus the batch's mean reward. The cosine schedules of the release are
            ``tokcredit.schedule.cosine_restarts(0, 1, 0.4, steps=150, warmup=30, period=40)`` (first across halves),
            and with ``(1, 0.4, 1)`` (first inside).
        alpha: factor of the rewards of long rows, or of low-entropy rows, in the comparison across halves; below 1 with
            ``by_length`` and ``between=1`` is CANON-Eff.
        offset: added to the high half there, and taken from the low one.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        max_length: divides the sum over a row's tokens; None takes the batch's longest row.

    Cost: as GRPO, plus entropies with the old log-probs.
    Source: arXiv 2509.23962.
    Departs from the released code: CANON-Dynamic is the paper's, where the release is left in the opposite state, the
    mean reward itself (``between=by_mean_reward(0, 1)``). Which half alpha discounts follows the code.
    """
    return Objective(
        halves(
            length() if by_length else mean_entropy(),
            by_mean_reward() if between is None else between,
            high=alpha if by_length else 1.0,
            low=1.0 if by_length else alpha,
            offset=offset,
        ),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.sequence_sum(max_length),
    )
