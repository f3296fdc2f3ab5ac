"""REINFORCE++."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def reinforce_pp(discount: float = 1.0, kl: float = 0.01, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """REINFORCE++: returns with a KL penalty in the reward, whitened over the batch, without groups and without critic.

    With ``r`` the ``token_rewards``, the outcome added at the last token of the trajectory::

        G[t] = r[t] - kl * (log p_old[t] - log p_ref[t]) + discount * G[t + 1]
        A = (G - mean(G)) / sqrt(var(G) + 1e-8)

    Mean and variance are over all tokens of the batch.

    Args:
        discount: gamma, from 0 to 1.
        kl: Factor of the KL penalty, at least 0; the paper's beta.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: PPO without a critic: forward passes for the old and the reference log-probs.
    References: arXiv 2501.03262.
    Differences from the paper:
        - The value of ``kl`` was not found; the default is that of OpenRLHF.
    Differences from the released code:
        - Tokens that the policy did not choose neither decay nor end a return, and have no KL penalty.
        - OpenRLHF divides by the population standard deviation.
    """
    return Objective(
        credit.whitened(credit.returns(discount, kl=kl)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
