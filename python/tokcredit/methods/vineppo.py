"""VinePPO."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit
from tokcredit.objective import Objective


def vineppo(clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """PPO without a critic: each reasoning step is paid the change in value over it, by continuations at its ends.

    The value of a state is the mean reward of continuations from it, at the end the row's own reward. Whoever samples
    decides where steps begin.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: no groups; nine continuations from the beginning of every step of every row.
    Source: Kazemnejad et al., arXiv 2410.01679.
    Departs from the paper: no KL term; add one with ``dataclasses.replace(objective, kl=tokcredit.term.k3(1e-4))``. A
    continuation cut at the length limit is rewarded for its text, as rows are.
    """
    return Objective(
        credit.value_changes("step_values"), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.token_mean()
    )
