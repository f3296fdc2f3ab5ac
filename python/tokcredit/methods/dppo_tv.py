"""Divergence PPO with a bound on the change of the probability."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, ratio
from tokcredit.stages.base import InputName
from tokcredit.stages.clip import log_cap


def dppo_tv(
    low: float = 0.15,
    high: float = 0.15,
    cap: float | None = 10_000.0,
    to: InputName = "rollout_log_probs",
    max_length: int | None = None,
) -> Objective:
    """DPPO-TV: a token stops training once its probability, not its ratio, has moved too far.

    With ``A`` the advantage of GRPO, ``q = p / p_to`` and ``sg`` the stop-gradient::

        stopped = (A > 0 and p - p_to > high) or (A < 0 and p - p_to < -low)
        loss = mean over i of (sum over t, not stopped, of -A * sg(min(q, cap)) * log p) / max_length

    ``|p - p_to|`` is the total variation between the two distributions over "this token or another". A rare token may
    change by a large factor, a common one may not.

    Args:
        low: How far the probability of a token with a negative advantage may fall, from 0 to 1.
        high: How far the probability of a token with a positive advantage may rise, from 0 to 1.
        cap: Largest ratio in the loss, above 0, or None for no cap.
        to: Input with the log-probs that ratio and bounds are relative to: ``rollout_log_probs``, as the authors do, or
            ``old_log_probs``, as verl does.
        max_length: Constant that replaces the length of the response, at least 1. None takes the longest row.

    Cost: The same as GRPO.
    References: arXiv 2602.04879.
    Differences from the released code:
        - verl's default configuration has a cap of 3, whatever its function says. SkyRL and prime-rl have none, and
          bounds of 0.2.
        - prime-rl adds 0.001 times the squared log-ratio: ``term.kl(0.002, "k2", to="rollout_log_probs")``. Its ``ipo``
          stops tokens on both sides: ``clip.gated("probability", -0.1, 0.1, both_sides=True)``.
        - The variants that compare the most probable tokens of both distributions are not offered.
    """
    gate = clip.gated("probability", 0.0 - low, high, cap=log_cap(cap))
    return Objective(ratio=ratio.token(to=to), clip=gate, aggregation=aggregation.sequence_sum(max_length))
