"""R3: replay, reflection and ranking rewards."""

from __future__ import annotations

from tokcredit import clip, credit
from tokcredit.objective import Objective


def r3(
    alpha: float = 1.0,
    share: float = 0.2,
    best: float = 0.5,
    max_length: int = 32768,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    epsilon: float = 1e-6,
) -> Objective:
    """GRPO whose groups all right or all wrong are joined by stored replies of the other kind.

    ``A = (R - mean) / (alpha std + epsilon)`` over fresh and replayed rows; the ratio of a replayed row is to the
    policy it was drawn from. R is the reward, ``+ max(0, 1 - L / max_length)`` for a correct row of L tokens, and in
    groups whose fresh rows are all wrong up to ``best`` for those cut at the greatest length, ranked: a row dominates
    another if its largest entropies are larger and its mean entropy smaller. The trainer replays, and asks hard prompts
    again with a wrong reply and a request to reflect (``tokcredit.train.replay``).

    Args:
        alpha: of the standard deviation where rows were replayed; above 1 such groups are paid less.
        share: of a row's tokens whose entropies, the largest, are compared.
        best: reward of the first of the ranked rows; below 1, or it outdoes a correct one.
        max_length: a correct row of this length gets no bonus.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.
        epsilon: the paper's lambda.

    Cost: as GRPO with entropies from the old log-probs; replayed rows need passes but no sampling, hard prompts another
    group. Two entropy means per row, and comparisons inside groups.
    Source: arXiv 2601.19620.
    Departs from the paper: no KL term; token ratios for its sequence ratio. Its numbers were not found: alpha, share,
    best and epsilon are ours. It leaves open, and this takes, log-probs at sampling time for replayed rows, alpha 1 in
    groups without them, the mean rank for equals, and for a single truncated row ``best`` next to a finished one, else
    0. Ranking and length bonus act from the first epoch on, as they need no stored replies.
    """
    return Objective(
        credit.pooled((credit.brevity(max_length), credit.dominance(share, best)), alpha, epsilon),
        clip=clip.ppo(clip_low, clip_high),
    )
