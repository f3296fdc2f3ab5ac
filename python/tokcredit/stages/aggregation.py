"""Aggregation stages: the weight of each trajectory's tokens in the loss.

``loss = sum over trajectories of weight * (sum of the trajectory's token losses)``. The weights come from the whole
batch, so the loss does not depend on how the batch is cut into micro-batches or ranks. Without ``trajectory_ids`` each
row is a trajectory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.groups import Groups
from tokcredit.stages.base import Stage, whole_number


@dataclass(frozen=True)
class Counts:
    """What aggregations divide by.

    Args:
        given: For each count that the stage declares its number over all ranks, or None for that of this rank.
        dp_size: Ranks whose gradients the host averages.
        width: ``longest`` of the batch.
        lengths: int64 ``[J]``, training tokens of each trajectory of this rank.
        signs: ``[J]``, sign of the trajectory's outcome advantage.
        group_of_row: Groups of this rank.
    """

    given: Mapping[str, int | None]
    dp_size: int
    width: int
    lengths: Tensor
    signs: Tensor | None
    group_of_row: Groups | None

    def _given(self, name: str) -> int | None:
        if name not in self.given:
            raise ValueError(f"counts: expected {name} among those that the aggregation declares, got {self.given!r}")
        return self.given[name]

    def _number(self, given: int) -> Tensor:
        return torch.full((), given, dtype=torch.int64, device=self.lengths.device)

    @property
    def tokens(self) -> Tensor:
        """Training tokens over all ranks; int64 0-d."""
        given = self._given("tokens")
        return self.lengths.sum() if given is None else self._number(given)

    @property
    def rows(self) -> Tensor:
        """Trajectories with a training token over all ranks; int64 0-d."""
        given = self._given("rows")
        return self.lengths.count_nonzero() if given is None else self._number(given)

    @property
    def groups(self) -> Tensor:
        """Groups with such a trajectory over all ranks; int64 0-d."""
        given = self._given("groups")
        if given is not None:
            return self._number(given)
        assert self.group_of_row is not None
        return self.group_of_row.counting(self.lengths > 0).counts.count_nonzero()

    def weights(self, counted: str, length: float | None = None) -> Tensor:
        """Return ``dp_size / (count * length)``, the weight of each trajectory's tokens; what is 0 counts as 1.

        Args:
            counted: ``tokens``, or ``rows`` for trajectories with a training token.
            length: Length of every trajectory, or None for its training tokens.

        Returns:
            float64 ``[J, 1]``, or 0-d with a length.
        """
        weights = ops.row_weights(self.lengths, counted, self._given(counted), length, self.dp_size)
        return weights if weights.dim() == 0 else weights[:, None]


class Aggregation(Stage):
    """Base of aggregation stages.

    Attributes:
        kind: ``"aggregation"``.
        counts: Denominators it reads: some of ``tokens``, ``rows``, ``groups``.
        reads_signs: Whether it reads the sign of each row's outcome advantage, and groups.
    """

    kind: ClassVar[str] = "aggregation"
    counts: ClassVar[frozenset[str]] = frozenset()
    reads_signs: ClassVar[bool] = False

    def __call__(self, counts: Counts) -> Tensor:
        """Return the weight of each trajectory's tokens, float64 ``[J, 1]``, or 0-d for the same weight everywhere.

        Args:
            counts: The denominators.
        """
        raise NotImplementedError

    @property
    def reads_width(self) -> bool:
        """Whether it divides by the longest row, which differs between ranks and between parts of a batch."""
        return False

    @property
    def for_terms(self) -> Aggregation:
        """Aggregation of terms that have no advantage, such as KL."""
        return self


@dataclass(frozen=True)
class token_mean(Aggregation):
    """Mean over all training tokens of the batch: verl's ``token-mean``, TRL's ``dapo``."""

    counts: ClassVar[frozenset[str]] = frozenset({"tokens"})

    def __call__(self, counts: Counts) -> Tensor:
        return counts.weights("tokens", 1)


@dataclass(frozen=True)
class token_sum(Aggregation):
    """Sum over all training tokens: verl's ``token-sum``."""

    def __call__(self, counts: Counts) -> Tensor:
        return torch.full((), float(counts.dp_size), dtype=torch.float64, device=counts.lengths.device)


@dataclass(frozen=True)
class sequence_mean(Aggregation):
    """Mean over trajectories of the mean over their tokens: verl's ``seq-mean-token-mean``, TRL's ``grpo``.

    Trajectories without a training token do not count.
    """

    counts: ClassVar[frozenset[str]] = frozenset({"rows"})

    def __call__(self, counts: Counts) -> Tensor:
        return counts.weights("rows")


@dataclass(frozen=True)
class sequence_sum(Aggregation):
    """Mean over trajectories of the sum over their tokens, divided by ``length``.

    This is verl's ``seq-mean-token-sum-norm`` and TRL's ``dr_grpo``. Trajectories without a training token do not
    count.

    Args:
        length: A constant, usually the generation limit; at least 1. None takes a number that varies between batches:
            the longest row, or T of a padded batch; if the batch has ``trajectory_ids``, the largest number of tokens
            that the policy chose in a trajectory.
    """

    length: int | None = whole_number(None, at_least=1, optional=True)
    counts: ClassVar[frozenset[str]] = frozenset({"rows"})

    @property
    def reads_width(self) -> bool:
        """Whether ``length`` is None."""
        return self.length is None

    def __call__(self, counts: Counts) -> Tensor:
        return counts.weights("rows", self.length or max(counts.width, 1))


__all__ = ["Aggregation", "Counts", "sequence_mean", "sequence_sum", "token_mean", "token_sum"]
