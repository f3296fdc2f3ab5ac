"""Some rows of a batch: where they are in the whole, and what the part looks like."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit.spans import Spans


class Selection(NamedTuple):
    """Some rows of a batch and where their tokens are.

    Attributes:
        rows: int64 ``[M]``.
        numbers: The same on the host.
        tokens: int64, positions of the tokens of these rows, or None for a padded batch.
        sizes: Tokens of each row, on the host.
        spans: The rows in the part.
        shape: ``(M, T)`` of a padded part, or None.
    """

    rows: Tensor
    numbers: NDArray[np.int64]
    tokens: Tensor | None
    sizes: NDArray[np.int64]
    spans: Spans
    shape: tuple[int, int] | None

    @classmethod
    def of(
        cls, rows: NDArray[np.int64], spans: Spans, sizes: NDArray[np.int64], shape: tuple[int, int] | None
    ) -> Selection:
        """Return the selection of some rows. Nothing waits for the device.

        Args:
            rows: int64 ``[M]``, on the host.
            spans: Rows of the whole batch.
            sizes: Tokens of each of them, on the host.
            shape: ``(B, T)`` of a padded batch, or None.
        """
        own = sizes[rows]
        index = torch.from_numpy(rows).to(spans.device, non_blocking=True)
        begin = spans.begin.index_select(0, index)
        length = spans.end.index_select(0, index) - begin
        if shape is not None:
            first = torch.arange(len(rows), device=spans.device) * shape[1]
            part = Spans.trusted(first, first + length, len(rows) * shape[1])
            return cls(index, rows, None, own, part, (len(rows), shape[1]))
        total = int(own.sum())
        end = length.cumsum(0)
        part = Spans.trusted(end - length, end, total)
        shift = torch.repeat_interleave(begin - part.begin, length, output_size=total)
        return cls(index, rows, shift + torch.arange(total, device=spans.device), own, part, None)

    def of_rows(self, x: Tensor) -> Tensor:
        """Return the rows of a per-row tensor.

        Args:
            x: ``[R, ...]``.
        """
        return x.index_select(0, self.rows)

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return the tokens of a per-token tensor.

        Args:
            x: ``[N, ...]``.
        """
        if self.tokens is not None:
            return x.index_select(0, self.tokens)
        assert self.shape is not None
        width = self.shape[1]
        by_row = x.reshape(x.shape[0] // width if width else 0, width, *x.shape[1:])
        return by_row.index_select(0, self.rows).flatten(0, 1) if width else x


class Section(NamedTuple):
    """The tokens ``[first, last)`` of a batch, with the rows that have some of them, which may be cut.

    Attributes:
        first: First token.
        last: One past the last token.
        first_row: First of the rows.
        last_row: One past the last of the rows.
        sizes: Tokens of each row in the section, on the host.
        spans: The rows in the section.
        shape: None; part of what :class:`Selection` has.
    """

    first: int
    last: int
    first_row: int
    last_row: int
    sizes: NDArray[np.int64]
    spans: Spans
    shape: None = None

    @classmethod
    def of(cls, first: int, last: int, spans: Spans, begin: NDArray[np.int64], sizes: NDArray[np.int64]) -> Section:
        """Return the section of some tokens. Nothing waits for the device.

        Args:
            first: First token.
            last: One past the last token.
            spans: Rows of the whole batch.
            begin: First token of each of them, on the host.
            sizes: Tokens of each of them, on the host.
        """
        end = begin + sizes
        low, high = int(np.searchsorted(end, first, "right")), int(np.searchsorted(begin, last, "left"))
        high = max(low, high)
        own = np.clip(end[low:high], first, last) - np.clip(begin[low:high], first, last)
        begins, ends = (x[low:high].clamp(first, last) - first for x in (spans.begin, spans.end))
        return cls(first, last, low, high, own, Spans.trusted(begins, ends, last - first))

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The rows on the host, int64."""
        return np.arange(self.first_row, self.last_row)

    def of_rows(self, x: Tensor) -> Tensor:
        """Return the rows of a per-row tensor.

        Args:
            x: ``[R, ...]``.
        """
        return x[self.first_row : self.last_row]

    def of_tokens(self, x: Tensor) -> Tensor:
        """Return the tokens of a per-token tensor.

        Args:
            x: ``[N, ...]``.
        """
        return x[self.first : self.last]
