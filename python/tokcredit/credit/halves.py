"""Credit from a comparison of the two halves of a group, split by a number of each row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tokcredit import segment, select
from tokcredit.choice import Choice
from tokcredit.credit.group import group_size
from tokcredit.ops import Rows
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import Schedule, number
from tokcredit.segment import Ids


class Metric(Protocol):
    """A number per row, float ``[R]``."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Rollouts) -> Tensor: ...


@dataclass(frozen=True)
class mean_entropy(Choice):
    """Mean entropy of the row's next-token distributions, nats."""

    reads: ClassVar[frozenset[str]] = frozenset({"entropies"})

    def __call__(self, batch: Rollouts) -> Tensor:
        return segment.mean(batch.evidence("entropies"), batch.rows)


@dataclass(frozen=True)
class length(Choice):
    """Tokens of the row that the policy chose."""

    def __call__(self, batch: Rollouts) -> Tensor:
        return batch.lengths.float()


@dataclass(frozen=True)
class order(Choice):
    """The row's place in the batch: a split that means nothing, as a control."""

    def __call__(self, batch: Rollouts) -> Tensor:
        return torch.arange(batch.num_rows, dtype=torch.float64, device=batch.tokens.device)


@dataclass(frozen=True)
class by_mean_reward(Choice):
    """Linear in the batch's mean reward: ``failed`` where that is 0, ``solved`` where it is 1."""

    failed: float = 1.0
    solved: float = 0.0
    whole_batch: ClassVar[bool] = True

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.failed + (self.solved - self.failed) * batch.rewards.mean()


@dataclass(frozen=True)
class halves(Choice):
    """Reward against the mean of the other half of the group, mixed with reward against the mean of its own.

    Rows are sorted by the metric, equal ones in their order; the low half are the first ``floor(n / 2)``. With
    ``a = high`` for a row of the high half and ``a = low`` for one of the low half, and b that of the other half::

        A = between (a r - b mean(other half) +- offset) + (1 - between) (r - mean(own half))

    ``+ offset`` in the high half. A half without rows has mean 0, and a group of one is its own other half's.
    """

    metric: Metric = field(default_factory=mean_entropy)
    between: float | Schedule | by_mean_reward = 1.0
    high: float = 1.0
    low: float = 1.0
    offset: float = 0.0

    def __call__(self, batch: Rollouts) -> Tensor:
        r, size = batch.rewards, group_size(batch)
        each = torch.arange(batch.num_rows, device=r.device)
        groups = Ids(batch.group_index, batch.num_groups)
        count = torch.bincount(batch.group_index, minlength=batch.num_groups)
        is_low = select.top_k(-self.metric(batch), count // 2, Rows(each, each + 1), groups)
        half = 2 * batch.group_index + is_low
        means = segment.mean(r, Ids(half, 2 * batch.num_groups))
        high, low = r.new_tensor(self.high), r.new_tensor(self.low)
        own_scale, other_scale = torch.where(is_low, low, high), torch.where(is_low, high, low)
        between = self.between(batch) if isinstance(self.between, by_mean_reward) else number(self.between)
        inter = own_scale * r - other_scale * means[half ^ 1] + torch.where(is_low, -self.offset, self.offset)
        intra = r - torch.where(size > 1, means[half], 0)
        return (between * inter + (1 - between) * intra).to(r.dtype)[:, None]
