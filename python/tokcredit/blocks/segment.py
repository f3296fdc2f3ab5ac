"""Reductions over rows, groups or any ids, with masks: sum, mean, variance, minimum, maximum, count, logsumexp.

The argument ``by`` says which elements belong together:

- :class:`~tokcredit.Spans`: the tokens of each row; ``x`` is ``[N]``, the result ``[R]``.
- :class:`~tokcredit.groups.Groups`, for example ``batch.groups``: the rows of each group; ``x`` is ``[R]``.
- :class:`Ids`: any segments; ``x`` is ``[M]``, the result ``[segments]``.

Masked elements are not read. Results are float32, or float64 when ``x`` is. Sums are accumulated in float64 in an order
that does not depend on the number of threads. ``sum``, ``mean`` and ``logsumexp`` have gradients.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.arguments import FLOATS, INTEGERS, describe, float_tensor, instance, per_token, tensor
from tokcredit.groups import Groups
from tokcredit.spans import Spans, require_spans


class Ids(NamedTuple):
    """Segments by number: element i belongs to segment ``ids[i]``.

    Attributes:
        ids: int64 ``[M]``; a number outside ``[0, segments)`` belongs to no segment.
        segments: Number of segments.
        mask: bool ``[M]``, or None for all True.
    """

    ids: Tensor
    segments: int
    mask: Tensor | None = None


By = Spans | Groups | Ids


def _length(by: By) -> int:
    if isinstance(by, Spans):
        return by.size
    if isinstance(by, Groups):
        return by.spans.size
    if isinstance(by, Ids):
        return by.ids.numel()
    raise TypeError(f"by: expected Spans, Groups or segment.Ids, got {type(by).__name__}")


def _differentiable(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


def _reduce(name: str, x: Tensor, by: By, ddof: float = 0.0) -> Tensor:
    size = _length(by)
    if not isinstance(x, Tensor) or tuple(x.shape) != (size,):
        raise ValueError(f"x: expected [{size}], got {describe(x)}")
    if x.dtype.is_complex or x.layout != torch.strided:
        raise TypeError(f"x: expected float [{size}], got {describe(x)}, layout {x.layout}")
    if x.dtype not in FLOATS:
        x = x.double() if x.dtype == torch.int64 else x.float()
    kind = ops.REDUCTIONS.index(name)
    if isinstance(by, Ids):
        tensor("ids", by.ids, (torch.int64,), (size,), x.device)
        return ops.segment_ids(x, by.ids, by.mask, by.segments, kind, ddof)
    if isinstance(by, Groups):
        x, by = by.sorted(x), by.spans
    return ops.segment_rows(x, *by.arrays, kind, ddof, ops.num_threads())


def _to_elements(per_segment: Tensor, by: By) -> Tensor:
    """Return each element's own segment's number, and 0 for elements that belong to none."""
    if isinstance(by, Spans):
        return ops.spread(per_segment, by)
    if isinstance(by, Groups):
        by = Ids(by.index, by.count)
    inside = (by.ids >= 0) & (by.ids < by.segments)
    if by.mask is not None:
        inside = inside & by.mask
    if by.segments == 0:
        return per_segment.new_zeros(by.ids.shape)
    return torch.where(inside, per_segment[by.ids.clamp(0, by.segments - 1)], 0)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: By) -> Tensor:
        ctx.by, ctx.dtype = by, x.dtype
        return _reduce("sum", x, by)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_elements(grad.contiguous(), ctx.by).to(ctx.dtype), None


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, by: By) -> Tensor:
        y = _reduce("logsumexp", x, by)
        ctx.by = by
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y = ctx.saved_tensors
        finite = torch.where(y.isfinite(), y, 0)
        weight = _to_elements(grad.contiguous(), ctx.by)
        share = torch.where(weight != 0, (x - _to_elements(finite, ctx.by)).exp(), 0)
        return (weight * share).to(x.dtype), None


def sum(x: Tensor, by: By) -> Tensor:
    """Return the sum of each segment; 0 for an empty one.

    Args:
        x: float, or integers that are converted, ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
    """
    return _Sum.apply(x, by) if _differentiable(x) else _reduce("sum", x, by)


def weighted_sum(x: Tensor, spans: Spans, weights: Tensor | None = None, total: bool = False) -> Tensor:
    """Return the weighted sum of each row, ``sum over t of weights[t] * x[t]``, with its gradient to ``x``.

    Unlike the gradient of ``(weights * x).sum()``, NaN in ``x`` at an unmasked token gives a NaN gradient there, and
    NaN at a masked token gives 0.

    Args:
        x: float ``[N]``.
        spans: The rows.
        weights: float ``[N]`` per token, ``[R, 1]`` per row or 0-d, without gradient; or None for 1.
        total: Whether to return the sum over all rows.

    Returns:
        float ``[R]``, or 0-d with ``total``.

    Raises:
        TypeError: ``x`` or ``weights`` is not a float tensor.
    """
    require_spans("spans", spans)
    per_token("x", x, spans.size, spans.device)
    if weights is not None:
        float_tensor("weights", weights)
    zero = torch.zeros_like(x, requires_grad=False)
    return ops.policy_loss(x, spans, "k1", reference=zero, weights=weights, total=total)[0]


def count(by: By) -> Tensor:
    """Return the number of unmasked elements of each segment, int64.

    Args:
        by: What belongs together; see the module.
    """
    if isinstance(by, Spans):
        return ops.count(by)
    if isinstance(by, Groups):
        return by.counts
    _length(by)
    ones = torch.ones(by.ids.shape, dtype=torch.float64, device=by.ids.device)
    return _reduce("count", ones, by)


def mean(x: Tensor, by: By) -> Tensor:
    """Return the mean of each segment; 0 for an empty one.

    Args:
        x: float ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
    """
    if _differentiable(x):
        total = sum(x, by)
        return total / count(by).clamp(min=1).to(total.dtype)
    return _reduce("mean", x, by)


def var(x: Tensor, by: By, ddof: float = 1.0) -> Tensor:
    """Return the variance of each segment, without gradient; 0 where there are ``ddof`` elements or fewer.

    The variance of equal numbers is exactly 0.

    Args:
        x: float ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
        ddof: Subtracted from the number of elements: 1 for the sample variance, 0 for the population variance.
    """
    return _reduce("var", x, by, ddof)


class Moments(NamedTuple):
    """Statistics of each segment, float64.

    Attributes:
        size: Number of unmasked elements.
        mean: Mean; 0 of an empty segment, and exactly the value of equal numbers.
        var: Variance; exactly 0 of equal numbers, and 0 where there are ``ddof`` elements or fewer.
        minimum: Smallest element; +inf of an empty segment.
        maximum: Largest element; -inf of an empty segment.
    """

    size: Tensor
    mean: Tensor
    var: Tensor
    minimum: Tensor
    maximum: Tensor


def moments(x: Tensor, by: By, ddof: float = 1.0) -> Moments:
    """Return count, mean, variance, minimum and maximum of each segment, without gradient.

    They are computed in one pass in float64.

    Args:
        x: float ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
        ddof: Subtracted from the number of elements in the variance.
    """
    return Moments(*moment_table(x, by, ddof).unbind(1))


def moment_table(x: Tensor, by: By, ddof: float = 1.0, weights: Tensor | None = None) -> Tensor:
    """Return the moments of each segment as one tensor, float64 ``[segments, 5]``, without gradient.

    The columns are those of :class:`Moments`.

    Args:
        x: float ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
        ddof: Subtracted from the number of elements in the variance.
        weights: How often each element counts, float of the shape of ``x``, or None for once. An element whose weight
            is not above 0 does not count. Only for ``Spans`` and ``Groups``.

    Raises:
        TypeError: ``weights`` are given for ``Ids``.
    """
    if weights is not None:
        return _weighted_moments(float_tensor("x", x), by, ddof, weights)
    return _reduce("moments", float_tensor("x", x), by, ddof)


def _weighted_moments(x: Tensor, by: By, ddof: float, weights: Tensor) -> Tensor:
    if isinstance(by, Ids):
        raise TypeError("weights: expected None for segment.Ids, got weights; use Spans or Groups")
    size = _length(by)
    tensor("x", x, FLOATS, (size,))
    weights = tensor("weights", weights, FLOATS, (size,), x.device).double()
    x = x if x.dtype == torch.float64 else x.float()
    if isinstance(by, Groups):
        x, weights, by = by.sorted(x), by.sorted(weights), by.spans
    return ops.weighted_moments(x, weights, *by.arrays, ddof)


def standardize(
    x: Tensor,
    group: Tensor,
    moments: Tensor,
    standard: str = "normalized",
    epsilon: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return numbers relative to the mean ``m`` and the standard deviation ``s`` of their groups of size ``n``.

    ====================  =======================
    ``standard``          result
    ====================  =======================
    ``"centred"``         ``x - m``
    ``"normalized"``      ``(x - m) / (s + epsilon)``
    ``"scaled"``          ``x / (s + epsilon)``
    ``"leave_one_out"``   ``(x - m) * n / (n - 1)``
    ====================  =======================

    In a group of fewer than two rows ``m`` is 0, ``s`` is 1, and ``"leave_one_out"`` gives 0. A numerator of 0 gives 0
    whatever it is divided by. Computed in float64, without gradient.

    Args:
        x: float32 or float64 ``[M]``.
        group: int64 ``[M]``, the group of each number, for example ``batch.groups.index``.
        moments: float64 ``[groups, 5]``, from :func:`moment_table`.
        standard: Which result.
        epsilon: Added to the standard deviation.
        dtype: float32 or float64, of the result; that of ``x`` if None.

    Returns:
        float ``[M]``.

    Raises:
        TypeError: A tensor or ``dtype`` has the wrong dtype.
        ValueError: ``standard`` is unknown, a shape is wrong, or a group is out of range.
    """
    if standard not in ops.STANDARDS:
        raise ValueError(f"standard: expected one of {', '.join(ops.STANDARDS)}, got {standard!r}")
    instance("x", x, Tensor)
    for name, found in (("group", group), ("moments", moments)):
        instance(name, found, Tensor)
    if dtype not in (None, torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32, torch.float64 or None, got {dtype!r}")
    return ops.standardize(x, group, moments, ops.STANDARDS.index(standard), epsilon, dtype or x.dtype)


def minimum(x: Tensor, by: By) -> Tensor:
    """Return the smallest element of each segment, without gradient; +inf for an empty one, NaN if an element is NaN.

    Args:
        x: float ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
    """
    return _reduce("minimum", x, by)


def maximum(x: Tensor, by: By) -> Tensor:
    """Return the largest element of each segment, without gradient; -inf for an empty one, NaN if an element is NaN.

    Args:
        x: float ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
    """
    return _reduce("maximum", x, by)


def logsumexp(x: Tensor, by: By) -> Tensor:
    """Return ``log(sum(exp(x)))`` of each segment; -inf for an empty one.

    Args:
        x: float ``[N]``, ``[R]`` or ``[M]``.
        by: What belongs together; see the module.
    """
    return _LogSumExp.apply(x, by) if _differentiable(x) else _reduce("logsumexp", x, by)


def keys(*ids: Tensor) -> Ids:
    """Return dense segments of elements that agree in every one of some ids, for example turn within group.

    On CUDA this waits for the device.

    Args:
        ids: Integers ``[M]`` each, at least one. An element with a negative id belongs to no segment.

    Returns:
        Segments numbered in ascending order of the ids, the first one most significant.

    Raises:
        ValueError: No ids, or ids of different shapes.
    """
    if not ids:
        raise ValueError("ids: expected at least one tensor of ids, got none")
    for x in ids:
        instance("ids", x, Tensor)
        tensor("ids", x, INTEGERS, (ids[0].numel(),), ids[0].device)
    combined = torch.stack([x.long() for x in ids])
    inside = (combined >= 0).all(0)
    # Dense numbers are below M, so that the product of two of them cannot overflow.
    count, index = 1, torch.zeros_like(combined[0, inside])
    for x in combined:
        names, own = torch.unique(x[inside], return_inverse=True)
        names, index = torch.unique(index * names.numel() + own, return_inverse=True)
        count = names.numel()
    dense = torch.full_like(combined[0], -1)
    dense[inside] = index
    return Ids(dense, count)


class Pieces(NamedTuple):
    """Rows cut into pieces.

    Attributes:
        spans: Spans of the P pieces, with the mask of the rows.
        offsets: int64 ``[R + 1]``, the number of each row's first piece.
        row: int64 ``[P]``, the row of each piece.
        at: int64 ``[P]``, the marked token that the piece begins, or ends, with; -1 where there is none.
    """

    spans: Spans
    offsets: Tensor
    row: Tensor
    at: Tensor

    @property
    def marked(self) -> Tensor:
        """The pieces that begin, or end, with a marked token; bool ``[P]``."""
        return self.at >= 0

    def take(self, x: Tensor) -> Tensor:
        """Return the numbers of the marked tokens, one per piece, and 0 for the other pieces.

        Args:
            x: ``[N]``.

        Returns:
            ``[P]``.
        """
        if x.numel() == 0:
            return x.new_zeros(self.at.shape)
        return x.index_select(0, self.at.clamp(min=0)).masked_fill_(self.at < 0, 0)

    def of_row(self, mask: Tensor | None = None) -> Spans:
        """Return, for each row, the span of its pieces.

        Args:
            mask: bool ``[P]``, or None for all True.
        """
        return Spans.trusted(self.offsets[:-1], self.offsets[1:], self.at.numel(), mask)


def pieces(marks: Tensor, spans: Spans, after: bool = False) -> Pieces:
    """Cut every row before, or after, each marked token.

    A row with k marks has k + 1 pieces, of which the first, or with ``after`` the last, may be empty and has no marked
    token. On CUDA this waits for the device.

    Args:
        marks: bool ``[N]``. Only those inside of rows count.
        spans: The rows.
        after: A marked token ends its piece instead of beginning one.
    """
    require_spans("spans", spans)
    tensor("marks", marks, (torch.bool,), (spans.size,), spans.device)
    return _cut(marks, spans, "after" if after else "before")


def runs(spans: Spans) -> Pieces:
    """Return the maximal runs of unmasked tokens of each row, for example its turns. Each begins with its marked token.

    On CUDA this waits for the device.

    Args:
        spans: The rows. Without a mask each row that has tokens is one run.
    """
    require_spans("spans", spans)
    mask = spans.mask
    if mask is None:
        mask = torch.ones(spans.size, dtype=torch.bool, device=spans.device)
    return _cut(mask, spans, "runs")


def _cut(marks: Tensor, spans: Spans, cut: str) -> Pieces:
    begin, end, row, at, offsets = ops.pieces(marks, spans, cut)
    return Pieces(Spans.trusted(begin, end, spans.size, spans.mask), offsets, row, at)
