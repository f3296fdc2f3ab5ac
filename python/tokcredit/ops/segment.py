"""Reductions over rows and ids: contract in ``csrc/ops/segment.hpp``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import define, impl, register_fake

from tokcredit import _C
from tokcredit.ops.call import DEVICES, accumulated, num_threads, plain
from tokcredit.spans import Spans

REDUCTIONS: tuple[str, ...] = _C.REDUCTIONS
MOMENTS: tuple[str, ...] = _C.MOMENTS
_MOMENTS, _COUNT = REDUCTIONS.index("moments"), REDUCTIONS.index("count")

define(
    "tokcredit::segment_rows",
    "(Tensor x, Tensor begin, Tensor end, Tensor? mask, int reduction, float ddof, int threads) -> Tensor",
)
define(
    "tokcredit::segment_ids",
    "(Tensor x, Tensor ids, Tensor? mask, int segments, int reduction, float ddof) -> Tensor",
)


def _outputs(x: Tensor, segments: int, reduction: int) -> Tensor:
    if reduction == _MOMENTS:
        return x.new_empty((segments, len(MOMENTS)), dtype=torch.float64)
    return x.new_empty((segments,), dtype=accumulated(x.dtype))


@register_fake("tokcredit::segment_rows")
def _segment_rows_output(
    x: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, reduction: int, ddof: float, threads: int
) -> Tensor:
    if reduction == _COUNT:
        return x.new_empty(begin.shape, dtype=torch.float64)
    return _outputs(x, begin.shape[0], reduction)


@impl("tokcredit::segment_rows", DEVICES)
def _segment_rows(
    x: Tensor, begin: Tensor, end: Tensor, mask: Tensor | None, reduction: int, ddof: float, threads: int
) -> Tensor:
    y = _segment_rows_output(x, begin, end, mask, reduction, ddof, threads)
    if begin.numel():
        _C.segment_rows(x.contiguous(), begin, end, plain(mask), reduction, ddof, y, threads)
    return y


@register_fake("tokcredit::segment_ids")
def _segment_ids_output(
    x: Tensor, ids: Tensor, mask: Tensor | None, segments: int, reduction: int, ddof: float
) -> Tensor:
    return _outputs(x, segments, reduction)


@impl("tokcredit::segment_ids", DEVICES)
def _segment_ids(x: Tensor, ids: Tensor, mask: Tensor | None, segments: int, reduction: int, ddof: float) -> Tensor:
    y = _segment_ids_output(x, ids, mask, segments, reduction, ddof)
    if segments:
        _C.segment_ids(x.contiguous(), ids.contiguous(), plain(mask), reduction, ddof, y)
    return y


def count(spans: Spans) -> Tensor:
    """Return the number of unmasked tokens of each row, int64 ``[R]``.

    Args:
        spans: The rows.
    """
    if spans.mask is None:
        return spans.lengths
    counts = torch.ops.tokcredit.segment_rows(spans.mask, *spans.arrays, _COUNT, 0.0, num_threads())
    return counts.long()
