"""Which rows of a batch are the chosen and the rejected ones of preference pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairing:
    """The pairs of a batch: of each group the half of the rows with the higher rewards is chosen, in their order.

    Attributes:
        pairs: int64 ``[P, 2]`` on the host, the chosen and the rejected row of each pair.
        group: int64 ``[P]`` on the host, the group of each pair, ascending.
        rows: int64 ``[P, 2]`` on the device of the batch, the same as ``pairs``.
        sizes: Numbers of rows that groups have.
        tied: Whether a chosen row has the same reward as a rejected one.
    """

    pairs: NDArray[np.int64]
    group: NDArray[np.int64]
    rows: Tensor
    sizes: frozenset[int]
    tied: bool

    @classmethod
    def of(cls, index: Tensor, count: int, rewards: Tensor) -> Pairing:
        """Return the pairs of rows. Of a group with an odd number of rows the last one is in none.

        Args:
            index: int64 ``[R]``, the group of each row, from 0 to ``count - 1``.
            count: Number of groups.
            rewards: float ``[R]``.
        """
        of_row, given = index.cpu().numpy(), rewards.cpu().numpy()
        size = np.bincount(of_row, minlength=count)
        order, half = np.lexsort((-given, of_row)), size // 2
        first = size.cumsum() - size
        group = np.repeat(np.arange(count), half)
        place = first[group] + np.arange(len(group)) - (half.cumsum() - half)[group]
        pairs = np.stack([order[place], order[place + half[group]]], 1)
        full = half > 0
        last, next_one = (order[first[full] + half[full] - more] for more in (1, 0))
        rows = torch.from_numpy(pairs).to(index.device, non_blocking=True)
        return cls(pairs, group, rows, frozenset(size.tolist()), bool((given[last] == given[next_one]).any()))
