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


def whole(x: Tensor, mask: Tensor | None = None) -> Rows:
    """All of a buffer as one row."""
    begin = torch.zeros(1, dtype=torch.int64, device=x.device)
    return Rows(begin, begin + x.numel(), mask)


class Pieces(NamedTuple):
    """Rows cut into pieces.

    Attributes:
        rows: int64 spans ``[P]`` of the pieces, and the mask of the rows.
        offsets: int64 ``[R + 1]``, the number of each row's first piece.
        marked: bool ``[P]``, the pieces that begin, or end, with a marked token: all but one of each row.
        at: int64, where the marked tokens are.
    """

    rows: Rows
    offsets: Tensor
    marked: Tensor
    at: Tensor

    def take(self, x: Tensor) -> Tensor:
        """Of per-token numbers ``[N]`` those of the marked tokens, and 0 for the other pieces; ``[P]``."""
        return x.new_zeros(self.marked.shape).masked_scatter_(self.marked, x.index_select(0, self.at))

    def of_row(self, mask: Tensor | None = None) -> Rows:
        """The pieces of each row, as a row of them; ``mask`` is bool ``[P]``."""
        return Rows(self.offsets[:-1], self.offsets[1:], mask)


def pieces(marks: Tensor, rows: Rows, after: bool = False) -> Pieces:
    """Every row cut before (or ``after``) each marked token.

    A row with k marks has k + 1 pieces, of which the first, or with ``after`` the last, may be empty.

    Args:
        marks: bool ``[N]``, of unmasked tokens only.
        rows: the spans and the mask.
        after: a marked token ends its piece, in place of beginning one.
    """
    at = marks.nonzero()[:, 0]
    total = ops.count(Rows(rows.begin, rows.end, marks), marks).long() + 1
    offsets = torch.cat([total.new_zeros(1), total.cumsum(0)])
    marked = marks.new_ones(at.numel() + total.numel()).index_fill_(0, offsets[:-1], False)
    begin = at.new_empty(marked.shape).index_copy_(0, offsets[:-1], rows.begin)
    begin.masked_scatter_(marked, at + after)
    end = begin.roll(-1).index_copy_(0, offsets[1:] - 1, rows.end)
    if after:
        marked = marked.roll(-1)
    return Pieces(Rows(begin, end, rows.mask), offsets, marked, at)
