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
    """``1 + strength (sigmoid(slope k) - 1/2)`` with ``k = (q - 1) - log q >= 0``, how far the token's policy moved.

    In ``[1, 1 + strength / 2)`` for a positive slope, which favours tokens that moved, and in
    ``(1 - strength / 2, 1]`` for a negative one.
    """

    strength: float = number(1.0)
    slope: float = number(10.0)

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
    """DAPO whose advantages grow, or shrink, with how far the token's probability has moved in this update.

    ``A (1 + strength (sigmoid(slope k) - 1/2))`` with ``k = (q - 1) - log q``, q the token's ratio; no gradient through
    the factor. It is 1 in the first optimizer step after a rollout, where q = 1.

    Args:
        strength: twice the most by which the factor may leave 1.
        slope: above 0 tokens that moved are paid more (the paper's high-KL boost), below 0 less (its low-KL boost).
        clip_low: the ratio may fall to ``1 - clip_low``.
        clip_high: the ratio may rise to ``1 + clip_high``.

    Cost: as GRPO.
    Source: arXiv 2603.22446.
    Departs from the paper: its values of strength and slope were not found.
    """
    return Objective(
        clip=clip.ppo(clip_low, clip_high),
        aggregation=aggregation.token_mean(),
        scales=(divergence(strength, slope),),
    )
