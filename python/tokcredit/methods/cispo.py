"""CISPO: clipped importance-sampling weights."""

from __future__ import annotations

from typing import Annotated

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import Range
from tokcredit.stages.clip import log_bound

_Distance = Annotated[float, Range("number", at_least=0, infinite=True)]


def cispo(clip_low: _Distance = 10.0, clip_high: _Distance = 0.2) -> Objective:
    """CISPO: GRPO whose clipped ratio is only a weight of the log-prob's gradient, so that clipped tokens still train.

    With ``A`` the advantage of GRPO and ``sg`` the stop-gradient::

        loss = mean over all tokens of -sg(clip(q, 1 - clip_low, 1 + clip_high)) * A * log p

    Args:
        clip_low: The weight is at least ``1 - clip_low``; with 1 or more there is no lower bound.
        clip_high: The weight is at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: MiniMax-M1, arXiv 2506.13585.
    Differences from the paper:
        - None known.
    Differences from the released code:
        - Bounds are those of verl. In TRL ``epsilon_high`` is the upper bound of the weight itself, so that its 5.0 is
          ``clip_high=4.0``.
    """
    weight = clip.gated(
        low=log_bound(1 - clip_low),
        high=log_bound(1 + clip_high),
        outside_low=1.0,
        outside_high=1.0,
        both_sides=True,
    )
    return Objective(clip=weight, aggregation=aggregation.token_mean())
