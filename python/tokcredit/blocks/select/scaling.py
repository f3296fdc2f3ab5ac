"""Scores from 0 to 1 among the elements that are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from tokcredit import ops
from tokcredit.blocks import segment
from tokcredit.blocks.segment import Ids
from tokcredit.spans import Spans


def rows_of(spans: Spans) -> Ids:
    """Return the row of each token, and -1 for masked tokens and padding.

    Args:
        spans: The rows.
    """
    after = torch.arange(1, spans.num_rows + 1, device=spans.device)
    return Ids(ops.spread(after, spans) - 1, spans.num_rows)


def scaled(x: Tensor, by: Ids, epsilon: float = 0.0, equal: float = 0.0) -> Tensor:
    """Return ``(x - minimum) / (maximum - minimum + epsilon)`` of the finite numbers of each segment, else NaN.

    Args:
        x: float ``[M]``.
        by: Segments.
        epsilon: Added to the denominator.
        equal: Result where all numbers of a segment are equal.

    Returns:
        float64 ``[M]``.
    """
    x = x.double().where(x.isfinite(), torch.nan)
    if by.segments == 0:
        return x * torch.nan
    compared = Ids(by.ids, by.segments, x.isfinite())
    low, high = segment.minimum(x, compared), segment.maximum(x, compared)
    flat = ~(high > low)
    low, width = low.masked_fill(flat, 0), (high - low + epsilon).masked_fill(flat, 1)
    inside = by.ids.clamp(min=0)
    y = torch.where(flat[inside], x * 0 + equal, (x - low[inside]) / width[inside])
    return y.masked_fill(by.ids < 0, torch.nan)
