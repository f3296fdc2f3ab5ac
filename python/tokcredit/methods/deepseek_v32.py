"""The policy loss of DeepSeek-V3.2."""

from __future__ import annotations

import math

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, scale, term
from tokcredit.stages.base import InputName


def deepseek_v32(
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float = 0.5,
    beta: float = 0.001,
    to: InputName = "rollout_log_probs",
) -> Objective:
    """DeepSeek-V3.2: GRPO without bad responses that became improbable, and an unbiased KL term.

    With ``A`` the advantage of GRPO, ``q`` the ratio and ``u = log p - log p_ref``::

        dropped = A < 0 and mean over t of (log p_to - log p) > delta
        loss = mean over i, then t, of
               (0 if dropped else max(-A * q, -A * clip(q, 1 - clip_low, 1 + clip_high)))
               + beta * q * (exp(-u) + u - 1)

    The gradient of the last term is ``beta * q * u``, an unbiased estimate of that of the KL.
    Dropped responses stay in the denominators and in the KL term.

    Args:
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        delta: Largest mean fall of the log-probs of a response with a negative advantage, nats. TRL suggests 0.5, and
            slime has 0.0001.
        beta: Factor of the KL term, at least 0.
        to: Input that the log-probs are compared with: ``rollout_log_probs`` or ``old_log_probs``.

    Cost: GRPO plus a forward pass of the reference policy.
    References: arXiv 2512.02556.
    Differences from the paper:
        - The values of ``delta`` and ``beta`` are not the paper's, which was not read; they are common in hosts.
    Differences from the released code:
        - ms-swift also leaves dropped responses out of denominators and of the KL term; TRL and slime do as is done
          here.
        - With ratios of whole rows TRL multiplies the KL by the row's ratio; here it is that of the token.
    """
    return Objective(
        clip=clip.ppo(clip_low, clip_high),
        scales=(scale.within("ratio", "mean", low=math.exp(-delta), signs="negative", to=to),),
        aggregation=aggregation.sequence_mean(),
        terms=(term.kl(beta, "k3_corrected"),),
    )
