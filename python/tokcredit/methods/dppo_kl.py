"""Divergence PPO with a bound on the KL divergence."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, ratio
from tokcredit.stages.base import InputName
from tokcredit.stages.clip import log_cap


def dppo_kl(
    low: float = 0.05,
    high: float = 0.05,
    cap: float | None = 10_000.0,
    to: InputName = "rollout_log_probs",
    max_length: int | None = None,
) -> Objective:
    """DPPO-KL: a token stops training once the KL divergence of "this token or another" has become too large.

    With ``A`` the advantage of GRPO, ``q = p / p_to`` and ``sg`` the stop-gradient::

        kl = p_to * log(p_to / p) + (1 - p_to) * log((1 - p_to) / (1 - p))
        stopped = (A > 0 and p > p_to and kl > high) or (A < 0 and p < p_to and kl > low)
        loss = mean over i of (sum over t, not stopped, of -A * sg(min(q, cap)) * log p) / max_length

    Args:
        low: Largest divergence of a token with a negative advantage whose probability fell, nats.
        high: Largest divergence of a token with a positive advantage whose probability rose, nats.
        cap: Largest ratio in the loss, above 0, or None for no cap.
        to: Input with the log-probs that ratio and bounds are relative to: ``rollout_log_probs``, as the authors do, or
            ``old_log_probs``, as verl does.
        max_length: Constant that replaces the length of the response, at least 1. None takes the longest row.

    Cost: The same as GRPO.
    References: arXiv 2602.04879.
    Differences from the released code:
        - verl's default configuration has a cap of 3, whatever its function says. SkyRL and prime-rl have none.
        - ``1 - p`` is computed without cancellation. As in the release, 1e-8 is added to both numbers of the second
          logarithm.
        - The variants that compare the most probable tokens of both distributions are not offered.
    """
    gate = clip.gated("binary_kl", 0.0 - low, high, cap=log_cap(cap))
    return Objective(ratio=ratio.token(to=to), clip=gate, aggregation=aggregation.sequence_sum(max_length))
