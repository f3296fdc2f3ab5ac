"""Tree-estimated mean prefix value for policy optimization."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit
from tokcredit.objective import Objective


def tempo(
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    cap: float | None = 3.0,
    scale: bool = True,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO plus, at tokens where rollouts of a group part, the change in mean reward that the token caused.

    ``A[t] = (r - mean + V(prefix with t) - V(prefix before t)) / (std + epsilon)``, V(prefix) being the mean reward
    of the group's rollouts that begin with it. No critic and no extra rollouts; elsewhere the advantage is GRPO's.

    Args:
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        cap: where A < 0 the loss is at most ``-A cap``.
        scale: divide both terms by the group's standard deviation.
        epsilon: added to it.

    Cost: as GRPO, plus the prefix trees of the groups, built once per batch on token ids.
    Source: arXiv 2509.18314.
    Departs from the released code: the end of a row is a symbol of its own, not the padding id; a group of one is
    paid as in GRPO (the release gives NaN); tool tokens are compared but not paid (the release stops at the first).
    """
    return Objective(
        credit.tempo_like(scale, epsilon),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.token_mean(),
    )
