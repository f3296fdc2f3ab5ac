"""Prefix trees of groups, and what is spread over them: contract in ``csrc/ops/tree.hpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import num_threads, operation, plain, result
from tokcredit.spans import Spans


def _tree_outputs(tokens: Tensor, begin: Tensor, *others: Any) -> tuple[Tensor, ...]:
    rows = begin.shape[0]
    nodes = [begin.new_empty(2 * rows) for _ in range(6)]
    return begin.new_empty(rows), *nodes, begin.new_empty(()) if rows else begin.new_zeros(())


@operation(
    "tree_build(Tensor tokens, Tensor begin, Tensor end, Tensor group, int groups, int threads) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _tree_outputs,
)
def _tree_build(
    tokens: Tensor, begin: Tensor, end: Tensor, group: Tensor, groups: int, threads: int
) -> tuple[Tensor, ...]:
    outputs = _tree_outputs(tokens, begin)
    if begin.numel():
        leaf, parent, group_of, depth, length, count, degree, size = outputs
        nodes = (parent, group_of, depth, length, count, degree)
        _C.tree_build(tokens.contiguous(), begin, end, group.contiguous(), groups, leaf, *nodes, size, threads)
    return outputs


def tree_build(tokens: Tensor, spans: Spans, group: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Return the arrays of the prefix trees: leaf, parent, group, depth, length, count, degree, size.

    Args:
        tokens: int32 or int64 ``[N]``.
        spans: The rows; their mask is not read.
        group: int64 ``[R]``, in ``[0, groups)``.
        groups: Number of groups.
    """
    return _tree_build(tokens, spans.begin, spans.end, group, groups, num_threads())


def _fold_output(leaf: Tensor, parent: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(parent.shape)


@operation("tree_fold(Tensor leaf, Tensor parent, Tensor? scale, Tensor x) -> Tensor", _fold_output)
def _fold(leaf: Tensor, parent: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    y = _fold_output(leaf, parent, scale, x)
    if x.numel():
        _C.tree_fold(leaf, parent, plain(scale), x.contiguous(), y)
    return y


def tree_fold(leaf: Tensor, parent: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """Return sums from the leaves to the roots, float ``[V]``; see ``csrc/ops/tree.hpp``.

    Args:
        leaf: int64 ``[M]``, the node at which each number enters.
        parent: int64 ``[V]``, -1 at a root, else a node before the child.
        scale: float ``[V]``, multiplies what a node hands to its parent, or None for 1.
        x: float ``[M]``.
    """
    return _fold(leaf, parent, scale, x)


def _mean_output(leaf: Tensor, parent: Tensor, counts: Tensor | None, x: Tensor, change: bool) -> Tensor:
    return x.new_empty(parent.shape)


@operation("tree_mean(Tensor leaf, Tensor parent, Tensor? counts, Tensor x, bool change) -> Tensor", _mean_output)
def tree_mean(leaf: Tensor, parent: Tensor, counts: Tensor | None, x: Tensor, change: bool) -> Tensor:
    """Return the mean over the rows through each node that count, ``[V]``; see ``csrc/ops/tree.hpp``."""
    y = _mean_output(leaf, parent, counts, x, change)
    if x.numel():
        _C.tree_mean(leaf, parent, plain(counts), x.contiguous(), change, y)
    return y


def _expand_output(
    begin: Tensor, end: Tensor, mask: Tensor | None, size: int, dtype: torch.dtype, *others: Any
) -> Tensor:
    return result(begin, (size,), dtype)


@operation(
    "expand(Tensor begin, Tensor end, Tensor? mask, SymInt size, ScalarType dtype, Tensor? row, Tensor? leaf, "
    "Tensor? parent, Tensor? depth, Tensor? body, Tensor? head, int threads) -> Tensor",
    _expand_output,
)
def _expand(
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    size: int,
    dtype: torch.dtype,
    row: Tensor | None,
    leaf: Tensor | None,
    parent: Tensor | None,
    depth: Tensor | None,
    body: Tensor | None,
    head: Tensor | None,
    threads: int,
) -> Tensor:
    y = _expand_output(begin, end, mask, size, dtype)
    if begin.numel() == 0:
        return y.zero_()
    _C.expand(begin, end, plain(mask), plain(row), leaf, parent, depth, plain(body), plain(head), y, threads)
    return y


def expand(
    spans: Spans,
    dtype: torch.dtype,
    leaf: Tensor,
    parent: Tensor,
    depth: Tensor,
    row: Tensor | None,
    body: Tensor | None,
    head: Tensor | None,
) -> Tensor:
    """Return numbers of rows and nodes at their tokens, ``[N]``; see ``csrc/ops/tree.hpp``.

    Args:
        spans: The rows.
        dtype: dtype of the numbers and of the result.
        leaf: int64 ``[R]``.
        parent: int64 ``[V]``.
        depth: int64 ``[V]``.
        row: ``[R]`` or None.
        body: ``[V]`` or None.
        head: ``[V]`` or None.
    """
    return _expand(*spans.arrays, spans.size, dtype, row, leaf, parent, depth, body, head, num_threads())


def spread(row: Tensor, spans: Spans) -> Tensor:
    """Return each row's number at each of its unmasked tokens and 0 elsewhere, ``[N]``.

    Args:
        row: float, int64 or bool ``[R]``; half precision becomes float32.
        spans: The rows.
    """
    if row.dtype not in (torch.float32, torch.float64, torch.int64, torch.bool):
        row = row.float()
    return _expand(*spans.arrays, spans.size, row.dtype, row, None, None, None, None, None, num_threads())
