"""Segment policy optimization, chain."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit, filters, ratio
from tokcredit.objective import Objective


def spo_chain(below: float = 0.9, clip_low: float = 0.2, clip_high: float = 0.2, whiten: bool = False) -> Objective:
    """PPO without a critic: each segment of a row is paid the change in value over it, by continuations at its ends.

    Segments begin at improbable tokens (``tokcredit.credit.improbable_cuts``), and only tokens of a probability below
    0.9 train. The value of a state is the mean reward of continuations from it, at the end the row's own reward.

    Args:
        below: tokens of a smaller probability under the old policy train.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        whiten: give the advantages of the tokens that train mean 0 and variance 1, as the released code does.

    Cost: no groups; some (9 in the release) continuations from every cut of every row.
    Source: arXiv 2505.23564.
    Departs from the paper: no KL term (theirs: k3, 1e-4, a sum over tokens). The release also skips a micro-batch
    whose mean ratio exceeds 10. A continuation cut at the length limit is rewarded for its text, as rows are.
    """
    changes = credit.value_changes()
    return Objective(
        credit.whitened(changes, below) if whiten else changes,
        filters=(filters.improbable(below),),
        ratio=ratio.token(bound=10.0),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
