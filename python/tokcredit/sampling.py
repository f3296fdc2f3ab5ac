"""Which rows take part at all: decided from the rewards, before anybody is paid.

Rows left out train nothing, and the statistics of the credit do not see them. A choice maps a batch to bool ``[R]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokcredit import segment, select
from tokcredit.choice import Choice
from tokcredit.rollouts import Rollouts
from tokcredit.segment import Ids


class Sampling(Protocol):
    """Rows that take part, bool ``[R]``."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Rollouts) -> Tensor: ...


@dataclass(frozen=True)
class most_varied(Choice):
    """The ``count`` rows of each group whose rewards vary most as a set, and all rows of a smaller group.

    References:
        arXiv 2504.13818.
    """

    count: int = 16

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: expected at least 1, got {self.count}")

    def __call__(self, batch: Rollouts) -> Tensor:
        return select.maximum_variance(batch.rewards, self.count, Ids(batch.group_index, batch.num_groups))


@dataclass(frozen=True)
class mixed(Choice):
    """The groups whose rewards are not all equal."""

    def __call__(self, batch: Rollouts) -> Tensor:
        groups = Ids(batch.group_index, batch.num_groups)
        varied = segment.maximum(batch.rewards, groups) > segment.minimum(batch.rewards, groups)
        return varied[batch.group_index] if batch.num_groups else torch.zeros_like(batch.rewards, dtype=torch.bool)
