"""Rows that share prefixes, packed on their prefix tree: contract in ``csrc/ops/tree_pack.hpp``.

The sizes of the results depend on the tokens, and a plan is made on the host, so this is no operation of torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import num_threads, result
from tokcredit.spans import Spans


@dataclass(frozen=True, eq=False)
class TreePackArrays:
    """The results in the order of the contract; all lie on the host.

    Attributes:
        tokens: int32 or int64 ``[M]``.
        segment_begin: int64 ``[S + 1]``.
        segment_parent: int64 ``[S]``.
        segment_end: int64 ``[S]``.
        segment_depth: int64 ``[S]``.
        source: int32 ``[Q]``.
        target: int64 ``[Q]``.
        index: int32 ``[N]``.
        row_order: int64 ``[packed]``.
        row_shared: int64 ``[packed]``.
        row_bin: int32 ``[R]``.
        row_length: int64 ``[R]``.
        bin_places: int64 ``[B + 1]``.
        bin_predictions: int64 ``[B + 1]``.
        bin_rows: int64 ``[B + 1]``.
    """

    tokens: Tensor
    segment_begin: Tensor
    segment_parent: Tensor
    segment_end: Tensor
    segment_depth: Tensor
    source: Tensor
    target: Tensor
    index: Tensor
    row_order: Tensor
    row_shared: Tensor
    row_bin: Tensor
    row_length: Tensor
    bin_places: Tensor
    bin_predictions: Tensor
    bin_rows: Tensor


def tree_pack(
    tokens: Tensor,
    spans: Spans,
    contexts: Tensor,
    context_begin: Tensor,
    context_end: Tensor,
    tags: Tensor | None,
    context_tags: Tensor | None,
    group: Tensor,
    groups: int,
    together: Tensor | None,
    budget: int,
    predictions: int,
    bin_cost: int,
    ranks: int,
) -> TreePackArrays:
    """Return the arrays of a plan; see ``csrc/ops/tree_pack.hpp``.

    Args:
        tokens: int32 or int64 ``[N]``, on the host as all others.
        spans: The rows; their mask says which tokens are wanted.
        contexts: Of the dtype of the tokens, ``[C]``.
        context_begin: int64 ``[R]``.
        context_end: int64 ``[R]``.
        tags: int64 ``[N]`` or None.
        context_tags: int64 ``[C]``, or None together with ``tags``.
        group: int64 ``[R]``, in ``[0, groups)``; no result depends on it.
        groups: Number of groups.
        together: int64 ``[R]`` or None.
        budget: Most places of a bin.
        predictions: Most predictions of a bin.
        bin_cost: What one more bin costs, in places.
        ranks: Number of ranks.

    Raises:
        ValueError: A row does not fit, or nothing predicts a wanted token.
    """

    def allocate(size: int, dtype: str) -> Tensor:
        return result(spans.begin, (size,), getattr(torch, dtype))

    return TreePackArrays(
        *_C.tree_pack(
            tokens,
            *spans.arrays,
            contexts,
            context_begin,
            context_end,
            tags,
            context_tags,
            group,
            groups,
            together,
            budget,
            predictions,
            bin_cost,
            ranks,
            num_threads(),
            allocate,
        )
    )
