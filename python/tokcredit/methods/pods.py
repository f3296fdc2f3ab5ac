"""Policy optimization with down-sampling."""

from __future__ import annotations

from tokcredit import clip, credit, sampling
from tokcredit.objective import Objective


def pods(count: int = 16, clip_low: float = 0.2, clip_high: float = 0.2, epsilon: float = 1e-6) -> Objective:
    """GRPO on the rows of each group whose rewards vary most as a set; the others are generated but not trained on.

    Mean and standard deviation are those of the rows that are kept.

    Args:
        count: rows kept per group; all rows of a smaller group.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.

    Cost: forward and backward passes on ``count`` rows per group, however many were generated.
    Source: arXiv 2504.13818.
    Departs from the paper: nothing known; ``count`` as in the released configuration.
    """
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        clip=clip.ppo(clip_low, clip_high),
        sampling=sampling.most_varied(count),
    )
