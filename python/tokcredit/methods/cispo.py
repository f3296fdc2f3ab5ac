"""Clipped importance-sampling weights."""

from __future__ import annotations

import math

from tokcredit.stages import aggregation, clip
from tokcredit.stages.clip import log_bound
from tokcredit.objective import Objective


def cispo(clip_low: float = 10.0, clip_high: float = 0.2) -> Objective:
    """GRPO whose clipped ratio only weighs the log-prob's gradient, so clipped tokens keep learning.

    ``loss = -sg[clip(q, 1 - clip_low, 1 + clip_high)] A log p``, mean over tokens.

    Args:
        clip_low: the weight is at least ``1 - clip_low``; 1 or more is no lower bound.
        clip_high: the weight is at most ``1 + clip_high``.

    Cost: as GRPO.
    Source: MiniMax, arXiv 2506.13585.
    Departs from the paper: bounds as in verl; TRL's ``epsilon_high`` is the cap itself, so its 5.0 is 4.0 here.
    """
    return Objective(clip=clip.gated(low=log_bound(1 - clip_low), high=math.log1p(clip_high), outside_low=1.0, outside_high=1.0, both_sides=True), aggregation=aggregation.token_mean())
