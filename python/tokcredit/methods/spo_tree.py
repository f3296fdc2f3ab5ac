"""Segment policy optimization, tree."""

from __future__ import annotations


from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit.blocks import segment, values
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, filters, ratio
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit, whitened


def _forest(batch: Rollouts) -> tuple[Tensor, Tensor]:
    """Nodes in an order in which parents come first, one root per group before them: of each row, and its parent."""
    node, parent = (batch.input(name).long() for name in ("node_ids", "parent_ids"))
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
class edges(Credit):
    """Rows that are edges of a sampled tree: the value where the edge leads minus the value where it begins.

    A node without children is worth its row's reward, another the mean of its children. ``scale`` divides by the
    population standard deviation of the parent's children, plus ``epsilon``. A change of less than 1e-9 counts as 0.
    """

    scale: bool = flag(False)
    epsilon: float = number(1e-8, at_least=0)
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


def spo_tree(
    below: float = 0.9, clip_low: float = 0.2, clip_high: float = 0.2, scale: bool = False, whiten: bool = False
) -> Objective:
    """PPO without a critic on the edges of a sampled tree: each is paid the value below it minus that of its siblings.

    A row of the batch is an edge: the tokens of the path above it, masked, and its own. A leaf is worth its reward, a
    node the mean of its children; the advantage is the value of the edge's end minus that of its beginning. Edges paid
    0 leave the batch, and only tokens of a probability below 0.9 train.

    Args:
        below: tokens of a smaller probability under the old policy train.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        scale: divide by the standard deviation of the siblings' values.
        whiten: give the advantages of the tokens that train mean 0 and variance 1, as the released code does.

    Cost: one sampled tree per prompt (6 x 6 x 6 in the release), whose edges are both the data and the estimate.
    Source: arXiv 2505.23564.
    Departs from the paper: no KL term (theirs: k3, 1e-4, a sum over tokens), no replay of edges, and not the
    release's optional best-of-k term. The release also skips a micro-batch whose mean ratio exceeds 10.
    """
    change = edges(scale)
    return Objective(
        whitened(change, below, nonzero=True) if whiten else change,
        filters=(filters.nonzero_advantage(), filters.improbable(below)),
        ratio=ratio.token(bound=10.0),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
