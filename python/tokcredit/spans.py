"""Where rows lie in flat token buffers: the type that every block and every native operation takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokcredit.arguments import INTEGERS, describe, instance, tensor, whole_number


@dataclass(frozen=True, eq=False)
class Spans:
    """Rows as spans of flat buffers of ``size`` tokens; row r is ``[begin[r], end[r])``.

    Spans ascend and do not overlap. Tokens between them are padding. Tokens whose mask
    is False are ignored: their values do not affect any result.

    Making spans from tensors checks them once, which on CUDA waits for the device. :meth:`from_cu_seqlens` and
    :meth:`from_padded` make them from the two usual layouts.

    Args:
        begin: int32 or int64 ``[R]``, first token of each row.
        end: int32 or int64 ``[R]``, one past the last token of each row.
        size: Number of tokens N of the buffers.
        mask: bool ``[N]``, or None for all True.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape is wrong, or the spans leave the buffer, descend or overlap.

    Example:
        >>> spans = Spans(torch.tensor([0, 3]), torch.tensor([2, 6]), size=6)  # token 2 is padding
    """

    begin: Tensor
    end: Tensor
    size: int
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        size = whole_number("size", self.size)
        if not isinstance(self.begin, Tensor) or self.begin.dim() != 1:
            raise ValueError(f"begin: expected int64 [R], got {describe(self.begin)}")
        begin = tensor("begin", self.begin, INTEGERS, (self.begin.numel(),)).long().contiguous()
        end = tensor("end", self.end, INTEGERS, tuple(begin.shape), begin.device).long().contiguous()
        if self.mask is not None:
            tensor("mask", self.mask, (torch.bool,), (size,), begin.device)
        bad = (begin < 0) | (end < begin) | (end > size)
        bad[1:] |= begin[1:] < end[:-1]
        if bool(bad.any()):
            r = int(bad.nonzero()[0])
            raise ValueError(
                f"begin, end: expected ascending, disjoint spans inside [0, {size}], "
                f"got [{int(begin[r])}, {int(end[r])}) at row {r}"
            )
        self._set(begin, end, size, self.mask)

    def _set(self, begin: Tensor, end: Tensor, size: int, mask: Tensor | None) -> None:
        self.__dict__.update(begin=begin, end=end, size=size, mask=mask)

    @classmethod
    def trusted(cls, begin: Tensor, end: Tensor, size: int, mask: Tensor | None = None) -> Spans:
        """Return spans without checking them, for spans derived from checked ones. Nothing waits for the device.

        Args:
            begin: Contiguous int64 ``[R]``.
            end: Contiguous int64 ``[R]``.
            size: Number of tokens N.
            mask: bool ``[N]``, or None for all True.
        """
        made = object.__new__(cls)
        made._set(begin, end, size, mask)
        return made

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, mask: Tensor | None = None) -> Spans:
        """Return the spans of rows that are packed one after another.

        Args:
            cu_seqlens: int32 or int64 ``[R + 1]``, ascending offsets from 0 to N.
            mask: bool ``[N]``, or None for all True.

        Raises:
            TypeError: A tensor has the wrong dtype.
            ValueError: The offsets do not ascend from 0, or a shape is wrong.
        """
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0:
            raise ValueError(f"cu_seqlens: expected int64 [R + 1], got {describe(cu_seqlens)}")
        edges = tensor("cu_seqlens", cu_seqlens, INTEGERS, tuple(cu_seqlens.shape)).long().contiguous()
        bad = edges[1:] < edges[:-1]
        if bool(bad.any()) or int(edges[0]) != 0:
            shown = edges[:8].tolist()
            more = ", ..." if edges.numel() > 8 else ""
            raise ValueError(f"cu_seqlens: expected ascending offsets from 0, got [{', '.join(map(str, shown))}{more}]")
        size = int(edges[-1])
        if mask is not None:
            tensor("mask", mask, (torch.bool,), (size,), edges.device)
        return cls.trusted(edges[:-1].contiguous(), edges[1:].contiguous(), size, mask)

    @classmethod
    def from_padded(cls, lengths: Tensor, width: int, mask: Tensor | None = None) -> Spans:
        """Return the spans of the rows of a right-padded ``(B, T)`` tensor, seen as one flat buffer.

        Args:
            lengths: int32 or int64 ``[B]``, real tokens of each row, at most T.
            width: T.
            mask: bool ``(B, T)`` or ``[B * T]``, or None for all True.

        Raises:
            TypeError: A tensor has the wrong dtype.
            ValueError: A length is negative or above T, or a shape is wrong.
        """
        width = whole_number("width", width)
        if not isinstance(lengths, Tensor) or lengths.dim() != 1:
            raise ValueError(f"lengths: expected int64 [B], got {describe(lengths)}")
        rows = lengths.numel()
        lengths = tensor("lengths", lengths, INTEGERS, (rows,)).long()
        if rows and (int(lengths.min()) < 0 or int(lengths.max()) > width):
            raise ValueError(f"lengths: expected numbers from 0 to {width}, got {lengths.tolist()[:8]}")
        if mask is not None:
            mask = mask.reshape(-1) if isinstance(mask, Tensor) else mask
            tensor("mask", mask, (torch.bool,), (rows * width,), lengths.device)
        begin = torch.arange(rows, device=lengths.device) * width
        return cls.trusted(begin, begin + lengths, rows * width, mask)

    @classmethod
    def single(cls, size: int, device: torch.device | str | None = None, mask: Tensor | None = None) -> Spans:
        """Return one row that covers a whole buffer.

        Args:
            size: Number of tokens N.
            device: Device of the spans.
            mask: bool ``[N]``, or None for all True.
        """
        begin = torch.zeros(1, dtype=torch.int64, device=device)
        return cls.trusted(begin, begin + size, size, mask)

    def with_mask(self, mask: Tensor | None) -> Spans:
        """Return the same spans with another mask.

        Args:
            mask: bool ``[N]`` on the same device, or None for all True.

        Raises:
            TypeError: The mask is not bool.
            ValueError: Its shape or device is wrong.
        """
        if mask is not None:
            tensor("mask", mask, (torch.bool,), (self.size,), self.begin.device)
        return Spans.trusted(self.begin, self.end, self.size, mask)

    @property
    def num_rows(self) -> int:
        """Number of rows R."""
        return self.begin.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the spans."""
        return self.begin.device

    @property
    def lengths(self) -> Tensor:
        """Number of tokens of each row, masked ones included; int64 ``[R]``."""
        return self.end - self.begin

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``begin``, ``end`` and ``mask``, in the order in which native operations take them."""
        return self.begin, self.end, self.mask


def require_spans(name: str, x: Any) -> Spans:
    """Return ``x`` after checking that it is :class:`Spans`.

    Args:
        name: Argument name for the error.
        x: What the caller passed.

    Raises:
        TypeError: It is something else.
    """
    checked: Spans = instance(name, x, Spans, "; see Spans.from_cu_seqlens and Spans.from_padded")
    return checked


def padded_lengths(mask: Tensor) -> Tensor:
    """Return one past the last True of each row of a mask, int64 ``[B]``; 0 in a row without any.

    Args:
        mask: bool ``(B, T)``.
    """
    rows, width = mask.shape
    if rows == 0 or width == 0:
        return torch.zeros(rows, dtype=torch.long, device=mask.device)
    # Eight at a time where they make a word: two steps, with temporaries an eighth as large.
    mask = mask.contiguous()
    size = 8 if width % 8 == 0 and mask.storage_offset() % 8 == 0 else 1
    present = mask.view(torch.int64 if size == 8 else torch.uint8) != 0
    # Backward from the end of the row, the first True is the last one.
    skipped = present.flip(1).view(torch.uint8).argmax(1)
    word = present.shape[1] - 1 - skipped
    last = mask.view(rows, -1, size)[torch.arange(rows, device=mask.device), word]
    inside = size - last.flip(1).view(torch.uint8).argmax(1)
    return torch.where(last.any(1), word * size + inside, 0)
