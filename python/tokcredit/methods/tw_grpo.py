"""Token-weighted GRPO."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip, credit, token_score, token_weights
from tokcredit.objective import Objective


def tw_grpo(
    alpha: float = 1.7,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    epsilon: float = 1e-4,
    padded: bool = False,
) -> Objective:
    """GRPO that weighs each position by how much the rows of the group disagree there about the next token.

    ``w = 1 + (alpha - 1) D``, D in ``[0, 1]`` from the distributions of all rows at that position
    (:func:`tokcredit.divergence.disagreement`); mean over tokens, and w does not change the denominator.

    Args:
        alpha: the largest weight.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: added to the standard deviation.
        padded: compare with rows that have ended as well, as the released code does, taking them for uniform.

    Cost: as GRPO, plus two streams over the logits of the old log-prob pass, a group at a time.
    Source: arXiv 2505.24718.
    Departs from the released code: rows that have ended do not disagree, which there gives the ragged tail the largest
    weights; no gradient flows through the weights; alpha as in its script (1.4 in its code).
    """
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        token_weights=(token_weights.raised(token_score.given("padded_disagreement" if padded else "disagreement"), alpha - 1),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
