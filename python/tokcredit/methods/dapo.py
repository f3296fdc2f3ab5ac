"""Decoupled clip and dynamic sampling."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit
from tokcredit.objective import Objective


def dapo(clip_low: float = 0.2, clip_high: float = 0.28, cap: float | None = None) -> Objective:
    """GRPO with a higher upper bound and the mean over all tokens of the batch.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        cap: where A < 0 the loss is at most ``-A cap``.

    Cost: as GRPO.
    Source: Yu et al., arXiv 2503.14476.
    Departs from the paper: dynamic sampling and overlong reward shaping belong to the sampler and the reward, not to
    the objective. The token mean is over the batch; the paper writes it per group.
    """
    return Objective(
        credit.group_normalized(),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.token_mean(),
    )
