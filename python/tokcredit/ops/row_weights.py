"""Weights of rows in a loss that is a mean over tokens or rows: contract in ``csrc/ops/row_weights.hpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import _C
from tokcredit.ops.call import operation, result

COUNTED: tuple[str, ...] = _C.COUNTED


def _row_weights_output(
    lengths: Tensor, given: int, counted: int, by_length: bool, length: float, factor: float
) -> Tensor:
    return result(lengths, lengths.shape if by_length else (), torch.float64)


@operation(
    "row_weights(Tensor lengths, int given, int counted, bool by_length, float length, float factor) -> Tensor",
    _row_weights_output,
)
def _row_weights(lengths: Tensor, given: int, counted: int, by_length: bool, length: float, factor: float) -> Tensor:
    y = _row_weights_output(lengths, given, counted, by_length, length, factor)
    _C.row_weights(lengths.contiguous(), given, counted, by_length, length, factor, y)
    return y


def row_weights(
    lengths: Tensor, counted: str, given: int | None = None, length: float | None = None, factor: float = 1.0
) -> Tensor:
    """Return ``factor / (count * length)``, the weight of each row's tokens, float64; what is 0 counts as 1.

    Args:
        lengths: int64 ``[R]``, training tokens of each row.
        counted: What is counted, one of ``COUNTED``.
        given: The count, or None for that of these rows.
        length: Length of every row, or None for its training tokens.
        factor: Factor of the weights.

    Returns:
        ``[R]``, or 0-d with a length.
    """
    count, size = -1 if given is None else given, 1.0 if length is None else length
    return _row_weights(lengths, count, COUNTED.index(counted), length is None, size, factor)
