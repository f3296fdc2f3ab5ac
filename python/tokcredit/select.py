"""Exact selection of tokens and rows: the largest, a quantile, the most varied subset.

A scope is what competes together: each row (``by=None``), the rows of one segment (``by=Ids(group_index, groups)``), or
everything (``by=everything(rows)``). Masked tokens never compete. Any size: ranks are counted in integers, and ties
go to the token that comes first. NaN ranks above +inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import ops, segment
from tokcredit.ops import Rows
from tokcredit.segment import Ids


def everything(rows: Rows) -> Ids:
    """All rows in one scope."""
    return Ids(torch.zeros_like(rows.begin), 1)


def _scopes(rows: Rows, by: Ids | None) -> Ids:
    return by or Ids(torch.arange(rows.begin.numel(), device=rows.begin.device), rows.begin.numel())


def _per_scope(name: str, x: int | Tensor, by: Ids) -> Tensor:
    x = torch.as_tensor(x, device=by.ids.device)
    if x.dtype.is_floating_point or x.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {str(x.dtype).removeprefix('torch.')}")
    if x.dim() and tuple(x.shape) != (by.segments,):
        raise ValueError(f"{name}: expected one number or [{by.segments}], got {list(x.shape)}")
    return x.long().expand(by.segments)


def sizes(rows: Rows, by: Ids | None = None) -> Tensor:
    """Unmasked tokens of each scope; int64."""
    by = _scopes(rows, by)
    tokens = rows.end - rows.begin if rows.mask is None else segment.count(rows.mask, rows)
    return segment.sum(tokens.double(), by).long()


def top_k(score: Tensor, k: int | Tensor, rows: Rows, by: Ids | None = None) -> Tensor:
    """True at the k largest scores of each scope, or at all of them where there are fewer; bool ``[N]``.

    Args:
        score: float ``[N]``.
        k: how many, for all scopes or int64 one per scope.
        rows: the spans and the mask.
        by: scopes of the rows.
    """
    by = _scopes(rows, by)
    wanted = _per_scope("k", k, by)
    return torch.ops.tokcredit.select(score, *rows, by.ids, wanted, False, ops.num_threads())


def kth(x: Tensor, rank: int | Tensor, rows: Rows, by: Ids | None = None) -> Tensor:
    """The value of a rank, counted from 0 at the smallest; NaN where the scope is too small; one per scope."""
    by = _scopes(rows, by)
    wanted = _per_scope("rank", rank, by)
    return torch.ops.tokcredit.select(x, *rows, by.ids, wanted, True, ops.num_threads())


def _check_quantile(q: float) -> None:
    if not 0 <= q <= 1:
        raise ValueError(f"q: expected a number from 0 to 1, got {q}")


def quantile(x: Tensor, q: float, rows: Rows, by: Ids | None = None) -> Tensor:
    """The q-quantile of each scope, interpolated linearly between ranks; NaN of nothing."""
    _check_quantile(q)
    by = _scopes(rows, by)
    place = (sizes(rows, by) - 1).clamp(min=0).double() * q
    below = kth(x, place.floor().long(), rows, by)
    above = kth(x, place.ceil().long(), rows, by)
    return torch.where(below == above, below, below + (above - below) * (place - place.floor()).to(below.dtype))


def quantile_nearest(x: Tensor, q: float, rows: Rows, by: Ids | None = None) -> Tensor:
    """The element of rank ``round(q * (n - 1))`` of each scope, halves to even; NaN of nothing."""
    _check_quantile(q)
    by = _scopes(rows, by)
    place = (sizes(rows, by) - 1).clamp(min=0).double() * q
    return kth(x, place.round().long(), rows, by)


def maximum_variance(x: Tensor, k: int | Tensor, by: Ids | None = None) -> Tensor:
    """True at the k rows of each scope whose values vary most as a set; bool ``[R]``.

    The subset of largest population variance takes the first i and the last k - i in descending order; every i is
    tried, the smallest wins among equals.

    Args:
        x: float ``[R]``, per row.
        k: how many, for all scopes or int64 one per scope; all rows of a smaller scope are taken.
        by: scopes of the rows, one for all by default.

    References:
        arXiv 2504.13818 (the algorithm), 2509.22115 (over groups).
    """
    by = by or Ids(torch.zeros(x.shape, dtype=torch.int64, device=x.device), 1)
    return torch.ops.tokcredit.maximum_variance(x, by.ids, _per_scope("k", k, by))
