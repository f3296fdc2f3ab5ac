"""The groups of a batch, sorted once and reused by every reduction over them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.spans import Spans


@dataclass(frozen=True, eq=False)
class Groups:
    """Which rows share a prompt. ``segment.mean(x, groups)`` reduces a per-row ``[R]`` tensor to ``[count]``.

    Attributes:
        index: int64 ``[R]``, the group of each row, from 0 to ``count - 1``, numbered by ascending group id.
        count: Number of groups.
        order: int64 ``[R]``, the rows group by group, or None where they lie so already.
        spans: The groups as spans of rows in that order. Rows whose mask is False do not count in statistics.
    """

    index: Tensor
    count: int
    order: Tensor | None
    spans: Spans

    @classmethod
    def of(cls, ids: Tensor) -> Groups:
        """Return the groups of rows with these ids. On CUDA this waits for the device.

        Args:
            ids: Integers ``[R]``, in any order.
        """
        names, index, sizes = torch.unique(ids, return_inverse=True, return_counts=True)
        in_order = bool((index.diff() >= 0).all())
        end = sizes.cumsum(0)
        spans = Spans.trusted(end - sizes, end, index.numel())
        return cls(index, names.numel(), None if in_order else index.argsort(stable=True), spans)

    def sorted(self, x: Tensor) -> Tensor:
        """Return a per-row tensor with its rows group by group.

        Args:
            x: ``[R, ...]``.
        """
        return x if self.order is None else x.index_select(0, self.order)

    def counting(self, rows: Tensor) -> Groups:
        """Return the same groups in which only some rows count.

        Args:
            rows: bool ``[R]``, True for the rows that count.
        """
        return Groups(self.index, self.count, self.order, self.spans.with_mask(self.sorted(rows)))

    def subset(self, rows: Tensor) -> Groups:
        """Return the groups of some of the rows. On CUDA this waits for the device.

        Args:
            rows: int64 ``[M]``, ascending.
        """
        index = self.index.index_select(0, rows)
        sizes = torch.bincount(index, minlength=self.count)
        if not bool(sizes.all()):
            present = sizes > 0
            index, sizes = (present.cumsum(0) - 1).index_select(0, index), sizes[present]
        end = sizes.cumsum(0)
        spans = Spans.trusted(end - sizes, end, index.numel())
        return Groups(index, sizes.numel(), None if self.order is None else index.argsort(stable=True), spans)

    @cached_property
    def scope(self) -> Tensor:
        """The group of each row that counts, and -1 for the others; int64 ``[R]``."""
        mask = self.spans.mask
        if mask is None:
            return self.index
        if self.order is not None:
            mask = torch.empty_like(mask).index_copy_(0, self.order, mask)
        return self.index.masked_fill(~mask, -1)

    @cached_property
    def rows(self) -> Spans:
        """Each row as a span of its own, for selections among per-row numbers ``[R]``."""
        begin = torch.arange(self.index.numel(), device=self.index.device)
        return Spans.trusted(begin, begin + 1, begin.numel())

    @cached_property
    def counts(self) -> Tensor:
        """Number of rows of each group that count; int64 ``[count]``."""
        return self.sizes if self.spans.mask is None else ops.count(self.spans)

    @property
    def sizes(self) -> Tensor:
        """Number of rows of each group, including rows that do not count; int64 ``[count]``."""
        return self.spans.lengths

    def per_row(self, x: Tensor) -> Tensor:
        """Return each row's own group's number.

        Args:
            x: ``[count, ...]``.

        Returns:
            ``[R, ...]``.
        """
        return x.index_select(0, self.index)
