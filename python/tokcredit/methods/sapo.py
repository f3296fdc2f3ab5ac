"""Soft Adaptive Policy Optimization."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05) -> Objective:
    """SAPO: GRPO with a sigmoid gate on the ratio in place of the clip, steeper for negative advantages.

    With ``A`` the advantage of GRPO, ``q`` the token's ratio and ``tau`` the temperature of the advantage's sign::

        loss = mean over i of mean over t of -(4 / tau) * sigmoid(tau * (q - 1)) * A[i]

    At ``q = 1`` the gradient is that of GRPO.

    Args:
        tau_positive: Temperature where ``A > 0``, above 0.
        tau_negative: Temperature where ``A <= 0``, above 0.

    Cost: The same as GRPO.
    References: Gao et al., arXiv 2511.20347.
    Differences from the paper:
        - None known.
    """
    return Objective(clip=clip.soft(tau_positive, tau_negative), aggregation=aggregation.sequence_mean())
