"""Credit from rewards alone: the same for every token of a row."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tokcredit import ops, segment
from tokcredit.choice import Choice
from tokcredit.rollouts import Rollouts


class Credit(Protocol):
    """Advantages of a batch, ``[R, 1]`` or ``[N]``; ``needs`` names the evidence read besides the rewards."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, batch: Rollouts) -> Tensor: ...


def group_mean(batch: Rollouts, x: Tensor) -> Tensor:
    """Mean over the row's group of a per-row number; ``[R]``."""
    return segment.mean(x, segment.Ids(batch.group_index, batch.num_groups))[batch.group_index]


def group_size(batch: Rollouts) -> Tensor:
    """Rows in the row's group; int64 ``[R]``."""
    return torch.bincount(batch.group_index, minlength=batch.num_groups)[batch.group_index]


def centred(batch: Rollouts) -> Tensor:
    """Reward minus the group's mean, exactly 0 where all of its rewards are equal; ``[R]``."""
    least = segment.minimum(batch.rewards, segment.Ids(batch.group_index, batch.num_groups))[batch.group_index]
    above = batch.rewards - least
    return above - group_mean(batch, above)


def outcome(batch: Rollouts) -> Tensor:
    """Reward minus the group's mean; the reward itself in a group of one, which has no baseline; ``[R]``."""
    return torch.where(group_size(batch) > 1, centred(batch), batch.rewards)


def spread(batch: Rollouts, epsilon: float) -> Tensor:
    """Sample standard deviation of the group's rewards plus epsilon, and 1 + epsilon in a group of one; ``[R]``."""
    variance = segment.var(batch.rewards, segment.Ids(batch.group_index, batch.num_groups))[batch.group_index]
    return torch.where(group_size(batch) > 1, variance.sqrt(), 1) + epsilon


@dataclass(frozen=True)
class group_normalized(Choice):
    """Rewards centred in their group and divided by its spread: ``(r - mean) / (std + epsilon)``.

    ``std`` is the sample standard deviation. A group of one has mean 0 and std 1. ``scale=False`` leaves the division
    out. A group of equal rewards is paid exactly 0.
    """

    scale: bool = True
    epsilon: float = 1e-6

    def __call__(self, batch: Rollouts) -> Tensor:
        paid = outcome(batch)
        return (paid / spread(batch, self.epsilon) if self.scale else paid)[:, None]


@dataclass(frozen=True)
class leave_one_out(Choice):
    """Reward minus the mean of the group's other rewards; 0 in a group of one, which has no others."""

    def __call__(self, batch: Rollouts) -> Tensor:
        size = group_size(batch)
        others = (size - 1).clamp(min=1)
        return torch.where(size > 1, centred(batch) * size / others, 0)[:, None]


@dataclass(frozen=True)
class constant(Choice):
    """The same number for every row, whatever its reward."""

    value: float = 1.0

    def __call__(self, batch: Rollouts) -> Tensor:
        return torch.full_like(batch.rewards, self.value)[:, None]


@dataclass(frozen=True)
class thresholded(Choice):
    """``above`` where the reward exceeds the threshold, else ``below``; no baseline."""

    above: float = 1.0
    below: float = -1.0
    threshold: float = 0.5

    def __call__(self, batch: Rollouts) -> Tensor:
        above, below = batch.rewards.new_tensor(self.above), batch.rewards.new_tensor(self.below)
        return torch.where(batch.rewards > self.threshold, above, below)[:, None]


@dataclass(frozen=True)
class negative_part(Choice):
    """``min(A, 0)`` of another credit: nothing is encouraged."""

    of: Credit = field(default_factory=group_normalized)

    def __call__(self, batch: Rollouts) -> Tensor:
        return self.of(batch).clamp(max=0)


@dataclass(frozen=True)
class token_normalized(Choice):
    """Rewards centred and scaled over the *tokens* of the group, each of which carries its row's reward.

    With L the tokens of a row: ``mean = sum L r / sum L``, ``std = sqrt(sum L (r - mean)^2 / sum L)`` and
    ``A = (r - mean) / (std + epsilon)``, so that A sums to 0 over the tokens of the group. A group in which some
    ``|A|`` reaches ``limit`` is paid by ``otherwise`` instead.
    """

    limit: float = 5.0
    epsilon: float = 1e-6
    otherwise: Credit = field(default_factory=group_normalized)

    def __call__(self, batch: Rollouts) -> Tensor:
        groups, index = segment.Ids(batch.group_index, batch.num_groups), batch.group_index
        lengths = batch.lengths.double()
        tokens = segment.sum(lengths, groups).clamp(min=1)
        # From the group's least reward, so that equal rewards have a spread of exactly 0.
        r = batch.rewards.double() - segment.minimum(batch.rewards.double(), groups)[index]
        centred = r - (segment.sum(lengths * r, groups) / tokens)[index]
        std = (segment.sum(lengths * centred**2, groups) / tokens).sqrt()[index]
        advantages = torch.where(lengths > 0, centred / (std + self.epsilon), 0)
        extreme = segment.maximum(advantages.abs(), groups)[index] >= self.limit
        return torch.where(extreme[:, None], self.otherwise(batch), advantages[:, None]).to(batch.rewards.dtype)


@dataclass(frozen=True)
class whitened(Choice):
    """Another credit, with mean 0 and variance 1 over the tokens of the batch: ``(A - mean) / sqrt(var + epsilon)``.

    ``below`` takes mean and (sample) variance over the tokens whose old probability is less, or over all if there is
    none; ``paid`` leaves tokens paid 0 out and as they are. Where all are equal they stay as they are.
    """

    of: Credit
    below: float | None = None
    paid: bool = False
    epsilon: float = 1e-8
    whole_batch: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[str]:
        return super().needs if self.below is None else super().needs | {"old_log_probs"}

    def __call__(self, batch: Rollouts) -> Tensor:
        advantages, mask = self.of(batch), batch.response_mask
        if advantages.dim() == 2:
            advantages = ops.spread(advantages[:, 0], batch.rows, batch.tokens)
        if self.paid:
            mask = mask & (advantages != 0)
        counted = mask
        if self.below is not None:
            low = mask & batch.improbable(self.below)
            counted = torch.where(low.any(), low, mask)
        one = segment.whole(advantages, counted)
        mean, var = segment.mean(advantages, one), segment.var(advantages, one)
        scale = torch.where(var > 0, (var + self.epsilon).rsqrt(), 1)
        return torch.where(mask, (advantages - torch.where(var > 0, mean, 0)).mul_(scale), 0)
