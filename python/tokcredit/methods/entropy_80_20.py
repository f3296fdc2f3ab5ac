"""Training on the tokens with the highest entropy."""

from __future__ import annotations

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit, filters, token_score


def entropy_80_20(
    share: float = 0.2, clip_low: float = 0.2, clip_high: float = 0.28, cap: float | None = None
) -> Objective:
    """80/20: DAPO on the 20 % of the tokens of the batch whose next-token distribution has the highest entropy.

    With ``A`` the advantage of GRPO and ``q`` the token's ratio::

        kept = the ceil(share * N) tokens of the batch with the highest entropy
        loss = mean over the kept tokens of max(-A * q, -A * clip(q, 1 - clip_low, 1 + clip_high))

    Args:
        share: Share of the tokens that train, above 0 and at most 1.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        cap: Dual-clip constant, at least 1: where ``A < 0`` the loss is at most ``-A * cap``. None for no dual clip.

    Cost: GRPO plus the entropies of the forward pass for the old log-probs.
    References: arXiv 2506.01939.
    Differences from the paper:
        - Tokens are ranked over the whole batch, by the entropy of the old policy. The paper ranks the micro-batch.
    Differences from the released code:
        - TRL's ``top_entropy_quantile`` divides by the number of all tokens.
    """
    return Objective(
        credit.group_normalized(),
        filters=(filters.top_share(share, token_score.given("entropies")),),
        clip=clip.ppo(clip_low, clip_high, cap),
        aggregation=aggregation.token_mean(),
    )
