"""Dr. GRPO."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit
from tokcredit.objective import Objective


def dr_grpo(clip_low: float = 0.2, clip_high: float = 0.2, max_length: int | None = None) -> Objective:
    """GRPO without its two divisions: by the group's standard deviation, and by each row's own length.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        max_length: the constant that replaces the row's length; None takes the batch's longest row.

    Cost: as GRPO.
    Source: Liu et al., arXiv 2503.20783.
    Departs from the paper: nothing; set ``max_length`` to the generation limit to keep the scale between batches.
    """
    return Objective(
        credit.group_normalized(scale=False),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.sequence_sum(max_length),
    )
