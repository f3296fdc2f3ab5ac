"""What each token is paid: the advantage, from rewards and from where rollouts of a group part.

A credit maps a batch to advantages: ``[R, 1]`` when every token of a row is paid the same, else ``[N]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tokcredit import segment, tree, values
from tokcredit.rollouts import Rollouts


class Credit(Protocol):
    """Advantages of a batch, ``[R, 1]`` or ``[N]``; ``needs`` names the evidence read besides the rewards."""

    needs: ClassVar[frozenset[str]]

    def __call__(self, batch: Rollouts) -> Tensor: ...


def group_mean(batch: Rollouts, x: Tensor) -> Tensor:
    """Mean over the row's group of a per-row number; ``[R]``."""
    return segment.mean(x, segment.Ids(batch.group_index, batch.num_groups))[batch.group_index]


def group_size(batch: Rollouts) -> Tensor:
    """Rows in the row's group; int64 ``[R]``."""
    return torch.bincount(batch.group_index, minlength=batch.num_groups)[batch.group_index]


def outcome(batch: Rollouts) -> Tensor:
    """Reward minus the group's mean; the reward itself in a group of one, which has no baseline; ``[R]``."""
    baseline = group_mean(batch, batch.rewards)
    return batch.rewards - torch.where(group_size(batch) > 1, baseline, 0)


def _scale(batch: Rollouts, epsilon: float) -> Tensor:
    """Sample standard deviation of the group's rewards plus epsilon, and 1 + epsilon in a group of one; ``[R]``."""
    variance = segment.var(batch.rewards, segment.Ids(batch.group_index, batch.num_groups))[batch.group_index]
    return torch.where(group_size(batch) > 1, variance.sqrt(), 1) + epsilon


@dataclass(frozen=True)
class group_normalized:
    """Rewards centred in their group and divided by its spread: ``(r - mean) / (std + epsilon)``.

    ``std`` is the sample standard deviation. A group of one has mean 0 and std 1. ``scale=False`` leaves the division
    out. A group of equal rewards is paid exactly 0.
    """

    scale: bool = True
    epsilon: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: Rollouts) -> Tensor:
        centred = outcome(batch)
        return (centred / _scale(batch, self.epsilon) if self.scale else centred)[:, None]


@dataclass(frozen=True)
class leave_one_out:
    """Reward minus the mean of the group's other rewards; 0 in a group of one, which has no others."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: Rollouts) -> Tensor:
        size = group_size(batch)
        others = (size - 1).clamp(min=1)
        centred = batch.rewards - group_mean(batch, batch.rewards)
        return torch.where(size > 1, centred * size / others, 0)[:, None]


@dataclass(frozen=True)
class tempo_like:
    """Group-normalized reward, plus at each branch token the change of the tree's value that the token caused.

    ``A[t] = (r - mean + V(after t) - V(before t)) / (std + epsilon)``, V of a prefix being the mean reward of the
    group's rollouts that run through it. The difference is 0 wherever no other rollout parts.
    """

    scale: bool = True
    epsilon: float = 1e-6
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: Rollouts) -> Tensor:
        trees = tree.build(batch)
        change = values.temporal_difference(trees, values.monte_carlo(trees))
        centred = outcome(batch)
        if self.scale:
            scale = _scale(batch, self.epsilon)
            per_group = scale.new_ones(batch.num_groups).index_put((batch.group_index,), scale)
            centred, change = centred / scale, change / per_group[trees.group]
        return trees.expand(row=centred, head=change)
