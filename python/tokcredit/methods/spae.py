"""Step potential advantage estimation."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit, sampling
from tokcredit.objective import Objective


def spae(
    alpha: float = 0.5,
    bonus: float = 0.5,
    saturated: float = 0.9,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Objective:
    """DAPO whose reward fades once probes show the problem solved, plus a bonus for steps that raise the potential.

    After every reasoning step short answers are probed. How sure they are (c) and how probable the true answer is (a)
    make the potential ``1.5 a c + 0.5 a - c``. Groups of equal rewards are left out, and the advantages whitened over
    the tokens of the batch.

    Args:
        alpha: share of the outcome that may fade.
        bonus: weight of the jump in potential.
        saturated: a step whose potential exceeds it counts as solved.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO, plus five probes of ten tokens and a forced answer at the end of every step.
    Source: arXiv 2601.03823.
    Departs from the paper: it leaves open, and this takes, a threshold of 0.9 as in its probing script, DAPO's clip
    values, min-max over the steps and the mean over the tokens of the batch, and the last step for what follows it. A
    row without steps is one step whose potential has not changed.
    """
    return Objective(
        credit.whitened(credit.saturating(alpha, bonus, saturated)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        sampling=sampling.mixed(),
    )
