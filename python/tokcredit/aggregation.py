"""How token losses become one number: the weight of each row's tokens.

``loss = sum_rows weight[row] * sum_tokens loss[t]``. Weights come from the whole batch, so the loss does not depend on
how the batch is later cut into micro-batches or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tokcredit import segment
from tokcredit.choice import Choice


class Counts(NamedTuple):
    """What the reductions divide by. The numbers are over all ranks; the tensors are this rank's rows.

    Attributes:
        tokens: training tokens.
        rows: rows with a training token.
        groups: groups with such a row.
        dp_size: ranks whose gradients the host averages.
        width: longest row, or T of a padded batch.
        lengths: int64 ``[R]``, training tokens of each row.
        signs: ``[R]``, sign of the row's outcome advantage.
        group_index: int64 ``[R]``, and ``num_groups`` on this rank.
    """

    tokens: Tensor
    rows: Tensor
    groups: Tensor
    dp_size: int
    width: int
    lengths: Tensor
    signs: Tensor
    group_index: Tensor
    num_groups: int


class Aggregation(Protocol):
    """Weight of each row's tokens, ``[R, 1]`` or 0-d. ``penalty`` aggregates terms that have no advantage."""

    def __call__(self, counts: Counts) -> Tensor: ...

    @property
    def penalty(self) -> Aggregation: ...


class _Same(Choice):
    @property
    def penalty(self) -> Aggregation:
        return self  # type: ignore[return-value]


@dataclass(frozen=True)
class token_mean(_Same):
    """Mean over all training tokens of the batch."""

    def __call__(self, counts: Counts) -> Tensor:
        return counts.dp_size / counts.tokens.clamp(min=1).float()


@dataclass(frozen=True)
class token_sum(_Same):
    """Sum over all training tokens."""

    def __call__(self, counts: Counts) -> Tensor:
        return torch.full((), float(counts.dp_size), device=counts.lengths.device)


@dataclass(frozen=True)
class sequence_mean(_Same):
    """Mean over rows of the mean over tokens."""

    def __call__(self, counts: Counts) -> Tensor:
        return counts.dp_size / (counts.rows.clamp(min=1) * counts.lengths.clamp(min=1)).float()[:, None]


@dataclass(frozen=True)
class sequence_sum(_Same):
    """Mean over rows of the sum over tokens, divided by ``length``: the longest possible response.

    ``length=None`` takes the longest row of the batch (T of a padded one), which varies between batches.
    """

    length: int | None = None

    def __call__(self, counts: Counts) -> Tensor:
        length = self.length or max(counts.width, 1)
        return counts.dp_size / (counts.rows.clamp(min=1) * length).float()


@dataclass(frozen=True)
class balanced(Choice):
    """Mean over groups of positive and negative rows averaged apart, then mixed by their share of the rows.

    ``k/G mean(tokens of rows with A > 0) + n/G mean(tokens of rows with A < 0)``: tokens are equal on either side, and
    neither side outweighs the other by being longer. Rows with A = 0 count in G only.
    """

    @property
    def penalty(self) -> Aggregation:
        return token_mean()

    def __call__(self, counts: Counts) -> Tensor:
        trained = counts.lengths > 0
        side = counts.group_index * 2 + (counts.signs > 0)
        sides = segment.Ids(side, 2 * counts.num_groups)
        signed = (trained & (counts.signs != 0)).double()
        rows = segment.sum(signed, sides)[side]
        tokens = segment.sum(signed * counts.lengths, sides)[side]
        group = segment.sum(trained.double(), segment.Ids(counts.group_index, counts.num_groups))
        size = group[counts.group_index]
        share = rows / (size.clamp(min=1) * tokens.clamp(min=1))
        return (signed * share * counts.dp_size / counts.groups.clamp(min=1)).float()[:, None]
