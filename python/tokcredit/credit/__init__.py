"""What each token is paid: the advantage, from rewards and from where rollouts of a group part.

A credit maps a batch to advantages: ``[R, 1]`` when every token of a row is paid the same, else ``[N]``.
"""

from __future__ import annotations

from tokcredit.credit.baseline import least_variance
from tokcredit.credit.group import (
    Credit,
    constant,
    group_mean,
    group_normalized,
    group_size,
    leave_one_out,
    negative_part,
    outcome,
    thresholded,
    token_normalized,
    whitened,
)
from tokcredit.credit.halves import Metric, by_mean_reward, halves, length, mean_entropy, order
from tokcredit.credit.hidden import influential, sparing
from tokcredit.credit.pooled import brevity, dominance, pooled
from tokcredit.credit.state import improbable_cuts, saturating, shortening, turns, value_changes
from tokcredit.credit.tree import edges, tempo_like

__all__ = [
    "Credit",
    "Metric",
    "brevity",
    "by_mean_reward",
    "constant",
    "dominance",
    "edges",
    "group_mean",
    "group_normalized",
    "group_size",
    "halves",
    "improbable_cuts",
    "influential",
    "least_variance",
    "leave_one_out",
    "length",
    "mean_entropy",
    "negative_part",
    "order",
    "outcome",
    "pooled",
    "saturating",
    "shortening",
    "sparing",
    "tempo_like",
    "thresholded",
    "token_normalized",
    "turns",
    "value_changes",
    "whitened",
]
