"""Divergence-weighted advantages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokcredit.objective import Objective
from tokcredit.spans import Spans
from tokcredit.stages import aggregation, clip
from tokcredit.stages.base import number
from tokcredit.stages.clip import Window
from tokcredit.stages.scale import Scale


@dataclass(frozen=True)
class divergence(Scale):
    """``1 + strength * (sigmoid(slope * k) - 1/2)``, with ``k = (q - 1) - log q`` and ``q`` the ratio of the token.

    ``k`` estimates ``KL(old || current)`` and is at least 0, so the factor lies in ``[1, 1 + strength / 2)`` for a
    positive slope and in ``(1 - strength / 2, 1]`` for a negative one.

    Args:
        strength: Twice the largest distance of the factor from 1, the paper's s.
        slope: Slope of the sigmoid, the paper's a.
    """

    strength: float = number(1.0)
    slope: float = number(10.0)

    couples_tokens = False

    def __call__(
        self,
        log_probs: Tensor,
        log_ratio: Tensor,
        advantages: Tensor,
        spans: Spans,
        window: Window,
        signal: Tensor | None,
    ) -> Tensor:
        moved = log_ratio.expm1().sub_(log_ratio)
        return moved.mul_(self.slope).sigmoid_().sub_(0.5).mul_(self.strength).add_(1)


def divergence_weighted(
    strength: float = 1.0, slope: float = 10.0, clip_low: float = 0.2, clip_high: float = 0.28
) -> Objective:
    """DAPO whose advantages are scaled by how far the probability of the token has moved in this update.

    With ``q`` the token's ratio and no gradient through the factor::

        k = (q - 1) - log q
        A[t] = A * (1 + strength * (sigmoid(slope * k) - 1/2))

    The factor is 1 at the first optimizer step after a rollout, where ``q = 1``.

    Args:
        strength: Twice the largest distance of the factor from 1, the paper's s.
        slope: Above 0 advantages of tokens that moved grow (the paper's high-KL boost); below 0 they shrink (its low-KL
            boost).
        clip_low: Lower clip range: the ratio is clipped to at least ``1 - clip_low``.
        clip_high: Upper clip range: the ratio is clipped to at most ``1 + clip_high``.

    Cost: The same as GRPO.
    References: arXiv 2603.22446, "Sparse but Critical".
    Differences from the paper:
        - The paper's values of ``strength`` and ``slope`` were not found; the defaults are suggestions.
    """
    return Objective(
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        scales=(divergence(strength, slope),),
    )
