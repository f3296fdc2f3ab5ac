"""Turns: the decision tokens of one model call, in order along a trajectory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.spans import Spans


class Turns(NamedTuple):
    """Rows cut into turns.

    Attributes:
        spans: Spans of the P turns, with the mask of the rows.
        row: int64 ``[P]``, the row of each turn.
        number: int64 ``[P]``, number of each turn in its row, from 0.
        first: int64 ``[P]``, first token of each turn that the policy chose.
        last: int64 ``[P]``, last token of each turn that the policy chose.
        counts: int64 ``[R]``, turns of each row.
    """

    spans: Spans
    row: Tensor
    number: Tensor
    first: Tensor
    last: Tensor
    counts: Tensor

    @classmethod
    def of(cls, spans: Spans, names: Tensor) -> Turns:
        """Return the turns of rows. On CUDA this waits for the device.

        Args:
            spans: The rows, with the mask of the tokens that the policy chose.
            names: Integers ``[N]``, the same at the tokens of a turn, and ascending from turn to turn. Only tokens that
                the policy chose are read.

        Raises:
            ValueError: The names descend along a row.
        """
        at, row = _chosen(spans)
        own = names.index_select(0, at)
        same_row, change = row[1:] == row[:-1], own.diff()
        if bool((wrong := same_row & (change < 0)).any()):
            t = int(wrong.nonzero()[0])
            raise ValueError(
                f"turn_ids: expected ids that do not descend along a trajectory, got {int(own[t + 1])} after "
                f"{int(own[t])}"
            )
        begins = torch.ones_like(at, dtype=torch.bool)
        begins[1:] = ~same_row | (change != 0)
        first, of_row = at[begins], row[begins]
        counts = torch.bincount(of_row, minlength=spans.num_rows)
        after = torch.cat([first[1:], first.new_full((min(len(first), 1),), spans.size)])
        end = torch.minimum(after, spans.end.index_select(0, of_row))
        number = torch.arange(len(first), device=first.device) - (counts.cumsum(0) - counts).index_select(0, of_row)
        last = at[begins.roll(-1)] if len(at) else at
        return cls(Spans.trusted(first, end, spans.size, spans.mask), of_row, number, first, last, counts)

    @classmethod
    def of_runs(cls, spans: Spans) -> Turns:
        """Return the maximal runs of tokens that the policy chose. On CUDA this waits for the device.

        Args:
            spans: The rows, with the mask of the tokens that the policy chose.
        """
        assert spans.mask is not None
        begin, end, row, _, offsets = ops.pieces(spans.mask, spans, "runs")
        number = torch.arange(len(row), device=row.device) - offsets.index_select(0, row)
        return cls(Spans.trusted(begin, end, spans.size, spans.mask), row, number, begin, end - 1, offsets.diff())

    def of_row(self, mask: Tensor | None = None) -> Spans:
        """Return, for each row, the span of its turns.

        Args:
            mask: bool ``[P]``, or None for all True.
        """
        end = self.counts.cumsum(0)
        return Spans.trusted(end - self.counts, end, len(self.row), mask)


def runs(spans: Spans, parts: Spans) -> Tensor:
    """Return names of the maximal runs of tokens that the policy chose, for :meth:`Turns.of`, int64 ``[N]``.

    A run ends where a token of the state follows. Padding between the parts of a trajectory does not end it.

    Args:
        spans: The rows, with the mask of the tokens that the policy chose.
        parts: The spans in which tokens are no padding, without mask.
    """
    real = ops.spread(torch.ones(parts.num_rows, dtype=torch.bool, device=parts.device), parts)
    assert spans.mask is not None
    return (real & ~spans.mask).cumsum(0)


def _chosen(spans: Spans) -> tuple[Tensor, Tensor]:
    """Return the tokens under the mask, ascending, and the row of each, int64."""
    rows = torch.arange(spans.num_rows, device=spans.device)
    chosen = ops.spread(torch.ones_like(rows, dtype=torch.bool), spans)
    return chosen.nonzero()[:, 0], rows.repeat_interleave(ops.count(spans))
