"""GSPO-token: the ratio of GSPO with an advantage for each token."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, ratio


def gspo_token(clip_low: float = 3e-4, clip_high: float = 4e-4) -> Objective:
    """GSPO-token: the response's ratio weighs every token, each with its own advantage and its own gradient.

    With ``sg`` the stop-gradient::

        s[i] = exp(mean over t of (log p[i, t] - log p_old[i, t]))
        q[i, t] = sg(s[i]) * p[i, t] / sg(p[i, t])
        loss = mean over i, then t, of max(-A[i, t] * q, -A[i, t] * clip(q, 1 - clip_low, 1 + clip_high))

    By default the advantage is GRPO's; loss and gradient are then those of :func:`gspo`. Another credit gives each
    token its own advantage: ``tokcredit.mix("gspo_token", credit="tempo")``.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: Zheng et al., arXiv 2507.18071.
    Differences from the paper:
        - The logarithm of the ratio is at most 10, as in verl.
    Differences from the released code:
        - verl 0.9 aggregates by its setting, whose default is the mean over all tokens.
    """
    return Objective(
        ratio=ratio.sequence(), clip=clip.ppo(clip_low, clip_high), aggregation=aggregation.sequence_mean()
    )
