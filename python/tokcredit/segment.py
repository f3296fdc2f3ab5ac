"""Reductions over rows, groups, tree nodes or any ids, with masks.

``by`` says what belongs together: :class:`~tokcredit.ops.Rows` for the tokens of each row (``x`` is ``[N]``, the result
``[R]``), or :class:`Ids` for any grouping of any elements (``x`` is ``[M]``, the result ``[segments]``).

Masked elements are not read. Results are float32, or float64 when ``x`` is; accumulation is in float64, in an order
that does not depend on the number of threads. ``sum``, ``mean`` and ``logsumexp`` have gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.ops import Rows


class Ids(NamedTuple):
    """Element i belongs to segment ``ids[i]`` (int64 ``[M]``) of ``segments``; ids out of range belong to none."""

    ids: Tensor
    segments: int
    mask: Tensor | None = None


def _reduce(name: str, x: Tensor, by: Rows | Ids, ddof: float = 0.0) -> Tensor:
    if not x.dtype.is_floating_point and not (name == "count" and isinstance(by, Rows)):
        x = x.float()
    kind = ops.REDUCTIONS.index(name)
    if isinstance(by, Rows):
        return torch.ops.tokcredit.segment_rows(x, *by, kind, ddof, ops.num_threads())
    return torch.ops.tokcredit.segment_ids(x, by.ids, by.mask, by.segments, kind, ddof)


def _back(per_segment: Tensor, by: Rows | Ids, like: Tensor) -> Tensor:
    """Each element's own segment's number, 0 for elements that belong to none."""
    if isinstance(by, Rows):
        return ops.spread(per_segment, by, like)
    inside = (by.ids >= 0) & (by.ids < by.segments)
    if by.mask is not None:
        inside = inside & by.mask
    if by.segments == 0:
        return per_segment.new_zeros(by.ids.shape)
    return torch.where(inside, per_segment[by.ids.clamp(0, by.segments - 1)], 0)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Rows | Ids) -> Tensor:
        ctx.by, ctx.dtype = by, x.dtype
        ctx.save_for_backward(x)
        return _reduce("sum", x, by)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _back(grad.contiguous(), ctx.by, x).to(ctx.dtype), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Rows | Ids) -> Tensor:
        y = _reduce("logsumexp", x, by)
        ctx.by = by
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        finite = torch.where(y.isfinite(), y, 0)
        weight = _back(grad.contiguous(), ctx.by, x)
        share = torch.where(weight != 0, (x - _back(finite, ctx.by, x)).exp(), 0)
        return (weight * share).to(x.dtype), None


def sum(x: Tensor, by: Rows | Ids) -> Tensor:
    """Sum; 0 of nothing."""
    return _Sum.apply(x, by) if x.requires_grad else _reduce("sum", x, by)


def count(x: Tensor, by: Rows | Ids) -> Tensor:
    """Number of unmasked elements, as a float."""
    return _reduce("count", x, by)


def mean(x: Tensor, by: Rows | Ids) -> Tensor:
    """Mean; 0 of nothing."""
    if x.requires_grad:
        return sum(x, by) / count(x.detach(), by).clamp(min=1)
    return _reduce("mean", x, by)


def var(x: Tensor, by: Rows | Ids, ddof: float = 1.0) -> Tensor:
    """Variance with ``ddof`` degrees of freedom taken off; 0 of ``ddof`` elements or fewer."""
    return _reduce("var", x, by, ddof)


def minimum(x: Tensor, by: Rows | Ids) -> Tensor:
    """Smallest element; +inf of nothing, NaN if one is NaN."""
    return _reduce("minimum", x, by)


def maximum(x: Tensor, by: Rows | Ids) -> Tensor:
    """Largest element; -inf of nothing, NaN if one is NaN."""
    return _reduce("maximum", x, by)


def logsumexp(x: Tensor, by: Rows | Ids) -> Tensor:
    """``log(sum(exp(x)))``; -inf of nothing."""
    return _LogSumExp.apply(x, by) if x.requires_grad else _reduce("logsumexp", x, by)


def pieces(marks: Tensor, rows: Rows, after: bool = False) -> tuple[Ids, Tensor]:
    """Every row cut before (or ``after``) each marked token.

    A row with k marks has k + 1 pieces, of which the first, or with ``after`` the last, may be empty.

    Args:
        marks: bool ``[N]``; not read where masked.
        rows: the spans and the mask.
        after: a marked token ends its piece, in place of beginning one.

    Returns:
        the piece of each token, and int64 ``[R + 1]``, the number of each row's first piece.
    """
    count, total = ops.scan(marks.float(), rows, exclusive=after)
    offsets = torch.cat([total.new_zeros(1), total + 1]).long().cumsum(0)
    first = ops.spread(offsets[:-1], rows, marks)
    ids = first + count.long()
    inside = ops.spread(torch.ones_like(rows.begin, dtype=torch.bool), rows, marks)
    return Ids(torch.where(inside, ids, -1), int(offsets[-1])), offsets
