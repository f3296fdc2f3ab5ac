"""Segment policy optimization, tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.objective import Objective
from tokcredit.rollouts import Rollouts
from tokcredit.stages import aggregation, clip, filters, ratio
from tokcredit.stages.base import flag, number
from tokcredit.stages.credit import Credit, whitened


def _forest(batch: Rollouts) -> tuple[Tensor, Tensor]:
    """Return the node number of each row, and the parent of each node, with one root per group as the first nodes.

    Parents have smaller numbers than their children.
    """
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
    """Advantage of rows that are edges of a sampled tree: the value at the end of the edge minus that at its start.

    A node without children has its row's reward as its value, another node the mean of the values of its children::

        A(child) = V(child) - V(parent)
        A(child) = (V(child) - V(parent)) / (std(V of the children of the parent) + epsilon)        # with scale

    The standard deviation is that of the population. A change within the rounding of the rewards is exactly 0: at most
    8 times the machine epsilon of their dtype times the largest absolute value of the siblings. So children of equal
    values have no advantage, and of the float32 rewards .1, .3, 0, 0 the first has none, because .1 is their mean.

    Args:
        scale: Whether to divide by the standard deviation.
        epsilon: Added to the standard deviation, at least 0.

    References:
        arXiv 2505.23564.
    """

    scale: bool = flag(False)
    epsilon: float = number(1e-8, at_least=0)
    reads: ClassVar[frozenset[str]] = frozenset({"node_ids", "parent_ids"})

    def __call__(self, batch: Rollouts) -> Tensor:
        number, parents = _forest(batch)
        above = parents[number]
        children = torch.bincount(above, minlength=parents.numel())
        ends = batch.rewards.double().masked_fill(children[number] > 0, 0)  # rewards of inner nodes are not read
        value = ops.tree_fold(number, parents, 1 / children.clamp(min=1).double(), ends)
        siblings = segment.Ids(above, parents.numel())
        own = value[number]
        change = own - value[above]
        size = segment.maximum(own.abs(), siblings)[above]
        rounding = 8 * torch.finfo(batch.rewards.dtype).eps * size
        change = change.masked_fill(change.abs() <= rounding, 0)
        if self.scale:
            change = change / (segment.var(own, siblings, ddof=0).sqrt()[above] + self.epsilon)
        return change.to(batch.rewards.dtype)[:, None]


def spo_tree(
    below: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    scale: bool = False,
    whiten: bool = False,
) -> Objective:
    """SPO-tree: PPO without a critic on the edges of a sampled tree; the advantage is the change of value over an edge.

    A row of the batch is an edge: the tokens of the path above it, which are masked, and its own tokens. A leaf has its
    reward as its value, an inner node the mean of the values of its children::

        A(child) = V(child) - V(parent)

    Edges with an advantage of 0 leave the batch, and only tokens to which the old policy gave a probability of less
    than ``below`` train.

    Args:
        below: Tokens with a smaller probability under the old policy train, from 0 to 1; the paper's rho.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        scale: Whether to divide by the population standard deviation of the values of the parent's children. It is the
            release's option ``grpo``, the default here its ``rloo``.
        whiten: Whether advantages are shifted and scaled to mean 0 and variance 1 over the tokens that train, as in the
            released code.

    Cost: One sampled tree per prompt (6 x 6 x 6 in the release), whose edges are both the training data and the
        estimate of the values.
    References: arXiv 2505.23564.
    Differences from the paper:
        - There is no KL term. The release adds 1e-4 times the mean over rows of the sum of k3 over tokens that train:
          ``tokcredit.mix("spo_tree", terms="kl(1e-4, limit=10000, aggregation=sequence_sum(1))")``.
    Differences from the released code:
        - Advantages are not whitened unless ``whiten`` is set. Advantages that are all equal are never whitened.
        - A change within the rounding error of the values is 0. The release drops exact zeros only and so keeps edges
          for their rounding error.
        - The replay of edges of earlier iterations belongs to the trainer and is not done.
        - The optional best-of-k term (``use_pav``) is not offered.
        - The release skips a micro-batch whose mean ratio exceeds 10.
    """
    change: Credit = edges(scale)
    return Objective(
        whitened(change, below, nonzero=True) if whiten else change,
        filters=(filters.nonzero_advantage(), filters.improbable(below)),
        ratio=ratio.token(bound=10.0),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
