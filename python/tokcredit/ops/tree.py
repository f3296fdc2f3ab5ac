"""Prefix trees of groups, and what is spread over them: contract in ``csrc/ops/tree.hpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from tokcredit import _C
from tokcredit.ops.call import DEVICES, Rows, num_threads, plain, result

define(
    "tokcredit::tree_build",
    "(Tensor tokens, Tensor begin, Tensor end, Tensor group, int groups, int threads) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@register_fake("tokcredit::tree_build")
def _tree_outputs(tokens: Tensor, begin: Tensor, *others: Any) -> tuple[Tensor, ...]:
    nodes = [begin.new_empty(2 * begin.shape[0]) for _ in range(6)]
    return begin.new_empty(begin.shape), *nodes, begin.new_zeros(())


@impl("tokcredit::tree_build", DEVICES)
def _tree_build(
    tokens: Tensor, begin: Tensor, end: Tensor, group: Tensor, groups: int, threads: int
) -> tuple[Tensor, ...]:
    outputs = _tree_outputs(tokens, begin)
    if begin.numel():
        _C.tree_build(tokens.contiguous(), begin, end, group.contiguous(), groups, *outputs, threads)
    return outputs


define("tokcredit::tree_fold", "(Tensor leaf, Tensor parent, Tensor? scale, Tensor x) -> Tensor")


@register_fake("tokcredit::tree_fold")
def _fold_output(leaf: Tensor, parent: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    return x.new_empty(parent.shape)


@impl("tokcredit::tree_fold", DEVICES)
def tree_fold(leaf: Tensor, parent: Tensor, scale: Tensor | None, x: Tensor) -> Tensor:
    """Sums from the leaves to the roots, see ``csrc/ops/tree.hpp``."""
    y = _fold_output(leaf, parent, scale, x)
    if x.numel():
        _C.tree_fold(leaf, parent, plain(scale), x.contiguous(), y)
    return y


define(
    "tokcredit::expand",
    "(Tensor like, ScalarType dtype, Tensor begin, Tensor end, Tensor? mask, Tensor? row, Tensor? leaf, "
    "Tensor? parent, Tensor? depth, Tensor? body, Tensor? head, int threads) -> Tensor",
)


@register_fake("tokcredit::expand")
def _expand_output(like: Tensor, dtype: torch.dtype, *others: Any) -> Tensor:
    return result(like, like.shape, dtype)


@impl("tokcredit::expand", DEVICES)
def _expand(
    like: Tensor,
    dtype: torch.dtype,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    row: Tensor | None,
    leaf: Tensor | None,
    parent: Tensor | None,
    depth: Tensor | None,
    body: Tensor | None,
    head: Tensor | None,
    threads: int,
) -> Tensor:
    y = _expand_output(like, dtype)
    if begin.numel() == 0:
        return y.zero_()
    _C.expand(begin, end, plain(mask), plain(row), leaf, parent, depth, plain(body), plain(head), y, threads)
    return y


def spread(row: Tensor, rows: Rows, like: Tensor) -> Tensor:
    """Each row's number at each of its unmasked tokens and 0 elsewhere, in the layout of ``like``."""
    if row.dtype not in (torch.float32, torch.float64, torch.int64, torch.bool):
        row = row.float()
    return torch.ops.tokcredit.expand(like, row.dtype, *rows, row, None, None, None, None, None, num_threads())
