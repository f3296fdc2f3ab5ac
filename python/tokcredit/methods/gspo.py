"""Group Sequence Policy Optimization."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, ratio
from tokcredit.objective import Objective


def gspo(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GRPO with one ratio per row, the geometric mean of its tokens' ratios, in a far narrower window.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO.
    Source: Zheng et al., arXiv 2507.18071.
    Departs from the paper: the token form of the gradient (equal to the sequence form when a row has one advantage),
    and the log-ratio is at most 10, both as in verl.
    """
    return Objective(
        ratio=ratio.sequence(), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.sequence_mean()
    )
