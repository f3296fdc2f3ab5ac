"""Prefix trees: which tokens the rows of a group share, and where they branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import describe, instance
from tokcredit.blocks.contexts import Pieces, context_keys, pieces
from tokcredit.rollouts import Rollouts
from tokcredit.spans import Spans

__all__ = ["PrefixTree", "build", "context_keys"]

_EXPANDED = (torch.float32, torch.float64, torch.int64, torch.bool)


class Visits(NamedTuple):
    """Which rows go through the nodes of pieces.

    Attributes:
        node: int64 ``[P]``, ascending.
        row: int64 ``[P]``, a row through the node, each once.
        root: int64 ``[K]``, the root of each context.
    """

    node: Tensor
    row: Tensor
    root: Tensor


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """One radix tree per group. A node is a maximal run of tokens that the same set of rows shares.

    A group of G rows has one root, which all of its rows share and which may hold no token, and at most 2G - 1 nodes.
    Nodes are numbered by first appearance, following the rows in order from root to leaf, so a parent has a smaller
    number than its children. Arrays over nodes have the fixed capacity V = 2R; slots from ``size`` on are unused and
    have count 0.

    With ``context_keys`` there may be several trees in a group, one for each context that a row begins with, over
    pieces of rows; see :func:`build`. R is then the number of pieces, and a row counts once at a node.

    Attributes:
        batch: The rollouts, each row a trajectory.
        leaf: int64 ``[R]``, the node at which each row ends.
        parent: int64 ``[V]``, -1 at a root.
        group: int64 ``[V]``, number of the group, as in ``batch.groups.index``.
        depth: int64 ``[V]``, tokens before the node.
        length: int64 ``[V]``, tokens of the node; 0 only at a root whose rows share nothing.
        count: int64 ``[V]``, rows through the node.
        degree: int64 ``[V]``, child nodes plus rows that end at the node.
        size: int64 ``[]``, number of nodes.
        pieces: The pieces of the rows, or None where each is a row.
        visits: Which rows go through the nodes of pieces, or None where each piece is a row.
    """

    batch: Rollouts
    leaf: Tensor
    parent: Tensor
    group: Tensor
    depth: Tensor
    length: Tensor
    count: Tensor
    degree: Tensor
    size: Tensor
    pieces: Pieces | None = None
    visits: Visits | None = None

    def expand(self, body: Tensor | None = None, head: Tensor | None = None, row: Tensor | None = None) -> Tensor:
        """Return per-token numbers from numbers of nodes and rows, without gradient.

        For a token of row r and node v: ``row[r] + body[v] + (head[v] if it is the node's first token else 0)``.

        Args:
            body: ``[V]``, added at every token of the node, or None.
            head: ``[V]``, added at the first token of the node, or None.
            row: ``[R]``, added at every token of the row, or None. Those given have one dtype: float32, float64,
                int64 or bool.

        Returns:
            ``[N]`` of that dtype, 0 where masked.

        Raises:
            TypeError: The dtypes differ, or are not supported.
            ValueError: Nothing is given, or a shape is wrong.
        """
        return self._expand(self.batch.spans, body, head, row)

    @property
    def node(self) -> Tensor:
        """Node of each token, masked tokens included; int64 ``[N]``, -1 outside of rows."""
        numbers = torch.arange(1, self.parent.numel() + 1, device=self.parent.device)
        return self._expand(self.batch.all_spans, numbers, None, None) - 1

    @property
    def is_branch(self) -> Tensor:
        """True where another row that shared everything before has another token, or ended; bool ``[N]``.

        Masked tokens count as well, because the state differs there too.
        """
        return self._expand(self.batch.all_spans, None, self.parent >= 0, None)

    @property
    def runs(self) -> tuple[Tensor, Tensor]:
        """Path of each row or piece from root to leaf: ``offsets [R + 1]`` and ``nodes [offsets[-1]]``, int64."""
        paths = []
        parent = self.parent.tolist()
        for v in self.leaf.tolist():
            path = []
            while v >= 0:
                path.append(v)
                v = parent[v]
            paths.append(path[::-1])
        lengths = torch.tensor([0, *map(len, paths)])
        nodes = torch.tensor([v for path in paths for v in path], dtype=torch.int64)
        return lengths.cumsum(0).to(self.leaf.device), nodes.to(self.leaf.device)

    def _expand(self, spans: Spans, body: Tensor | None, head: Tensor | None, row: Tensor | None) -> Tensor:
        given = {name: x for name, x in (("body", body), ("head", head), ("row", row)) if x is not None}
        if not given:
            raise ValueError("body, head, row: expected at least one of them, got none")
        dtype = None
        for name, x in given.items():
            instance(name, x, Tensor)
            if x.dtype not in _EXPANDED or x.dtype != (dtype := dtype or x.dtype):
                raise TypeError(f"{name}: expected {dtype or 'float32, float64, int64 or bool'}, got {describe(x)}")
        assert dtype is not None
        if self.pieces is not None:
            row = row if row is None else row.index_select(0, self.pieces.row)
            spans = self.pieces.spans.with_mask(spans.mask)
        return ops.expand(spans, dtype, self.leaf, self.parent, self.depth, row, body, head)


def build(batch: Rollouts) -> PrefixTree:
    """Return the prefix trees of all groups of a batch.

    Rows are compared by token id up to their own end, masked tokens included. Equal rows share their leaf, and a row
    that is a prefix of another ends at an inner node. The cost is linear in the shared prefixes.

    With ``context_keys`` rows are compared by all tokens that the policy had seen. A row is cut where the tokens so far
    are the context of another row of its group, so a token has the same node whether its trajectory is one row or
    several. For trajectories of several rows, the trees are those of ``batch.whole``, and results have its layout.

    Args:
        batch: The rollouts, with whole groups.

    Raises:
        ValueError: A trajectory has several rows and the batch no ``context_keys``.
    """
    instance("batch", batch, Rollouts)
    if batch.trajectories is not None:
        if not batch.has_input("context_keys"):
            raise ValueError("context_keys: expected for trajectories of several rows, got None")
        batch = batch.whole
    parts = pieces(batch) if batch.has_input("context_keys") else None
    if parts is None:
        arrays = ops.tree_build(batch.tokens, batch.all_spans, batch.group_index, batch.num_groups)
        leaf, parent, group, depth, length, count, degree, size = arrays
        return PrefixTree(batch, leaf, parent, group, depth, length, count, degree, size)
    leaf, parent, tree, depth, length, _, degree, size = ops.tree_build(
        batch.tokens, parts.spans, parts.tree, len(parts.group)
    )
    used = torch.arange(len(parent), device=parent.device) < size
    group = torch.where(used, parts.group[tree], 0) if len(parts.group) else tree
    roots = (used & (parent < 0)).nonzero()[:, 0]
    root = torch.empty_like(parts.group).index_copy_(0, tree[roots], roots)
    visits = Visits(*_visits(leaf, parent, parts.row, max(batch.num_rows, 1)), root)
    count = torch.bincount(visits.node, minlength=len(parent))
    return PrefixTree(batch, leaf, parent, group, depth, length, count, degree, size, parts, visits)


def _visits(leaf: Tensor, parent: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return each node on the way from a leaf to its root, with the row of the leaf, once."""
    node, found = leaf, []
    while len(node):
        found.append(node * rows + row)
        node = parent[node]
        node, row = node[node >= 0], row[node >= 0]
    pairs = torch.cat([leaf[:0], *found]).unique()
    return pairs // rows, pairs % rows
