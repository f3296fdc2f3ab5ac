"""Rows cut into pieces at marked tokens: contract in ``csrc/ops/pieces.hpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import operation
from tokcredit.spans import Spans

CUTS: tuple[str, ...] = _C.CUTS


def _counts_output(marks: Tensor, begin: Tensor, end: Tensor, cut: int) -> Tensor:
    return begin.new_empty(begin.shape)


@operation("piece_counts(Tensor marks, Tensor begin, Tensor end, int cut) -> Tensor", _counts_output)
def _piece_counts(marks: Tensor, begin: Tensor, end: Tensor, cut: int) -> Tensor:
    counts = _counts_output(marks, begin, end, cut)
    if begin.numel():
        _C.piece_counts(marks.contiguous(), begin, end, cut, counts)
    return counts


def _pieces_outputs(marks: Tensor, begin: Tensor, end: Tensor, offset: Tensor, cut: int, count: int) -> list[Tensor]:
    return list(begin.new_empty((4, count)).unbind())


@operation(
    "pieces(Tensor marks, Tensor begin, Tensor end, Tensor offset, int cut, SymInt count) -> Tensor[]", _pieces_outputs
)
def _pieces(marks: Tensor, begin: Tensor, end: Tensor, offset: Tensor, cut: int, count: int) -> list[Tensor]:
    outputs = _pieces_outputs(marks, begin, end, offset, cut, count)
    if begin.numel():
        _C.pieces(marks.contiguous(), begin, end, offset, cut, *outputs)
    return outputs


def pieces(marks: Tensor, spans: Spans, cut: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``begin``, ``end``, ``row`` and ``at`` of the pieces ``[P]``, and each row's first ``[R + 1]``.

    Definition: ``csrc/ops/pieces.hpp``. On CUDA this waits for the device.

    Args:
        marks: bool ``[N]``.
        spans: The rows; their mask is not read.
        cut: One of ``CUTS``.
    """
    kind = CUTS.index(cut)
    offsets = spans.begin.new_zeros(spans.num_rows + 1)
    torch.cumsum(_piece_counts(marks, spans.begin, spans.end, kind), 0, out=offsets[1:])
    begin, end, row, at = _pieces(marks, spans.begin, spans.end, offsets[:-1], kind, int(offsets[-1]))
    return begin, end, row, at, offsets
