"""Credit from rewards alone: the same advantage for every token of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.groups import Groups
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans
from tokcredit.stages.base import Stage, flag, number, option, part
from tokcredit.stages.filters import improbable_tokens


class Credit(Stage):
    """Base of credit stages: advantages from rewards, from where rows branch, or from inputs.

    Attributes:
        kind: ``"credit"``.
    """

    kind: ClassVar[str] = "credit"

    def __call__(self, batch: Rollouts) -> Tensor:
        """Return the advantages, float ``[R, 1]`` where all tokens of a row have the same, else ``[N]``.

        Args:
            batch: The rollouts, with whole groups.
        """
        raise NotImplementedError

    def targets(self, batch: Rollouts) -> Tensor:
        """Return what a critic is trained to predict before each token, as the part that reads ``values`` says.

        Args:
            batch: The rollouts, with the inputs that the credit requires.

        Returns:
            float ``[N]``.

        Raises:
            ValueError: No part reads ``values``, or several do, or it does not say what a critic learns.
        """
        parts = [x for x in self._settings() if isinstance(x, Credit) and "values" in x.required_inputs]
        if len(parts) != 1:
            raise ValueError(f"credit: expected one part that says what a critic learns, such as gae(), got {self!r}")
        return parts[0].targets(batch)


EQUAL = 1e-9
"""Numbers near 1 with a standard deviation of at most this count as equal: their differences are rounding."""


def counted(batch: Rollouts, count_empty: bool) -> Groups:
    """Return the groups that statistics are taken over.

    Args:
        batch: The rollouts.
        count_empty: Whether rows without a token that the policy chose count, as in TRL and verl.
    """
    return batch.groups if count_empty else batch.nonempty_groups


def outcome(batch: Rollouts, count_empty: bool = False) -> Tensor:
    """Return the reward minus the mean of its group, float64 ``[R]``; the reward itself in a group of one.

    It is exactly 0 where all rewards of a group are equal.

    Args:
        batch: The rollouts.
        count_empty: Whether rows without a token that the policy chose count.
    """
    return standardized(batch, "centred", count_empty=count_empty, dtype=torch.float64)


def deviation(batch: Rollouts, epsilon: float, count_empty: bool = False) -> Tensor:
    """Return the sample standard deviation of each row's group plus epsilon, 1 + epsilon in a group of one.

    Args:
        batch: The rollouts.
        epsilon: Added to the standard deviation.
        count_empty: Whether rows without a token that the policy chose count.

    Returns:
        float64 ``[R]``.
    """
    groups = counted(batch, count_empty)
    statistics = segment.moments(batch.rewards, groups)
    return groups.per_row(statistics.var.sqrt().masked_fill(statistics.size < 2, 1) + epsilon)


def standardized(
    batch: Rollouts,
    standard: str,
    epsilon: float = 0.0,
    count_empty: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the rewards relative to those of their groups, ``[R]``; see ``tokcredit.blocks.segment.standardize``.

    Args:
        batch: The rollouts.
        standard: Which result.
        epsilon: Added to the standard deviation.
        count_empty: Whether rows without a token that the policy chose count.
        dtype: dtype of the result; that of the rewards if None.
    """
    groups = counted(batch, count_empty)
    moments = segment.moment_table(batch.rewards, groups)
    return segment.standardize(batch.rewards, groups.index, moments, standard, epsilon, dtype)


def shares(x: Tensor, by: segment.Ids) -> Tensor:
    """Return ``x / mean(x)`` of each segment; 1 where its sum is 0.

    Args:
        x: float64 ``[M]``, at least 0.
        by: Segments; the result means nothing at elements of none of them.
    """
    mean = segment.mean(x, by).index_select(0, by.ids.clamp(min=0))
    return (x / mean).masked_fill_(mean == 0, 1)


def standard_scores(x: Tensor, by: segment.Ids) -> Tensor:
    """Return ``(x - mean) / std`` with the population statistics of each segment; 0 where its numbers are equal.

    Args:
        x: float64 ``[M]``, near 1; see :data:`EQUAL`.
        by: Segments; elements of none of them are 0.
    """
    moments = segment.moment_table(x, by, ddof=0.0).index_select(0, by.ids.clamp(min=0))
    mean, std = moments[:, 1], moments[:, 2].sqrt()
    return ((x - mean) / std).masked_fill_((by.ids < 0) | (std <= EQUAL), 0)


def per_token(x: Tensor, spans: Spans) -> Tensor:
    """Return a stage's result, ``[R, 1]`` or ``[N]``, as ``[N]``.

    Args:
        x: Result of a stage.
        spans: The rows.
    """
    return x if x.dim() == 1 else ops.spread(x[:, 0], spans)


def chosen_tokens(chosen: Tensor, spans: Spans) -> Tensor:
    """Return the tokens under the mask of the spans that a filter chose, bool ``[N]``.

    Args:
        chosen: bool ``[R, 1]`` or ``[N]``.
        spans: The rows, with a mask.
    """
    assert spans.mask is not None
    return spans.mask & chosen if chosen.dim() == 1 else ops.spread(chosen[:, 0], spans)


def product(a: Tensor, b: Tensor, spans: Spans) -> Tensor:
    """Return the product of two results of stages, each 0-d, ``[R, 1]`` or ``[N]``.

    Args:
        a: First result.
        b: Second result.
        spans: The rows.
    """
    if a.dim() == b.dim() or a.dim() == 0 or b.dim() == 0:
        return a * b
    return ops.row_product(a, b, spans) if a.dim() == 1 else ops.row_product(b, a, spans)


@dataclass(frozen=True)
class group_normalized(Credit):
    """GRPO's advantage: ``(r - mean) / (std + epsilon)`` over the group, with the sample standard deviation.

    A group of one has mean 0 and std 1, unless ``alone`` is ``zero``. A group of equal rewards has advantages of
    exactly 0.

    Args:
        scale: Whether to divide by the standard deviation.
        epsilon: Added to the standard deviation, at least 0.
        count_empty: Whether rows without a token that the policy chose count in the group, as in TRL and verl.
        alone: A group of one keeps its reward with ``raw``, and has advantage 0 with ``zero``.
    """

    scale: bool = flag(True)
    epsilon: float = number(1e-6, at_least=0)
    count_empty: bool = flag(False)
    alone: str = option("raw", "zero")

    def __call__(self, batch: Rollouts) -> Tensor:
        standard = "normalized" if self.scale else "centred"
        advantages = standardized(batch, standard, self.epsilon, self.count_empty)
        if self.alone == "zero":
            groups = counted(batch, self.count_empty)
            advantages = advantages.masked_fill(groups.per_row(groups.counts) < 2, 0)
        return advantages[:, None]


@dataclass(frozen=True)
class leave_one_out(Credit):
    """Reward minus the mean of the other rewards of the group; 0 in a group of one.

    Args:
        count_empty: Whether rows without a token that the policy chose count in the group.
    """

    count_empty: bool = flag(False)

    def __call__(self, batch: Rollouts) -> Tensor:
        return standardized(batch, "leave_one_out", count_empty=self.count_empty)[:, None]


@dataclass(frozen=True)
class constant(Credit):
    """The same advantage for every row, whatever its reward.

    Args:
        value: The advantage.
    """

    value: float = number(1.0)

    def __call__(self, batch: Rollouts) -> Tensor:
        return torch.full_like(batch.rewards, self.value)[:, None]


@dataclass(frozen=True)
class thresholded(Credit):
    """``above`` where the reward exceeds the threshold, else ``below``; no baseline.

    Args:
        above: Advantage of rewards above the threshold.
        below: Advantage of the others.
        threshold: The threshold.
    """

    above: float = number(1.0)
    below: float = number(-1.0)
    threshold: float = number(0.5)

    def __call__(self, batch: Rollouts) -> Tensor:
        below = torch.full_like(batch.rewards, self.below)
        return below.masked_fill_(batch.rewards > self.threshold, self.above)[:, None]


@dataclass(frozen=True)
class negative_part(Credit):
    """``min(A, 0)`` of another credit: no row has a positive advantage.

    Args:
        of: The other credit.
    """

    of: Credit = part(Credit, group_normalized)

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.of(batch).clamp(max=0)


@dataclass(frozen=True)
class sum(Credit):
    """``a + weight * b`` of two credits.

    Args:
        a: First credit.
        b: Second credit.
        weight: Factor of the second; may be a schedule or a controller.
    """

    a: Credit = part(Credit)
    b: Credit = part(Credit)
    weight: float = number(1.0, scheduled=True)

    def __call__(self, batch: Rollouts) -> Tensor:
        a, b = self.a(batch), self.b(batch) * self.weight
        if a.dim() == b.dim():
            return a + b
        return per_token(a, batch.spans) + per_token(b, batch.spans)


@dataclass(frozen=True)
class whitened(Credit):
    """Another credit with mean 0 and variance 1 over the tokens of the batch: ``(A - mean) / sqrt(var + epsilon)``.

    The variance is the sample variance. Advantages that are all equal become 0.

    Args:
        of: The other credit.
        below: Mean and variance are over the tokens to which the old policy gave a probability of less than this. If
            there is no such token, or ``below`` is None, they are over all tokens.
        nonzero: Whether mean and variance are over tokens with a nonzero advantage; other tokens keep 0.
        epsilon: Added to the variance, at least 0.
    """

    of: Credit = part(Credit)
    below: float | None = number(None, at_least=0, at_most=1, optional=True)
    nonzero: bool = flag(False)
    epsilon: float = number(1e-8, at_least=0)
    whole_batch: ClassVar[bool] = True

    @property
    def required_inputs(self) -> frozenset[str]:
        """Those of the other credit, and ``old_log_probs`` with ``below``."""
        return super().required_inputs if self.below is None else super().required_inputs | {"old_log_probs"}

    def __call__(self, batch: Rollouts) -> Tensor:
        advantages, mask = per_token(self.of(batch), batch.spans), batch.response_mask
        if self.nonzero:
            mask = mask & (advantages != 0)
        within = mask
        if self.below is not None:
            low = mask & improbable_tokens(batch, self.below)
            within = torch.where(low.any(), low, mask)
        _, mean, var, _, _ = segment.moments(advantages, batch.single.with_mask(within))
        equal = var == 0
        scale = (var + self.epsilon).rsqrt_().masked_fill_(equal, 1)
        # The mean of equal numbers may differ from them in the last digit.
        moves = batch.spans.with_mask(mask & ~(within & equal))
        return ops.row_affine(advantages, scale[0], (-mean * scale)[0], moves, advantages.dtype)


__all__ = [
    "Credit",
    "constant",
    "group_normalized",
    "leave_one_out",
    "negative_part",
    "outcome",
    "sum",
    "thresholded",
    "whitened",
]
