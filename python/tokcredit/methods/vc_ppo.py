"""Value-calibrated PPO."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit


def vc_ppo(
    trace: float = 0.95,
    target_trace: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Objective:
    """VC-PPO: PPO whose advantages and whose value targets have a lambda of their own, for long responses.

    With ``delta[t] = r[t] + V[t + 1] - V[t]``::

        A[t] = delta[t] + trace * A[t + 1]
        target[t] = V[t] + B[t],   B[t] = delta[t] + target_trace * B[t + 1]

    With a ``target_trace`` of 1 the target is the return, and the reward reaches the first token undiminished.

    Args:
        trace: lambda of the advantages, from 0 to 1.
        target_trace: lambda of the value targets, ``credit.targets(batch)`` of the objective; from 0 to 1.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as PPO, and training of the critic alone before.
    References: arXiv 2503.01491.
    Differences from the paper:
        - The critic is not trained before the policy here; ``tokcredit train --critic-warmup`` does it.
    """
    return Objective(
        credit.whitened(credit.gae(trace=trace, target_trace=target_trace)),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
