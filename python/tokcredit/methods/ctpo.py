"""Cumulative Token Policy Optimization."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, ratio


def ctpo(
    clip_low: float = 0.025,
    clip_high: float = 0.05,
    cap: float | None = 0.05,
    power: float = 0.5,
    token_mean: bool = True,
) -> Objective:
    """CTPO: GRPO with the ratio of the whole prefix and bounds on its logarithm that grow with the position.

    With ``A`` the advantage of GRPO, ``k`` the position of the token among the chosen tokens of its response, from 1,
    and ``s = k ** power``::

        log q[t] = min(10, sum over chosen tokens u <= t of (log p[u] - log p_old[u]))
        loss = max(-A * q, -A * exp(clip(log q, -clip_low * s, clip_high * s)))
        if A < 0 and cap is not None:
            loss = min(loss, -A * exp(cap * s))

    The gradient of the ratio reaches only the log-prob of the current token.

    Args:
        clip_low: Lower bound at position 1, nats, at least 0.
        clip_high: Upper bound at position 1, nats, at least 0.
        cap: Logarithm of the dual-clip constant at position 1, nats, at least 0; None for no dual clip.
        power: Growth of the bounds with the position, at least 0.
        token_mean: Whether the loss is the mean over all tokens rather than the mean over rows of token means.

    Cost: GRPO plus one cumulative sum along the rows.
    References: arXiv 2605.07331.
    Differences from the paper:
        - The dual clip and the mean over tokens are those of the released script; ``cap=None, token_mean=False`` is the
          objective of the paper.
        - The ratio is a weight, and only the log-prob of the current token is differentiated, as in the released code.
          The objective as it is written would also send gradient to the earlier tokens.
    Differences from the released code:
        - The truncated importance weight of whole rows (5.0), which its script uses, is a stage of its own:
          ``tokcredit.mix("ctpo", token_weights="importance('sum', high=5.0)")``.
        - The power is 0.5 as in its script; its configuration file has 0, with which it fails.
    """
    return Objective(
        ratio=ratio.cumulative(),
        clip=clip.growing(clip_low, clip_high, power, cap),
        aggregation=aggregation.token_mean() if token_mean else aggregation.sequence_mean(),
    )
