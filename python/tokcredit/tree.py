"""The rollouts of each group laid over each other: what they share, and where they part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.rollouts import Rollouts


@dataclass(frozen=True, eq=False)
class PrefixTree:
    """One radix tree per group. A node is a maximal run of tokens shared by one set of rollouts.

    A group of G rollouts has one root (what all of them share, possibly nothing) and at most 2G - 1 nodes. Nodes are
    numbered by first appearance, walking the rollouts in order from root to leaf, so a parent's number is smaller than
    its children's. Arrays over nodes have the fixed capacity V = 2R; slots from ``size`` on are unused, with count 0.

    Attributes:
        leaf: int64 ``[R]``, the node at which the rollout ends.
        parent: int64 ``[V]``, -1 at a root.
        group: int64 ``[V]``, index into ``batch.group_index``.
        depth: int64 ``[V]``, tokens before the node.
        length: int64 ``[V]``, tokens of the node; 0 only at a root whose rollouts share nothing.
        count: int64 ``[V]``, rollouts through the node.
        degree: int64 ``[V]``, child nodes plus rollouts that end here.
        size: int64 ``[]``, number of nodes.
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

    def expand(self, body: Tensor | None = None, head: Tensor | None = None, row: Tensor | None = None) -> Tensor:
        """Per-token numbers ``row[r] + body[v] + (head[v] at the first token of v)``; 0 where masked.

        Args:
            body: ``[V]``, a number for every token of the node.
            head: ``[V]``, a number for the first token of the node.
            row: ``[R]``, a number for every token of the rollout. All of one dtype: float32, float64, int64 or bool.

        Returns:
            ``[N]``.
        """
        return self._expand(self.batch.response_mask, body, head, row)

    @property
    def node(self) -> Tensor:
        """Node of each token, int64 ``[N]``; -1 outside rows."""
        numbers = torch.arange(1, self.parent.numel() + 1, device=self.parent.device)
        return self._expand(None, numbers, None, None) - 1

    @property
    def is_branch(self) -> Tensor:
        """True where a rollout that shared everything before took another token or ended; bool ``[N]``.

        Tokens the policy did not choose count as well: the state parts there.
        """
        return self._expand(None, None, self.parent >= 0, None)

    @property
    def runs(self) -> tuple[Tensor, Tensor]:
        """The path of each rollout from root to leaf: ``offsets [R + 1]`` and ``nodes [offsets[-1]]``."""
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

    def _expand(self, mask: Tensor | None, body: Tensor | None, head: Tensor | None, row: Tensor | None) -> Tensor:
        given = next(x for x in (body, head, row) if x is not None)
        return torch.ops.tokcredit.expand(
            self.batch.tokens,
            given.dtype,
            self.batch.begin,
            self.batch.end,
            mask,
            row,
            self.leaf,
            self.parent,
            self.depth,
            body,
            head,
            ops.num_threads(),
        )


def build(batch: Rollouts) -> PrefixTree:
    """The prefix trees of all groups.

    Rows are compared by token id up to their own end, masked tokens included; equal rows share their leaf, and a row
    that is a prefix of another ends at an inner node. Linear in the shared prefixes.
    """
    arrays = torch.ops.tokcredit.tree_build(
        batch.tokens, batch.begin, batch.end, batch.group_index, batch.num_groups, ops.num_threads()
    )
    return PrefixTree(batch, *arrays)
