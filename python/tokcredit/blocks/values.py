"""Values of the nodes of prefix trees, estimated from the rewards of the rows below them."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, instance, tensor
from tokcredit.blocks import segment
from tokcredit.blocks.tree import PrefixTree, Visits


def _rewards(tree: PrefixTree, rewards: Tensor | None) -> Tensor:
    if rewards is None:
        return tree.batch.rewards
    tensor("rewards", rewards, FLOATS, (tree.batch.num_rows,), tree.leaf.device)
    return rewards if rewards.dtype == torch.float64 else rewards.float()


def monte_carlo(tree: PrefixTree, rewards: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """Return the mean reward of the rows through each node, without gradient.

    Args:
        tree: The prefix trees.
        rewards: float ``[R]``, or None for the rewards of the batch.
        counted: bool ``[R]``, rows that count, or None for all.

    Returns:
        float ``[V]``, 0 in unused slots and where no row counts.
    """
    return _mean(tree, rewards, counted, change=False)


def monte_carlo_change(tree: PrefixTree, rewards: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """Return the mean reward of the rows through each node minus that of the rows through its parent.

    It is what :func:`temporal_difference` gives for the values of :func:`monte_carlo`, rounded only once, and without
    gradient.

    Args:
        tree: The prefix trees.
        rewards: float ``[R]``, or None for the rewards of the batch.
        counted: bool ``[R]``, rows that count, or None for all.

    Returns:
        float ``[V]``, 0 at roots and in unused slots.
    """
    return _mean(tree, rewards, counted, change=True)


def _mean(tree: PrefixTree, rewards: Tensor | None, counted: Tensor | None, change: bool) -> Tensor:
    rewards = _rewards(tree, rewards)
    if counted is not None:
        tensor("counted", counted, (torch.bool,), (tree.batch.num_rows,), tree.leaf.device)
    if tree.visits is not None:
        mean = _mean_of_visits(tree, tree.visits, rewards, counted)
        return (temporal_difference(tree, mean) if change else mean).to(rewards.dtype)
    return ops.tree_mean(tree.leaf, tree.parent, counted, rewards, change)


def _mean_of_visits(tree: PrefixTree, visits: Visits, rewards: Tensor, counted: Tensor | None) -> Tensor:
    """Return the mean reward of the rows through each node, float64 ``[V]``; each row counts once."""
    scope = visits.node if counted is None else torch.where(counted[visits.row], visits.node, -1)
    return segment.mean(rewards.double()[visits.row], segment.Ids(scope, len(tree.parent)))


def _require_rows(tree: PrefixTree) -> None:
    if tree.pieces is not None:
        raise ValueError("tree: expected trees of whole rows, got pieces of rows because of context_keys")


def monte_carlo_ends(tree: PrefixTree, rewards: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """Return, at the last token of a piece, the value of the context that it ends with minus that of its node.

    They differ where the context was reached in another way: by a row that begins with it and does not hold all tokens
    before. With :func:`monte_carlo_change` at the first tokens of nodes it is the change of the value at every token.

    Args:
        tree: Prefix trees of pieces.
        rewards: float ``[R]``, or None for the rewards of the batch.
        counted: bool ``[R]``, rows that count, or None for all.

    Returns:
        float ``[N]``, 0 at other tokens and where masked.

    Raises:
        ValueError: The trees have no pieces.
    """
    rewards = _rewards(tree, rewards)
    if tree.pieces is None or tree.visits is None:
        raise ValueError("tree: expected trees of pieces, got trees of rows")
    mean = _mean_of_visits(tree, tree.visits, rewards, counted)
    begin, end, after = tree.pieces.spans.begin, tree.pieces.spans.end, tree.pieces.after
    there = ((after >= 0) & (end > begin)).nonzero()[:, 0]
    change = mean[tree.visits.root[after[there]]] - mean[tree.leaf[there]]
    found = mean.new_zeros(tree.batch.num_tokens).index_copy_(0, end[there] - 1, change)
    return found.masked_fill_(~tree.batch.response_mask, 0).to(rewards.dtype)


def mean_of_children(tree: PrefixTree, rewards: Tensor | None = None) -> Tensor:
    """Return the mean value of each node's children, where a row that ends at the node counts as a child.

    Branches weigh equally, however many rows they hold: the estimate of SPO-tree. It is without gradient.

    Args:
        tree: The prefix trees.
        rewards: float ``[R]``, or None for the rewards of the batch.

    Returns:
        float ``[V]``, 0 in unused slots.

    Raises:
        ValueError: The trees have pieces of rows.

    References:
        arXiv 2505.23564.
    """
    _require_rows(tree)
    rewards = _rewards(tree, rewards)
    scale = 1 / tree.degree.clamp(min=1).to(rewards.dtype)
    return ops.tree_fold(tree.leaf, tree.parent, scale, rewards)


def leave_one_out(tree: PrefixTree, rewards: Tensor | None = None) -> Tensor:
    """Return, for each token, the mean reward of the *other* rows through the token's node.

    Where no other row passes, the value is that of the deepest earlier node that another row shares. It is 0 in a group
    of one, and without gradient.

    Args:
        tree: The prefix trees.
        rewards: float ``[R]``, or None for the rewards of the batch.

    Returns:
        float ``[N]``, 0 where masked.

    Raises:
        ValueError: The trees have pieces of rows.
    """
    _require_rows(tree)
    rewards = _rewards(tree, rewards)
    total = ops.tree_fold(tree.leaf, tree.parent, None, rewards)
    shared = tree.count > 1
    # A node of one row hangs below a shared one (or is a root), so one step up suffices.
    source = torch.where(shared, torch.arange(shared.numel(), device=shared.device), tree.parent.clamp(min=0))
    known = shared | (tree.parent >= 0)
    others = (tree.count[source] - 1).clamp(min=1).to(rewards.dtype)
    body = torch.where(known, total[source] / others, 0)
    share = torch.where(known, 1 / others, 0)
    own = ops.spread(rewards, tree.batch.spans)
    return tree.expand(body=body) - own * tree.expand(body=share)


def temporal_difference(tree: PrefixTree, value: Tensor) -> Tensor:
    """Return the value of each node minus the value of its parent.

    Args:
        tree: The prefix trees.
        value: float ``[V]``.

    Returns:
        float ``[V]``, 0 at roots and in unused slots.
    """
    tensor("value", value, FLOATS, tuple(tree.parent.shape), tree.parent.device)
    return torch.where(tree.parent >= 0, value - value[tree.parent.clamp(min=0)], 0)


def fold_means(parent: Tensor, leaf: Tensor, x: Tensor) -> Tensor:
    """Return the values of any forest: a node without children has its own value, another the mean of its children.

    They are without gradient.

    On CUDA this waits for the device to check the forest.

    Args:
        parent: int64 ``[V]``, a smaller number than the node's own, or -1 at a root.
        leaf: int64 ``[M]``, nodes without children, each once.
        x: float32 or float64 ``[M]``, the values of these nodes.

    Returns:
        float ``[V]``.

    Raises:
        ValueError: A node number is out of range, or a parent does not come before its child.
    """
    for name, ids in (("parent", parent), ("leaf", leaf)):
        instance(name, ids, Tensor)
        tensor(name, ids, (torch.int64,), (ids.numel(),), parent.device)
    tensor("x", x, (torch.float32, torch.float64), tuple(leaf.shape), parent.device)
    nodes = torch.arange(parent.numel(), device=parent.device)
    if bool(((parent < -1) | (parent >= nodes)).any()):
        raise ValueError("parent: expected -1 or a node before the child, got a later or a negative number")
    if bool(((leaf < 0) | (leaf >= parent.numel())).any()):
        raise ValueError(f"leaf: expected nodes from 0 to {parent.numel() - 1}, got {leaf.tolist()[:8]}")
    children = torch.bincount(parent[parent >= 0], minlength=parent.numel())
    return ops.tree_fold(leaf, parent, 1 / children.clamp(min=1).to(x.dtype), x)
