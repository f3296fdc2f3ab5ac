"""Credit from where the rollouts of a group part."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokcredit import tree, values
from tokcredit.choice import Choice
from tokcredit.credit.group import outcome, spread
from tokcredit.rollouts import Rollouts


@dataclass(frozen=True)
class tempo_like(Choice):
    """Group-normalized reward, plus at each branch token the change of the tree's value that the token caused.

    ``A[t] = (r - mean + V(after t) - V(before t)) / (std + epsilon)``, V of a prefix being the mean reward of the
    group's rollouts that run through it. The difference is 0 wherever no other rollout parts.
    """

    scale: bool = True
    epsilon: float = 1e-6

    def __call__(self, batch: Rollouts) -> Tensor:
        trees = tree.build(batch)
        change = values.temporal_difference(trees, values.monte_carlo(trees))
        centred = outcome(batch)
        if self.scale:
            scale = spread(batch, self.epsilon)
            per_group = scale.new_ones(batch.num_groups).index_put((batch.group_index,), scale)
            centred, change = centred / scale, change / per_group[trees.group]
        return trees.expand(row=centred, head=change)
