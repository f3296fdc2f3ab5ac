"""Where the tokens of a batch lie: packed rows or a padded ``(B, T)``, and what moves tensors between the two."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokcredit import ops
from tokcredit.spans import Spans


class Layout:
    """Base of batches: their rows in flat buffers, and the shape of a padded batch.

    Attributes:
        tokens: Integers ``[N]``, token ids.
        cu_seqlens: Offsets of packed rows, or :class:`~tokcredit.Spans` of rows with gaps between them.
        shape: ``(B, T)`` of a padded batch, or None.
        spans: The rows, with the mask of the tokens that the policy chose.
    """

    tokens: Tensor
    cu_seqlens: Tensor | Spans
    shape: tuple[int, int] | None
    spans: Spans

    @property
    def num_rows(self) -> int:
        """Number of rows R."""
        return self.spans.num_rows

    @property
    def num_tokens(self) -> int:
        """Length N of the flat buffers, padding included."""
        return self.tokens.numel()

    @property
    def device(self) -> torch.device:
        """Device of the batch."""
        return self.tokens.device

    @property
    def begin(self) -> Tensor:
        """First token of each row; int64 ``[R]``."""
        return self.spans.begin

    @property
    def end(self) -> Tensor:
        """One past the last token of each row; int64 ``[R]``."""
        return self.spans.end

    @property
    def all_spans(self) -> Spans:
        """The rows without the response mask: all real tokens."""
        return Spans.trusted(self.spans.begin, self.spans.end, self.spans.size)

    @cached_property
    def single(self) -> Spans:
        """One row that covers the whole buffer, without mask."""
        return Spans.single(self.spans.size, self.spans.device)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Tokens of each row on the host, masked ones included. On CUDA the first use waits for the device."""
        sizes: NDArray[np.int64] = self.all_spans.lengths.cpu().numpy()
        return sizes

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """First token of each row on the host. On CUDA the first use waits for the device."""
        starts: NDArray[np.int64] = self.begin.cpu().numpy()
        return starts

    @property
    def width(self) -> int:
        """T of a padded batch, else the length of the longest row."""
        return self.shape[1] if self.shape else int(self.sizes.max(initial=0))

    def _one_axis(self, x: Tensor | None) -> Tensor | None:
        """Return a tensor in the layout of the batch as ``[N]``, and anything else as it is."""
        return x.reshape(-1) if isinstance(x, Tensor) and self.shape and tuple(x.shape) == self.shape else x

    def flat(self, x: Tensor, name: str = "x") -> Tensor:
        """Return a per-token tensor in the layout of the batch as ``[N]``.

        Args:
            x: ``(B, T)`` for a padded batch, ``[N]`` for a packed one.
            name: Argument name for the error.

        Raises:
            ValueError: The shape is wrong.
            TypeError: It is not a tensor.
        """
        expected = self.shape or (self.num_tokens,)
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected torch.Tensor {list(expected)}, got {type(x).__name__}")
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected {list(expected)}, got {list(x.shape)}")
        return x.reshape(-1)

    def shaped(self, x: Tensor) -> Tensor:
        """Return a flat ``[N]`` tensor in the layout of the batch.

        Args:
            x: ``[N]``.
        """
        return x if self.shape is None else x.view(self.shape)

    def to_padded(self, x: Tensor) -> Tensor:
        """Return a per-token tensor as ``(B, T)``, 0 on padding. A packed batch is as wide as its longest row.

        Args:
            x: In the layout of the batch, or ``[N]``.
        """
        if self.shape is not None:
            return self.flat(x.reshape(-1).view(self.shape)).view(self.shape)
        target = torch.arange(self.num_rows, device=x.device) * self.width
        length = self.all_spans.lengths
        return ops.repack(self.flat(x), self.begin, target, length, self.num_rows * self.width).view(
            self.num_rows, self.width
        )

    def to_packed(self, x: Tensor) -> Tensor:
        """Return a per-token tensor with the rows one after another, without padding.

        Args:
            x: In the layout of the batch.
        """
        if isinstance(self.cu_seqlens, Tensor):
            return self.flat(x)
        length = self.all_spans.lengths
        edges = length.cumsum(0)
        return ops.repack(self.flat(x), self.begin, edges - length, length, int(self.sizes.sum()))
