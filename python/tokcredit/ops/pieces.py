"""Rows cut into pieces at marked tokens: contract in ``csrc/ops/pieces.hpp``."""

from __future__ import annotations

from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import operation
from tokcredit.spans import Spans

CUTS: tuple[str, ...] = _C.CUTS


def _offsets_output(marks: Tensor, begin: Tensor, end: Tensor, cut: int) -> Tensor:
    return begin.new_empty(begin.shape[0] + 1)


@operation("piece_offsets(Tensor marks, Tensor begin, Tensor end, int cut) -> Tensor", _offsets_output)
def _piece_offsets(marks: Tensor, begin: Tensor, end: Tensor, cut: int) -> Tensor:
    offsets = _offsets_output(marks, begin, end, cut)
    _C.piece_offsets(marks.contiguous(), begin, end, cut, offsets)
    return offsets


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def _pieces_outputs(marks: Tensor, begin: Tensor, end: Tensor, offset: Tensor, cut: int, count: int) -> Four:
    return begin.new_empty(count), begin.new_empty(count), begin.new_empty(count), begin.new_empty(count)


@operation(
    "pieces(Tensor marks, Tensor begin, Tensor end, Tensor offset, int cut, SymInt count) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _pieces_outputs,
)
def _pieces(marks: Tensor, begin: Tensor, end: Tensor, offset: Tensor, cut: int, count: int) -> Four:
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
    offsets = _piece_offsets(marks, spans.begin, spans.end, kind)
    begin, end, row, at = _pieces(marks, spans.begin, spans.end, offsets, kind, int(offsets[-1]))
    return begin, end, row, at, offsets
