"""Credit stages: the advantage of each token, from rewards and from what the batch carries.

A credit stage maps a batch to advantages, ``[R, 1]`` where all tokens of a row have the same, else ``[N]``. Credit that
a single method uses is defined in that method's file, for example ``tokcredit.methods.tempo``.
"""

from __future__ import annotations

from tokcredit.stages.credit.distilled import distilled
from tokcredit.stages.credit.group import (
    Credit,
    constant,
    group_normalized,
    leave_one_out,
    negative_part,
    outcome,
    sum,
    thresholded,
    whitened,
)
from tokcredit.stages.credit.returns import gae, returns
from tokcredit.stages.credit.values import improbable_cuts, value_changes

__all__ = [
    "Credit",
    "constant",
    "distilled",
    "gae",
    "group_normalized",
    "improbable_cuts",
    "leave_one_out",
    "negative_part",
    "outcome",
    "returns",
    "sum",
    "thresholded",
    "value_changes",
    "whitened",
]
