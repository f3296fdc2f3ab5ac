"""Optimal token baseline."""

from __future__ import annotations

from tokcredit import aggregation, clip, credit
from tokcredit.objective import Objective


def otb(
    by_turn: bool = False,
    epsilon: float = 1e-8,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """GRPO whose baseline differs from token to token: rows count by the squared score they have gathered so far.

    ``A[t] = G[t] - sum(W G) / (sum(W) + epsilon)`` over the rows of the group that have a token at the place of t. G is
    the reward to go, and the realized energy W adds up the logit-gradient proxy ``1 - 2 p + sum(p^2)`` to there. There
    is no division by the standard deviation.

    Args:
        by_turn: the rewards are ``turn_rewards``, in place of the row's.
        epsilon: added to the sum of energies.
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO, plus three more reads of the logits where old log-probs are computed.
    Source: arXiv 2602.07078.
    Departs from the paper: token ratios with PPO's clip and the mean over tokens; verl's loss caps the ratio of losing
    tokens at 3 besides. The reward is the row's and G the same at each of its tokens, where verl sums rewards per
    token from there on, penalties in the reward among them; ``by_turn`` does that. A row alone at a place has baseline
    0. verl gives that to groups of one and, counting chosen tokens, to the longest row behind the second longest, which
    with masked tokens reaches places where it is not alone, and pays a row alone elsewhere about 0. Places count tool
    tokens, as in verl's ``optimal_token_baseline``; its ``tir_optimal_token_baseline`` counts chosen tokens alone.
    Energies are at least 0 whatever the rounding, and are not multiplied by the squared weights of a rollout
    correction. ``squared_probs`` are the current policy's, also for rows that were replayed.
    """
    return Objective(
        credit.least_variance(by_turn, epsilon),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
