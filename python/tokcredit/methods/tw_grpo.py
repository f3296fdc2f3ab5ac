"""Token-weighted GRPO."""

from __future__ import annotations

from typing import Annotated

from tokcredit.objective import Objective
from tokcredit.stages import aggregation, clip, credit, token_score, token_weights
from tokcredit.stages.base import Range


def tw_grpo(
    alpha: Annotated[float, Range("number", at_least=0)] = 1.7,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    epsilon: float = 1e-4,
    padded: bool = False,
) -> Objective:
    """TW-GRPO: GRPO that weights each position by how much the responses of the group disagree about the next token.

    With ``D`` in ``[0, 1]`` from the next-token distributions of all responses at the position
    (:func:`tokcredit.divergence.disagreement`)::

        w[t] = 1 + (alpha - 1) * D[t]
        loss = mean over all tokens of w * (clipped token loss of GRPO)

    The weights do not change the denominator.

    Args:
        alpha: Largest weight, at least 0.
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.
        epsilon: Added to the standard deviation.
        padded: Whether responses that have ended are compared too, as uniform distributions, as in the released code.

    Cost: GRPO plus two passes over the logits of the forward pass for the old log-probs, one group at a time.
    References: arXiv 2505.24718.
    Differences from the paper:
        - The notation of the paper was not found; the formula is that of the released code.
    Differences from the released code:
        - Responses that have ended are not compared unless ``padded`` is set. In the release they give the largest
          weights to positions at which some responses have ended.
        - No gradient flows through the weights.
        - ``alpha`` is 1.7 as in the released script; the code has 1.4.
    """
    disagreement = token_score.given("padded_disagreement" if padded else "disagreement")
    return Objective(
        credit.group_normalized(epsilon=epsilon),
        token_weights=(token_weights.raised(disagreement, alpha - 1),),
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
    )
