"""Group Relative Policy Optimization."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit, ratio
from tokcredit.objective import Objective


def grpo(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    cap: float | None = None,
    scale: bool = True,
    epsilon: float = 1e-6,
) -> Objective:
    """The method the others are described against: one advantage per row, PPO's clip, mean over rows of token means.

    ``A = (r - mean) / (std + epsilon)`` over the group, with the sample standard deviation.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        cap: where A < 0 the loss is at most ``-A cap`` (verl: 3.0, TRL: none).
        scale: divide by the standard deviation.
        epsilon: added to it (verl: 1e-6, TRL: 1e-4).

    Cost: the measure for the others.
    Source: Shao et al., arXiv 2402.03300.
    Departs from the paper: no KL term; add one with ``dataclasses.replace(objective, kl=tokcredit.term.k3(0.04))``.
    """
    return Objective(
        credit.group_normalized(scale, epsilon),
        ratio=ratio.token(),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.sequence_mean(),
    )
