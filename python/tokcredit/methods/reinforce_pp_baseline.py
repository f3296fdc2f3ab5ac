"""REINFORCE++ with a baseline."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit, term


def reinforce_pp_baseline(kl: float = 0.01, clip_low: float = 0.2, clip_high: float = 0.2) -> Objective:
    """REINFORCE++ with a baseline: rewards minus the mean of their group, whitened over the tokens of the batch.

    With ``R`` the total reward of a trajectory::

        A = whiten(R - mean(R))
        loss = clipped loss + kl * mean of (log p - log p_ref)^2 / 2

    ``mean`` is over the group, ``whiten`` over all tokens of the batch, so long trajectories weigh more in it. In a
    group of one ``mean`` is 0: with the credit ``whitened(group_normalized(scale=False, alone=zero))`` its advantage
    before ``whiten`` is 0. The credit ``batch_normalized(group_normalized(scale=False))`` normalizes over trajectories
    in place of tokens.

    Args:
        kl: Factor of the KL term, at least 0.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: GRPO plus a forward pass of the reference model.
    References: arXiv 2501.03262.
    Differences from the paper:
        - The value of ``kl`` was not found; the default is that of OpenRLHF.
    Differences from the released code:
        - OpenRLHF divides by the population standard deviation, and takes groups by position.
    """
    return Objective(
        credit.whitened(credit.group_normalized(scale=False)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        terms=(term.kl(kl, "k2"),),
    )
