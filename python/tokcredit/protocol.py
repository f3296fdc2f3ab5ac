"""What the three objectives share: denominators, losses, and the interface that trainers use.

:class:`~tokcredit.Objective`, :class:`~tokcredit.Preference` and :class:`~tokcredit.Supervised` follow
:class:`TrainingObjective`, so code that trains, adapts or inspects never asks which one it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from tokcredit.arguments import float_tensor, whole_number
from tokcredit.rollouts import Rollouts
from tokcredit.schedule import State
from tokcredit.stages.aggregation import Aggregation, Counts
from tokcredit.stages.base import Stage


class Metrics(Mapping[str, Tensor]):
    """Metrics by name, 0-d tensors, computed when they are first read.

    Only reading a metric as a Python number waits for the device.

    Args:
        compute: Returns all metrics.
    """

    def __init__(self, compute: Callable[[], dict[str, Tensor]]) -> None:
        self._compute = compute
        self._values: dict[str, Tensor] | None = None

    def _all(self) -> dict[str, Tensor]:
        if self._values is None:
            self._values = self._compute()
        return self._values

    def __getitem__(self, name: str) -> Tensor:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class Loss(NamedTuple):
    """The loss of a batch or of a part of it.

    Attributes:
        loss: 0-d, with gradient.
        metrics: 0-d tensors by name, without gradient.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True)
class Denominators:
    """Counts over all ranks, which the loss is divided by. A count that is None is taken from this batch.

    Args:
        batch_num_tokens: Training tokens over all ranks.
        global_batch_size: Rows with a training token over all ranks.
        global_num_groups: Groups with such a row over all ranks.
        dp_size: Number of ranks whose gradients the host averages. The loss is multiplied by it, so that the average is
            the gradient of the whole batch.

    Raises:
        TypeError: One is not a whole number.
        ValueError: One is too small.
    """

    batch_num_tokens: int | None = None
    global_batch_size: int | None = None
    global_num_groups: int | None = None
    dp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("batch_num_tokens", "global_batch_size", "global_num_groups"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, whole_number(name, value))
        object.__setattr__(self, "dp_size", whole_number("dp_size", self.dp_size, at_least=1))

    def require(self, aggregation: Aggregation) -> None:
        """Check that the counts which an aggregation divides by are given if there are several ranks.

        Args:
            aggregation: The aggregation.

        Raises:
            ValueError: A number is missing.
        """
        if self.dp_size == 1:
            return
        needed = [_ARGUMENTS[count] for count in ("tokens", "rows", "groups") if count in aggregation.counts]
        if aggregation.reads_width:
            raise ValueError(
                f"aggregation: expected a length in {aggregation} because dp_size is {self.dp_size}, got None"
            )
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name}: expected the number over all ranks because dp_size is {self.dp_size}, got None"
                )

    def row_weights(
        self, aggregation: Aggregation, batch: Rollouts, lengths: Tensor, signs: Tensor | None = None
    ) -> Tensor:
        """Return the weight of each row's tokens, float64 ``[R, 1]`` or 0-d.

        Args:
            aggregation: The aggregation.
            batch: The rollouts.
            lengths: int64 ``[R]``, training tokens of each row.
            signs: ``[R]``, sign of each row's outcome advantage, for an aggregation that reads it.
        """
        given = {name: getattr(self, _ARGUMENTS[name]) for name in aggregation.counts}
        groups = batch.groups if aggregation.reads_signs or "groups" in given else None
        width = batch.longest if aggregation.reads_width else 0
        return aggregation(Counts(given, self.dp_size, width, lengths, signs, groups))


class ObjectiveStage(Stage):
    """Base of the three objectives. What their stages declare is asked for at every batch, so it is remembered."""

    @cached_property
    def required_inputs(self) -> frozenset[str]:
        """Names of the inputs that a batch must carry."""
        return super().required_inputs

    @cached_property
    def compares_groups(self) -> bool:
        """Whether ``prepare`` must see the rows of all ranks."""
        return super().compares_groups

    @property
    def couples_rows(self) -> bool:
        """Whether a part must have whole groups, because the loss of a row depends on the others of its group."""
        return False

    def trajectories_of(self, batch: Rollouts) -> Rollouts:
        """Return the batch as its stages see it, without gradients, after checking that it has all inputs.

        Args:
            batch: The rollouts.

        Raises:
            TypeError: An input has the wrong type.
            ValueError: An input is missing or wrong, or a trajectory has several rows and a stage reads contexts, or
                compares prefixes without ``context_keys``.
        """
        for name in self.required_inputs:
            batch.input(name)
        if batch.trajectories is not None:
            for stage in self.stages():
                if stage.reads_contexts:
                    raise ValueError(
                        f"trajectory_ids: expected one row in each trajectory because of {stage!r}, which reads tokens "
                        "that the policy did not choose, got several"
                    )
                if stage.compares_prefixes and not batch.has_input("context_keys"):
                    raise ValueError(
                        f"context_keys: expected for trajectories of several rows because of {stage!r}, which compares "
                        "prefixes, got None; see tokcredit.tree.context_keys"
                    )
        return batch.detached().whole


_ARGUMENTS = {"tokens": "batch_num_tokens", "rows": "global_batch_size", "groups": "global_num_groups"}


class PreparedBatch(Protocol):
    """What trainers, adapters and reports may use of any prepared batch."""

    batch: Rollouts

    @property
    def mask(self) -> Tensor:
        """The tokens that train; bool ``[N]``."""

    @property
    def lengths(self) -> Tensor:
        """Training tokens of each row; int64 ``[R]``."""

    @property
    def advantages(self) -> Tensor:
        """Advantage of each token, or what takes its place, in the layout of the batch."""

    @property
    def row_weights(self) -> Tensor:
        """Weight of each row's tokens in the loss; float64 ``[R, 1]`` or 0-d."""

    @property
    def has_gradient(self) -> Tensor:
        """Rows that can have a gradient; bool ``[R]``."""

    def select(self, rows: Any) -> PreparedBatch:
        """Return these rows as a micro-batch."""

    def minibatch(self, rows: Any, **denominators: int) -> PreparedBatch:
        """Return these rows as an optimizer step of their own."""

    def with_denominators(
        self,
        *,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        global_num_groups: int | None = None,
        dp_size: int = 1,
    ) -> PreparedBatch:
        """Return the same with other denominators."""


P = TypeVar("P")


class TrainingObjective(Protocol, Generic[P]):
    """The interface of all objectives."""

    @property
    def required_inputs(self) -> frozenset[str]:
        """Names of the inputs that a batch must carry."""

    @property
    def variables(self) -> tuple[str, ...]:
        """Per-token variables that :meth:`loss` takes, with gradient: the first by position, the others by name."""

    @property
    def compares_groups(self) -> bool:
        """Whether :meth:`prepare` must see the rows of all ranks."""

    @property
    def couples_rows(self) -> bool:
        """Whether a part must have whole groups."""

    def prepare(
        self,
        batch: Rollouts,
        *,
        batch_num_tokens: int | None = None,
        global_batch_size: int | None = None,
        global_num_groups: int | None = None,
        dp_size: int = 1,
        progress: float | None = None,
        state: State | None = None,
    ) -> P:
        """Return the batch with everything that does not depend on the current policy."""

    def loss(self, prepared: P, per_token: Tensor, /, **variables: Tensor) -> Loss:
        """Return the loss of a prepared batch, or of a part of it."""


def check_variables(expected: tuple[str, ...], first: Any, given: Mapping[str, Any]) -> None:
    """Check that ``loss`` is given the variables that an objective needs, and no others.

    Args:
        expected: Names of all variables, the first by position.
        first: The first variable.
        given: Further variables by name.

    Raises:
        TypeError: One is missing, not needed, or not a float tensor.
    """
    for name in expected[1:]:
        if name not in given:
            raise TypeError(f"{name}: expected by name because the objective differentiates it, got none")
    for name in given:
        if name not in expected[1:]:
            raise TypeError(f"{name}: expected {', '.join(expected[1:]) or 'no further variable'}, got {name}")
    for name, x in {expected[0]: first, **given}.items():
        float_tensor(name, x)
