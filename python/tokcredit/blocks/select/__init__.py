"""Exact selection: the largest values, ranks, quantiles, shares of words, and tokens that are unlike each other.

A *scope* is a set of elements that compete. ``by`` gives the scopes of rows: None makes each row a scope,
``segment.Ids(batch.group_index, batch.num_groups)`` each group, and ``everything(spans)`` the whole batch. Masked
tokens never compete. Sizes are unlimited: ranks are counted in integers. Ties go to the lower index. NaN ranks above
+inf, except in :func:`top_share` and :func:`diverse`, where it is chosen last.
"""

from tokcredit.blocks.select import frequency
from tokcredit.blocks.select.diverse import diverse, sensitivity
from tokcredit.blocks.select.ranks import (
    Share,
    everything,
    kth,
    maximum_variance,
    quantile,
    quantile_nearest,
    sizes,
    top_k,
    within_mean,
)
from tokcredit.blocks.select.words import top_share

__all__ = [
    "Share",
    "diverse",
    "everything",
    "frequency",
    "kth",
    "maximum_variance",
    "quantile",
    "quantile_nearest",
    "sensitivity",
    "sizes",
    "top_k",
    "top_share",
    "within_mean",
]
