"""Which places attend to which: the mask of a part as a matrix, and as blocks for FlexAttention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BLOCK = 128
"""Places of a block of FlexAttention."""


@dataclass(frozen=True, eq=False)
class TreeMask:
    """Place i attends to place j if and only if ``j <= i < end[j]``; with a window w also ``p[i] - p[j] < w``.

    ``p`` are the positions in the full rows: places of other branches do not count.

    Attributes:
        end: int64 ``[M]``, one past the last place below each place.
        position_ids: int64 ``[M]``, position of each place in its full row.
        flex: Whether attention runs by FlexAttention; M is then a multiple of 128.
    """

    end: Tensor
    position_ids: Tensor
    flex: bool = False
    _made: dict[int | None, Any] = field(default_factory=dict, repr=False)

    def of_window(self, window: int | None) -> Any:
        """Return the mask of layers with a sliding window, made once: bool ``(1, 1, M, M)``, or a block mask.

        Args:
            window: Largest number of positions that a place attends to, itself included, or None for all.
        """
        if window not in self._made:
            # Saved for the backward pass, which inference tensors cannot be.
            with torch.inference_mode(False), torch.no_grad():
                self._made[window] = self.blocks(window) if self.flex else self.dense(window)
        return self._made[window]

    def dense(self, window: int | None = None) -> Tensor:
        """Return the mask as bool ``(1, 1, M, M)``.

        Args:
            window: As in :meth:`of_window`.
        """
        place = torch.arange(self.end.numel(), device=self.end.device)
        mask = (place <= place[:, None]) & (place[:, None] < self.end)
        if window is not None:
            mask &= self.position_ids[:, None] - self.position_ids < window
        return mask[None, None]

    def blocks(self, window: int | None = None) -> Any:
        """Return the mask as ``BlockMask`` of FlexAttention, without evaluating it for every pair of places.

        Below the diagonal a block of keys is empty for the queries from ``q`` on if all its places end before, and full
        if none ends before the last query. With a window, positions bound what may be left out.

        Args:
            window: As in :meth:`of_window`.
        """
        from torch.nn.attention.flex_attention import BlockMask

        end, position = self.end.view(-1, BLOCK), self.position_ids.view(-1, BLOCK)
        count = end.shape[0]
        block = torch.arange(count, device=end.device)
        below = block < block[:, None]
        some = below & (end.amax(1) > block[:, None] * BLOCK)
        full = below & (end.amin(1) >= (block[:, None] + 1) * BLOCK)
        some |= block == block[:, None]
        if window is not None:
            low, high = position.amin(1), position.amax(1)
            some &= low[:, None] - high < window
            full &= high[:, None] - low < window
        part, full = some & ~full, some & full

        def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
            order = chosen.byte().argsort(dim=1, descending=True, stable=True)
            return chosen.sum(1).int()[None, None], order.int()[None, None]

        ends, positions = self.end, self.position_ids
        # A tensor, because a number would become a symbol in compiled code.
        oldest = positions if window is None else positions - window + 1

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        def sees_near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key]) & (positions[key] >= oldest[query])

        rule = sees if window is None else sees_near
        return BlockMask.from_kv_blocks(*listed(part), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=rule)
