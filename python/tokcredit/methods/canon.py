"""Conditional advantage estimation."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit
from tokcredit.objective import Objective
from tokcredit.schedule import Schedule


def canon(
    by_length: bool = False,
    between: float | Schedule | credit.by_mean_reward | None = None,
    alpha: float = 1.0,
    offset: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    max_length: int | None = None,
) -> Objective:
    """GRPO that splits each group by entropy and compares a row with the other half, or with its own.

    ``A = between (r - mean of the other half) + (1 - between) (r - mean of its own half)``, undivided; 0.5 with equal
    halves is ``dr_grpo``. Across halves the better half is favoured, inside them the correct rows of the weaker one.

    Args:
        by_length: split by the number of tokens in place of the mean entropy.
        between: share of the comparison across halves: 1 is CANON-Inter, 0 CANON-Intra. None for CANON-Dynamic, one
            minus the batch's mean reward. The cosine schedules of the release are
            ``tokcredit.schedule.cosine_restarts(0, 1, 0.4, steps=150, warmup=30, period=40)`` (first across halves),
            and with ``(1, 0.4, 1)`` (first inside).
        alpha: factor of the rewards of long rows, or of low-entropy rows, in the comparison across halves; below 1 with
            ``by_length`` and ``between=1`` is CANON-Eff.
        offset: added to the high half there, and taken from the low one.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        max_length: divides the sum over a row's tokens; None takes the batch's longest row.

    Cost: as GRPO, plus entropies with the old log-probs.
    Source: arXiv 2509.23962.
    Departs from the released code: CANON-Dynamic is the paper's, where the release is left in the opposite state, the
    mean reward itself (``between=tokcredit.credit.by_mean_reward(0, 1)``). Which half alpha discounts follows the code.
    """
    return Objective(
        credit.halves(
            credit.length() if by_length else credit.mean_entropy(),
            credit.by_mean_reward() if between is None else between,
            high=alpha if by_length else 1.0,
            low=1.0 if by_length else alpha,
            offset=offset,
        ),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.sequence_sum(max_length),
    )
