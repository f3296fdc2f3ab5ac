"""Credit from where the rollouts of a group part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import segment, tree, values
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


def _forest(batch: Rollouts) -> tuple[Tensor, Tensor]:
    """Nodes in an order in which parents come first, one root per group before them: of each row, and its parent."""
    node, parent = (batch.evidence(name).long() for name in ("node_ids", "parent_ids"))
    rows, groups, index = batch.num_rows, batch.num_groups, batch.group_index
    # A node is one of its group.
    numbers, which = torch.unique(torch.cat([node, parent]), return_inverse=True)
    names, which = torch.unique(torch.cat([index, index]) * numbers.numel() + which, return_inverse=True)
    holder = which.new_full((names.shape[0],), -1)
    holder[which[:rows]] = torch.arange(rows, device=node.device)
    if int((holder >= 0).sum()) != rows:
        raise ValueError("node_ids: expected each to occur once in its group, got one twice")
    above = holder[which[rows:]]
    depth, ancestor = torch.zeros_like(node), above
    for _ in range(rows + 1):
        if not (ancestor >= 0).any():
            break
        depth += ancestor >= 0
        ancestor = torch.where(ancestor >= 0, above[ancestor.clamp(min=0)], -1)
    else:
        raise ValueError("parent_ids: expected a tree, got a cycle")
    number = torch.empty_like(node)
    number[depth.argsort(stable=True)] = torch.arange(groups, groups + rows, device=node.device)
    parents = torch.full((groups + rows,), -1, dtype=torch.int64, device=node.device)
    parents[number] = torch.where(above >= 0, number[above.clamp(min=0)], index) if rows else number
    return number, parents


@dataclass(frozen=True)
class edges(Choice):
    """Rows that are edges of a sampled tree: the value where the edge leads minus the value where it begins.

    A node without children is worth its row's reward, another the mean of its children. ``scale`` divides by the
    population standard deviation of the parent's children, plus ``epsilon``. A change of less than 1e-9 counts as 0.
    """

    scale: bool = False
    epsilon: float = 1e-8
    reads: ClassVar[frozenset[str]] = frozenset({"node_ids", "parent_ids"})

    def __call__(self, batch: Rollouts) -> Tensor:
        number, parents = _forest(batch)
        inner = torch.zeros(parents.shape, dtype=torch.bool, device=parents.device)
        inner[parents[parents >= 0]] = True
        ends = ~inner[number]
        value = values.fold_means(parents, number[ends], batch.rewards.double()[ends])
        above = parents[number]
        change = value[number] - value[above]
        change = torch.where(change.abs() < 1e-9, 0, change)
        if self.scale:
            variance = segment.var(value[number], segment.Ids(above, parents.numel()), ddof=0)
            change = change / (variance.sqrt()[above] + self.epsilon)
        return change.to(batch.rewards.dtype)[:, None]
