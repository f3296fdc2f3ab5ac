"""What each token is paid: the advantage, from rewards and from where rollouts of a group part.

A credit maps a batch to advantages: ``[R, 1]`` when every token of a row is paid the same, else ``[N]``.
"""

from __future__ import annotations

from tokcredit.credit.group import (
    Credit,
    group_mean,
    group_normalized,
    group_size,
    leave_one_out,
    negative_part,
    outcome,
    thresholded,
)
from tokcredit.credit.tree import tempo_like

__all__ = [
    "Credit",
    "group_mean",
    "group_normalized",
    "group_size",
    "leave_one_out",
    "negative_part",
    "outcome",
    "tempo_like",
    "thresholded",
]
