"""Balanced Aggregation."""

from __future__ import annotations

from tokcredit import aggregation, clip
from tokcredit.objective import Objective


def ba(clip_low: float = 0.2, clip_high: float = 0.28) -> Objective:
    """GRPO that averages tokens of positive and of negative rows apart, then mixes them by their share of the group.

    Tokens are equal inside a side, and the longer side does not outweigh the other.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO.
    Source: arXiv 2605.04077.
    Departs from the paper: what it leaves open is read so: rows with A = 0 count in the group's size only;
    advantages that vary inside a row are split by the row's outcome; groups weigh equally; a KL term keeps the token
    mean.
    """
    return Objective(clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.balanced())
