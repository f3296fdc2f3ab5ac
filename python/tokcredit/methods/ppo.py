"""Proximal policy optimization."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def ppo(
    discount: float = 1.0,
    trace: float = 0.95,
    kl: float = 0.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """PPO: generalized advantage estimates from a critic's values, whitened over the batch, and the clipped surrogate.

    With ``V`` the ``values`` and ``r`` the ``token_rewards``, the outcome added at the last token of the trajectory::

        delta[t] = r[t] + discount * V[t + 1] - V[t]
        A[t] = delta[t] + discount * trace * A[t + 1]
        A = (A - mean(A)) / sqrt(var(A) + 1e-8)

    The batch carries the values. What a critic is trained to predict is ``credit.targets(batch)`` of the objective.

    Args:
        discount: gamma, from 0 to 1.
        trace: lambda, from 0 to 1.
        kl: Factor of a KL penalty in the rewards, ``-kl * (log p_old[t] - log p_ref[t])``; at least 0.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: No groups, but a critic of the size of the policy.
    References: arXiv 1707.06347; generalized advantage estimates, arXiv 1506.02438.
    Differences from the paper:
        - Advantages are whitened, as in all trainers of language models.
        - The loss of the critic is not part of the objective; ``tokcredit.mix("ppo", terms="value(0.5)")`` adds it.
    """
    return Objective(
        credit.whitened(credit.gae(discount, trace, kl=kl)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
