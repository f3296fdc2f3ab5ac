"""Reductions over rows and ids: contract in ``csrc/ops/segment.hpp``."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import accumulated, num_threads, operation, plain, result
from tokcredit.spans import Spans

REDUCTIONS: tuple[str, ...] = _C.REDUCTIONS
STANDARDS: tuple[str, ...] = _C.STANDARDS
MOMENTS: tuple[str, ...] = _C.MOMENTS
_MOMENTS, _COUNT = REDUCTIONS.index("moments"), REDUCTIONS.index("count")


def _outputs(x: Tensor, segments: int, reduction: int) -> Tensor:
    if reduction == _MOMENTS:
        return result(x, (segments, len(MOMENTS)), torch.float64)
    return result(x, (segments,), torch.int64 if reduction == _COUNT else accumulated(x.dtype))


def _segment_rows_output(
    x: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, reduction: int, ddof: float, threads: int
) -> Tensor:
    return _outputs(x, begin.shape[0], reduction)


@operation(
    "segment_rows(Tensor x, Tensor begin, Tensor end, Tensor? mask, int reduction, float ddof, int threads) -> Tensor",
    _segment_rows_output,
)
def segment_rows(
    x: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, reduction: int, ddof: float, threads: int
) -> Tensor:
    """Return the reduction of each row, ``[R]``, or of moments ``[R, 5]``; see ``csrc/ops/segment.hpp``."""
    y = _segment_rows_output(x, begin, end, mask, reduction, ddof, threads)
    if begin.numel():
        _C.segment_rows(x.contiguous(), begin, end, plain(mask), reduction, ddof, y, threads)
    return y


def _weighted_moments_output(
    x: Tensor, weights: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, ddof: float
) -> Tensor:
    return result(x, (begin.shape[0], len(MOMENTS)), torch.float64)


@operation(
    "weighted_moments(Tensor x, Tensor weights, Tensor begin, Tensor end, Tensor? mask, float ddof) -> Tensor",
    _weighted_moments_output,
)
def weighted_moments(
    x: Tensor, weights: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, ddof: float
) -> Tensor:
    """Return the moments of each row whose tokens have weights, float64 ``[R, 5]``; see ``csrc/ops/segment.hpp``."""
    y = _weighted_moments_output(x, weights, begin, end, mask, ddof)
    if begin.numel():
        _C.weighted_moments(x.contiguous(), weights.contiguous(), begin, end, plain(mask), ddof, y)
    return y


def _segment_ids_output(
    x: Tensor, ids: Tensor, mask: Tensor | None, segments: int, reduction: int, ddof: float
) -> Tensor:
    return _outputs(x, segments, reduction)


@operation(
    "segment_ids(Tensor x, Tensor ids, Tensor? mask, int segments, int reduction, float ddof) -> Tensor",
    _segment_ids_output,
)
def segment_ids(x: Tensor, ids: Tensor, mask: Tensor | None, segments: int, reduction: int, ddof: float) -> Tensor:
    """Return the reduction of each segment; see ``csrc/ops/segment.hpp``."""
    y = _segment_ids_output(x, ids, mask, segments, reduction, ddof)
    if segments:
        _C.segment_ids(x.contiguous(), ids.contiguous(), plain(mask), reduction, ddof, y)
    return y


def _standardize_output(
    x: Tensor, group: Tensor, moments: Tensor, standard: int, epsilon: float, dtype: torch.dtype
) -> Tensor:
    return result(x, x.shape, dtype)


@operation(
    "standardize(Tensor x, Tensor group, Tensor moments, int standard, float epsilon, ScalarType dtype) -> Tensor",
    _standardize_output,
)
def standardize(x: Tensor, group: Tensor, moments: Tensor, standard: int, epsilon: float, dtype: torch.dtype) -> Tensor:
    """Return numbers held against the moments of their groups, ``[M]``; see ``csrc/ops/segment.hpp``."""
    y = _standardize_output(x, group, moments, standard, epsilon, dtype)
    if x.numel():
        _C.standardize(x.contiguous(), group, moments, standard, epsilon, y)
    return y


def _row_affine_output(
    x: Tensor,
    factor: Tensor,
    shift: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    low: float,
    high: float,
    dtype: torch.dtype,
    threads: int,
) -> Tensor:
    return result(x, x.shape, dtype)


@operation(
    "row_affine(Tensor x, Tensor factor, Tensor shift, Tensor begin, Tensor end, Tensor? mask, float low, float high, "
    "ScalarType dtype, int threads) -> Tensor",
    _row_affine_output,
)
def _row_affine(
    x: Tensor,
    factor: Tensor,
    shift: Tensor,
    begin: Tensor,
    end: Tensor,
    mask: Tensor | None,
    low: float,
    high: float,
    dtype: torch.dtype,
    threads: int,
) -> Tensor:
    y = _row_affine_output(x, factor, shift, begin, end, mask, low, high, dtype, threads)
    if begin.numel() == 0:
        return y.zero_()
    of_rows = (factor.double().contiguous(), shift.double().contiguous())
    _C.row_affine(x.contiguous(), *of_rows, begin, end, plain(mask), low, high, y, threads)
    return y


def row_affine(x: Tensor, factor: Tensor, shift: Tensor, spans: Spans, dtype: torch.dtype | None = None) -> Tensor:
    """Return ``factor * x + shift`` of each row at its unmasked tokens and 0 elsewhere, ``[N]``, computed in float64.

    Args:
        x: float ``[N]``.
        factor: float ``[R]``, or 0-d for all rows.
        shift: float, of the shape of ``factor``.
        spans: The rows.
        dtype: float32 or float64, of the result; that in which ``x`` is accumulated if None.
    """
    x = x.to(accumulated(x.dtype))
    return _row_affine(x, factor, shift, *spans.arrays, 0.0, 0.0, dtype or x.dtype, num_threads())


def row_between(x: Tensor, factor: Tensor, shift: Tensor, spans: Spans, low: float = -inf, high: float = inf) -> Tensor:
    """Return the unmasked tokens at which ``low < factor * x + shift < high``, bool ``[N]``; False where it is NaN.

    Args:
        x: float ``[N]``.
        factor: float ``[R]``, or 0-d for all rows.
        shift: float, of the shape of ``factor``.
        spans: The rows.
        low: Lower bound.
        high: Upper bound.
    """
    x = x.to(accumulated(x.dtype))
    return _row_affine(x, factor, shift, *spans.arrays, low, high, torch.bool, num_threads())


def count(spans: Spans) -> Tensor:
    """Return the number of unmasked tokens of each row, int64 ``[R]``.

    Args:
        spans: The rows.
    """
    if spans.mask is None:
        return spans.lengths
    counts: Tensor = segment_rows(spans.mask, *spans.arrays, _COUNT, 0.0, num_threads())
    return counts
