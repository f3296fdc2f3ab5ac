"""Values of tree nodes, estimated from the rewards of the rollouts below them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import ops, segment
from tokcredit.tree import PrefixTree


def _rewards(tree: PrefixTree, rewards: Tensor | None) -> Tensor:
    if rewards is None:
        return tree.batch.rewards
    if tuple(rewards.shape) != tuple(tree.leaf.shape):
        raise ValueError(f"rewards: expected {list(tree.leaf.shape)}, got {list(rewards.shape)}")
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def monte_carlo(tree: PrefixTree, rewards: Tensor | None = None) -> Tensor:
    """Mean reward of the rollouts through each node; ``[V]``, 0 in unused slots.

    Args:
        tree: the prefix trees.
        rewards: float ``[R]``, the batch's own by default.
    """
    rewards = _rewards(tree, rewards)
    # Sums of equal float32 numbers are exact in double, and of equal doubles once the group's least is taken away.
    least = segment.minimum(rewards, segment.Ids(tree.batch.group_index, tree.batch.num_groups))
    above = (rewards - least[tree.batch.group_index]).double()
    total = torch.ops.tokcredit.tree_fold(tree.leaf, tree.parent, None, above)
    mean = (total / tree.count.clamp(min=1)).to(rewards.dtype)
    return torch.where(tree.count > 0, mean + least[tree.group.clamp(min=0)], 0) if least.numel() else mean


def mean_of_children(tree: PrefixTree, rewards: Tensor | None = None) -> Tensor:
    """Mean of the children's values, a rollout that ends at the node counting as a child; ``[V]``.

    Weighs branches, not rollouts: the estimate of SPO-tree (arXiv 2505.23564).
    """
    rewards = _rewards(tree, rewards)
    scale = 1 / tree.degree.clamp(min=1).to(rewards.dtype)
    return torch.ops.tokcredit.tree_fold(tree.leaf, tree.parent, scale, rewards)


def leave_one_out(tree: PrefixTree, rewards: Tensor | None = None) -> Tensor:
    """Mean reward of the *other* rollouts through each token's node; ``[N]``.

    Where no other rollout passes, the value of the deepest node before it that another one shares; 0 in a group of one.
    """
    rewards = _rewards(tree, rewards)
    total = torch.ops.tokcredit.tree_fold(tree.leaf, tree.parent, None, rewards)
    shared = tree.count > 1
    # A node of one rollout hangs below a shared one (or is a root), so one step up suffices.
    source = torch.where(shared, torch.arange(shared.numel(), device=shared.device), tree.parent.clamp(min=0))
    known = shared | (tree.parent >= 0)
    others = (tree.count[source] - 1).clamp(min=1).to(rewards.dtype)
    body = torch.where(known, total[source] / others, 0)
    share = torch.where(known, 1 / others, 0)
    own = ops.spread(rewards, tree.batch.rows, tree.batch.tokens)
    return tree.expand(body=body) - own * tree.expand(body=share)


def temporal_difference(tree: PrefixTree, value: Tensor) -> Tensor:
    """Value of each node minus its parent's; ``[V]``, 0 at roots, which nothing precedes."""
    return torch.where(tree.parent >= 0, value - value[tree.parent.clamp(min=0)], 0)


def fold_means(parent: Tensor, leaf: Tensor, x: Tensor) -> Tensor:
    """Values of any forest: a node without children is worth what was put there, another the mean of its children.

    Args:
        parent: int64 ``[V]``, a smaller number than the node's own, or -1 at a root.
        leaf: int64 ``[M]``, nodes without children.
        x: float ``[M]``, what they are worth.

    Returns:
        ``[V]``.
    """
    children = torch.bincount(parent[parent >= 0], minlength=parent.numel())
    return torch.ops.tokcredit.tree_fold(leaf, parent, 1 / children.clamp(min=1).to(x.dtype), x)
