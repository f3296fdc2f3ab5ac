"""Direct reward optimization, and the loss of Kimi k1.5."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, ratio, term


def dro(beta: float = 0.1) -> Objective:
    """DRO: the policy gradient without a ratio, and a quadratic term that pulls each log-prob to the old policy's.

    With ``A`` the advantage of GRPO::

        loss = mean over all tokens of -A * log p + beta / 2 * (log p - log p_old)^2

    Args:
        beta: Strength of the pull, at least 0. verl has no default for it; ROLL takes 0.1.

    Cost: The same as GRPO.
    References: DRO, arXiv 2405.19107. Kimi k1.5, arXiv 2501.12599.
    Differences from the paper:
        - The paper learns a value function; here the advantage of GRPO takes its place, as in verl.
    """
    return Objective(
        ratio=ratio.one(),
        clip=clip.gated(),
        aggregation=aggregation.token_mean(),
        terms=(term.kl(beta, "k2", to="old_log_probs"),),
    )
