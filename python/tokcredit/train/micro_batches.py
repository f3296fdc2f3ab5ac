"""Micro-batches: which rows of a step go through the model together."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tokcredit.rollouts import Rollouts


def units(rows: NDArray[np.int64], batch: Rollouts, coupled: bool) -> list[NDArray[np.int64]]:
    """Return what stays together in a part: the rows of each group if they are coupled, else those of a trajectory.

    Args:
        rows: int64 ``[M]``, numbers of rows.
        batch: The batch.
        coupled: Whether the rows of a group stay together.
    """
    if not coupled and batch.trajectories is None:
        return list(rows[:, None])
    of = batch.group_index.cpu().numpy() if coupled or batch.trajectories is None else batch.trajectories.number
    return [rows[of[rows] == unit] for unit in np.unique(of[rows])]


def joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the rows of all parts, ``[M]``.

    Args:
        parts: Numbers of rows; there may be no part.
    """
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def micro_batches(chosen: Tensor, batch: Rollouts, size: int, coupled: bool = False) -> list[NDArray[np.int64]]:
    """Return rows, some at a time, those of a group side by side because they share a prompt.

    A group of coupled rows, or a trajectory, that is larger than ``size`` is a part of its own.

    Args:
        chosen: Integers ``[M]``, numbers of rows.
        batch: The batch.
        size: Largest number of rows of a part.
        coupled: Whether the rows of a group stay together.
    """
    rows = chosen.cpu().numpy()
    rows = rows[batch.group_index.cpu().numpy()[rows].argsort(kind="stable")]
    parts: list[list[NDArray[np.int64]]] = []
    filled = size
    for unit in units(rows, batch, coupled):
        if filled + len(unit) > size or not parts:
            parts.append([])
            filled = 0
        parts[-1].append(unit)
        filled += len(unit)
    return [joined(part) for part in parts]
