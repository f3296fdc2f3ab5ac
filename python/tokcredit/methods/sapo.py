"""Soft Adaptive Policy Optimization."""

from __future__ import annotations

from tokcredit.stages import aggregation, clip
from tokcredit.objective import Objective


def sapo(tau_positive: float = 1.0, tau_negative: float = 1.05) -> Objective:
    """GRPO with a sigmoid gate on the ratio in place of the hard clip, steeper for negative advantages.

    ``loss = -(4 / tau) sigmoid(tau (q - 1)) A``; the gradient at q = 1 is that of GRPO.

    Args:
        tau_positive: temperature where A > 0.
        tau_negative: temperature where A <= 0.

    Cost: as GRPO.
    Source: Gao et al., arXiv 2511.20347.
    Departs from the paper: nothing known; temperatures and the mean of token means as in verl and TRL.
    """
    return Objective(clip=clip.soft(tau_positive, tau_negative), aggregation=aggregation.sequence_mean())
